import json
import sys

import pytest

from conftest import squad_file
from recipe import engines
from recipe.data import in_validation, read_questions

pytest.importorskip("onnxruntime", reason="the engine runs in onnxruntime, which is not installed")


def test_a_comparison_by_hand(tmp_path):
    asked = [(f"Where is {i}?", ["the big house"]) for i in range(4)]
    table = read_questions(squad_file(tmp_path / "squad.json", {"One": [("It is in the big house.", asked)]}))
    texts = {"torch": ["the big house"] * 4, "onnxruntime": ["the big house", "big house", "big", ""]}
    assert engines.compare(texts, table) == pytest.approx(
        {"alike": 0.25, "torch_f1": 100, "onnxruntime_f1": (100 + 100 + 200 / 3 + 0) / 4}
    )


def test_every_preset_is_compared(tmp_path, folder_with_graph, monkeypatch):
    titles = [title for title in map(str, range(200)) if in_validation(title)][:3]
    articles = {title: [("I live in Berlin.", [("Where do I live?", ["Berlin"])])] for title in titles}
    options = ["--model", folder_with_graph, "--data", squad_file(tmp_path / "squad.json", articles)]
    options += ["--questions", 2, "--output", tmp_path / "engines.json"]
    monkeypatch.setattr(sys, "argv", ["engines", *map(str, options)])
    engines.main()
    found = json.loads((tmp_path / "engines.json").read_text())
    assert found["questions"] == 2 and set(found["presets"]) == {"full", "fast", "half"}
    assert all(row["alike"] in (0, 0.5, 1) and 0 <= row["torch_f1"] <= 100 for row in found["presets"].values())
