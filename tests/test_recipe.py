import json
import statistics
import sys

import pytest
import torch
from datasets import Dataset

from conftest import ROOT, tiny_config, tiny_folder
from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe import evaluate
from recipe.evaluate import score
from recipe.presets import parse_length_config, record_scores
from recipe.results import describe_engine


@pytest.mark.parametrize(
    "prediction, answers, em, f1",
    [
        ("Berlin", ["Berlin"], 100, 100),
        ("the  berlin!", ["Berlin"], 100, 100),
        ("in Berlin", ["Berlin", "Bonn"], 0, 200 / 3),
        ("in Berlin", ["Bonn", "in Berlin, Germany"], 0, 80),
        ("", ["Berlin"], 0, 0),
        ("Rome", ["Berlin"], 0, 0),
    ],
)
def test_score_is_the_official_metric_by_hand(prediction, answers, em, f1):
    questions = Dataset.from_list([{"id": "1", "answers": {"text": answers, "answer_start": [0] * len(answers)}}])
    found = score(questions, [prediction])
    assert (found["em"], found["f1"]) == (pytest.approx(em), pytest.approx(f1))


def test_score_is_the_mean_over_questions_and_over_each_kind():
    berlin, none = {"text": ["Berlin"], "answer_start": [0]}, {"text": [], "answer_start": []}
    rows = [("a", berlin), ("a", berlin), ("b", berlin), ("b", none), ("b", none)]
    questions = Dataset.from_list([{"id": "1", "source": source, "answers": answers} for source, answers in rows])
    found = score(questions, ["Berlin", "", "in Berlin", "", "Rome"])
    f1 = [100, 0, 200 / 3, 100, 0]
    assert found["f1"] == pytest.approx(sum(f1) / 5) and found["em"] == pytest.approx(40)
    assert found["f1_standard_error"] == pytest.approx(statistics.pstdev(f1) / 5**0.5)
    assert found["has_answer"]["f1"] == pytest.approx(sum(f1[:3]) / 3) and found["has_answer"]["questions"] == 3
    assert found["no_answer"]["f1"] == found["no_answer"]["em"] == pytest.approx(50)
    assert [found["sources"][name]["f1"] for name in "ab"] == pytest.approx([50, (200 / 3 + 100) / 3])
    by_title = score(questions.rename_column("source", "title"), ["Berlin", "", "in Berlin", "", "Rome"], by="title")
    assert by_title.pop("titles") == found.pop("sources") and by_title == found


def test_evaluation_at_a_threshold(tmp_path, city_file, monkeypatch):
    folder, output = tiny_folder(tmp_path / "model"), tmp_path / "out.json"
    command = ["evaluate", "--model", folder, "--data", city_file, "--handle_impossible_answer", "--output", output]
    found = []
    for threshold in (-1e9, 1e9):
        monkeypatch.setattr(sys, "argv", [*map(str, command), "--no_answer_threshold", str(threshold)])
        evaluate.main()
        found.append(json.loads(output.read_text()))
        assert found[-1]["no_answer_threshold"] == threshold
    assert found[0]["f1"] > 0 == found[1]["f1"]  # every question has an answer


def test_results_say_which_engine_answered(folder_with_graph):
    load = QuaLAMiniLMForQuestionAnswering.from_pretrained
    assert describe_engine(load(folder_with_graph)).startswith("ONNX Runtime")
    assert describe_engine(load(folder_with_graph, engine="torch")) == "torch"


def test_length_configs_as_typed():
    assert parse_length_config("fast") == "fast"
    assert parse_length_config("[0.5, 0.25]") == [0.5, 0.25]
    assert parse_length_config('{"max_macs": 0.5}') == {"max_macs": 0.5}


def test_record_writes_scores_and_nothing_else(tmp_path):
    half = {"length_config": [0.5, 0.5, 0.25]}
    tiny_config(length_presets={"half": half}).save_pretrained(tmp_path)
    record_scores(tmp_path, "half", "validation", {"f1": 81.2345, "em": 70.0})
    presets = QuaLAMiniLMConfig.from_pretrained(tmp_path).length_presets
    assert presets["half"] == half | {"validation": {"f1": 81.23, "em": 70.0}}
    with pytest.raises(ValueError, match="quick"):
        record_scores(tmp_path, "quick", "test", {"f1": 1.0, "em": 1.0})


def test_the_shipped_presets_agree_with_the_formula():
    config = QuaLAMiniLMConfig.from_pretrained(ROOT)
    assert "full" in config.length_presets and len(config.length_presets) >= 2
    for name, preset in config.length_presets.items():
        assert preset["macs_at_384"] == config.macs(preset["length_config"])
        assert preset["macs_share"] == pytest.approx(config.macs_share(name), abs=1e-4)
        assert preset["lengths_at_384"] == [config.token_lengths(name).kept(layer, 384) for layer in range(6)]


@pytest.mark.parametrize("int8", [False, True])
def test_ship_brings_weights_and_presets(tmp_path, monkeypatch, int8):
    from recipe import ship
    from recipe.quantize import quantize

    shipped, trained = tiny_folder(tmp_path / "shipped"), tiny_folder(tmp_path / "trained")
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(trained)
    with torch.no_grad():
        model.qa_outputs.weight.normal_()
    if int8:
        model = quantize(model, [{"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 0]}])
    half = {"length_config": [0.5, 0.25], "test": {"f1": 1.0, "em": 1.0}}
    model.config.length_presets["half"] = half
    model.save_pretrained(trained)
    monkeypatch.setattr(ship, "ROOT", shipped)
    monkeypatch.setattr(sys, "argv", ["ship", str(trained)])
    ship.main()
    after = QuaLAMiniLMForQuestionAnswering.from_pretrained(shipped)
    for name, tensor in model.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor if int8 else tensor.half().float())
    assert after.config.length_presets["half"] == half and bool(after.config.int8_weights) == int8
