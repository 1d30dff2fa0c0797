import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, pipeline

from conftest import ROOT, tiny_folder, trains
from recipe.report import documents
from tests.test_convert import reference, save_tokenizer

TEXTS = {path: path.read_text(encoding="utf-8") for path in (*documents(ROOT), ROOT / "CONTRIBUTING.md")}
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)]


def block(language, text):
    """The documents' one block in `language` that holds `text`."""
    (found,) = [code for of, code in BLOCKS if of == language and text in code]
    return found


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository with a tiny model, whose environments are set up."""
    ignored = shutil.ignore_patterns(".*", "runs", "assets", "results", "tests", "model.safetensors", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored)
    tiny_folder(tmp_path / "clone")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").symlink_to("/bin/true")
    (tmp_path / "clone" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "clone" / ".venv" / "bin" / "activate").touch()
    return tmp_path / "clone"


def run_block(code, clone):
    programs = f"{clone.parent / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", code], cwd=clone, env=os.environ | {"PATH": programs}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_block_that_answers_answers(monkeypatch):
    monkeypatch.chdir(ROOT)
    *setup, ask = block("python", 'qa(question="Where do I live?"').split("# {'score'")[0].strip().splitlines()
    names = {}
    exec("\n".join(setup), names)
    assert eval(ask, names)["answer"] == "Berlin"


def test_the_block_with_a_model_object_makes_a_pipeline(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(block("python", "QuestionAnsweringPipeline(model=model"), names)
    assert names["qa"](question="Where do I live?", context="I live in Berlin.")["answer"] == "Berlin"


def test_the_block_that_reads_without_torch_reads(folder_with_graph, monkeypatch):
    monkeypatch.chdir(folder_with_graph)
    monkeypatch.syspath_prepend(folder_with_graph)
    *setup, ask = block("python", "from reader import Reader").strip().splitlines()
    names = {}
    exec("\n".join(setup), names)
    assert eval(ask.replace('"fast"', '"half"'), names)["answer"] in ask  # that folder's presets


@trains
def test_the_block_that_trains_trains(clone):
    code = block("sh", "--stages recipe/own")
    stage = clone / "recipe" / "own" / "2-adapt.toml"
    stage.write_text(f"{stage.read_text()}bf16 = false\n")  # which this machine may not have
    assert "All stages are done" in run_block(code, clone)
    data = json.loads((clone / "mine" / "questions.json").read_text())["data"]
    paragraphs = [paragraph for article in data for paragraph in article["paragraphs"]]
    answers = [(each["context"], answer) for each in paragraphs for qa in each["qas"] for answer in qa["answers"]]
    assert sum(len(each["qas"]) for each in paragraphs) == 4 and len(answers) == 3
    assert all(context[answer["answer_start"] :].startswith(answer["text"]) for context, answer in answers)
    model = AutoModelForQuestionAnswering.from_pretrained(clone / "runs" / "mine" / "int8", trust_remote_code=True)
    assert model.config.int8_weights


def test_the_block_that_converts_converts(clone):
    reference("bert", (2, 16, 2, 24)).save_pretrained(clone / "SOURCE")
    save_tokenizer("bert", clone / "SOURCE")
    assert "Wrote OUT" in run_block(block("sh", "convert_checkpoint.py SOURCE OUT"), clone)
    qa = pipeline("question-answering", model=str(clone / "OUT"), trust_remote_code=True)
    assert qa(question="Where?", context="In Berlin.")["score"] > 0
    source = AutoModelForQuestionAnswering.from_pretrained(clone / "SOURCE").eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 3, 7, 8, 3]]), "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]])}
    with torch.inference_mode():
        torch.testing.assert_close(qa.model(**inputs).start_logits, source(**inputs).start_logits)


def test_the_block_that_answers_a_file_answers_it(clone):
    assert "Wrote answers.parquet: 2 answers" in run_block(block("sh", "recipe.predict questions.jsonl"), clone)
    answers = pq.read_table(clone / "answers.parquet").to_pylist()
    contexts = {row["id"]: row["context"] for row in map(json.loads, (clone / "questions.jsonl").open())}
    assert [answer["id"] for answer in answers] == ["1", "2"]
    assert all(contexts[int(row["id"])][row["start"] : row["end"]] == row["answer"] for row in answers)
    (bad,) = map(json.loads, (clone / "answers.parquet.bad.jsonl").open())
    assert bad == {"row": 2, "id": 3, "reason": "`question` cannot be empty"}


LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"python -m (recipe\.\w+)((?:[^\n]|(?<=\\)\n)*)")


def anchors(text):
    """What links to the headings of a Markdown text end in, as GitHub and the Hub make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document):
    links = [link for link in LINK.findall(TEXTS[document]) if not link.startswith(("https://", "http://"))]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_links_and_anchors_are_found():
    assert LINK.findall("[a](b.md) ![c](d.png) (e)") == ["b.md", "d.png"]
    assert anchors("# A b\n```\n# c\n```\n## With `d`, and e\n") == {"a-b", "with-d-and-e"}


def test_python_blocks_are_python():
    for language, code in BLOCKS:
        if language == "python":
            compile(code, "a block", "exec")


def options_in(text):
    """The commands of recipe/ that a text runs, each with the options that it gives them."""
    found = {}
    for module, arguments in COMMAND.findall(text):
        found.setdefault(module, set()).update(re.findall(r"(--\w+)", arguments.partition("#")[0]))
    return found


COMMANDS = options_in("\n".join(TEXTS.values()))


@pytest.mark.parametrize("module", sorted(COMMANDS))
def test_commands_of_recipe_have_the_options_that_documents_give_them(module, monkeypatch, capsys):
    command = pytest.importorskip(module)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit):
        command.main()
    assert COMMANDS[module] <= set(re.findall(r"--\w+", capsys.readouterr().out))


def test_make_s_targets_and_requirement_files_exist():
    prose = re.sub(r"```.*?```", "", "\n".join(TEXTS.values()), flags=re.DOTALL)
    text = "\n".join([*(code for language, code in BLOCKS if language == "sh"), *re.findall(r"`[^`]+`", prose)])
    targets = set(re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split())
    named = set(re.findall(r"(?:^|`|&& )make ([a-z][\w-]*)", text, re.MULTILINE))
    assert {"answer", "test"} < named <= targets
    files = set(re.findall(r"requirements[\w-]*\.txt", text))
    assert files and all((ROOT / name).is_file() for name in files)
