import os
import subprocess

import pytest
from transformers import pipeline

from conftest import ROOT, TRANSFORMERS_5
from recipe.answer import main

pytestmark = pytest.mark.skipif(
    not TRANSFORMERS_5 or not (ROOT / ".venv" / ".runtime-installed").exists(),
    reason="`make answer` runs in .venv, which make test sets up",
)

TRICKY = 'It\'s "cheap": $5, $HOME or $(HOME), # not 6\\n.\nThe shop `true` is in Oslo; 100% sure & safe.'


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_make_answer_prints_one_line_whatever_is_in_the_texts(by):
    question = 'What does it cost, in "$"? It\'s important'
    texts = {"QUESTION": question, "CONTEXT": TRICKY}
    arguments = [f"{name}={text}" for name, text in texts.items()] if by == "argument" else []
    environment = os.environ | (texts if by == "environment" else {})
    done = subprocess.run(
        ["make", "--silent", "answer", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    qa = pipeline("question-answering", model=str(ROOT), trust_remote_code=True)
    expected = qa(question=question, context=TRICKY)["answer"]
    assert done.stdout == " ".join(expected.split()) + "\n"


def test_make_answer_has_defaults_and_names_bad_input(monkeypatch):
    done = subprocess.run(["make", "--silent", "answer"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "Berlin"
    monkeypatch.setenv("QUESTION", "Where?")
    monkeypatch.setenv("CONTEXT", "")
    with pytest.raises(SystemExit, match="^make answer: `context` cannot be empty"):
        main()
