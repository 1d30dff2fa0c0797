import json
import sys

import pytest

from conftest import TRANSFORMERS_5, tiny_folder
from recipe import long_texts
from recipe.data import read_questions
from recipe.quantize import main as quantize

pytest.importorskip("openvino")  # which recipe.peers runs too
pytestmark = pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 has no such pipeline to compare with")


def test_the_command_compares_two_pipelines(tmp_path, city_windows, monkeypatch):
    base, output = tiny_folder(tmp_path / "base"), tmp_path / "results" / "long.json"
    arguments = ["--model", str(base), "--windows", str(city_windows), "--output_dir", str(tmp_path / "int8")]
    monkeypatch.setattr(sys, "argv", ["quantize", *arguments])
    quantize()
    stated = tmp_path / "int8" / "tokenizer_config.json"
    stated.write_text(json.dumps(json.loads(stated.read_text()) | {"model_max_length": 64}))  # the model's positions
    for name, value in {"PAGE": 300, "PAGES": 2, "MORE_PAGES": 8, "MANY": 3}.items():
        monkeypatch.setattr(long_texts, name, value)
    arguments = ["--model", str(tmp_path / "int8"), "--windows", str(city_windows), "--length_config", "full"]
    arguments += ["--python4", sys.executable, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["long_texts", *arguments])
    long_texts.main()
    found = json.loads(output.read_text())
    assert set(found["rows"]) == {"MiniLM, transformers 4.57, fp32", "ours, int8, full"}
    assert found["questions"] == {"one": 1, "many": 3, "more pages": 1}
    for stages in found["rows"].values():
        assert all(stage["seconds"] > 0 and stage["peak_resident_mb"] > 100 for stage in stages.values())
        assert stages["one"]["peak_resident_mb"] <= stages["more pages"]["peak_resident_mb"]


def test_questions_are_answered_in_the_first_pages(city_file, monkeypatch):
    for name, value in {"PAGE": 100, "PAGES": 2, "MORE_PAGES": 8, "MANY": 3}.items():
        monkeypatch.setattr(long_texts, name, value)
    table = read_questions(city_file)
    text, questions = long_texts.pages_of(table, seed=0)
    assert len(text) == 800 and 1 <= len(questions) <= 3
    first = {row["question"] for row in table if row["context"] in text[:200]}
    assert set(questions) <= first
