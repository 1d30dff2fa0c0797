import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from conftest import ROOT, tiny_config, tiny_folder, trains
from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.data import load_tokenizer
from recipe.evaluate import score
from recipe.presets import parse_length_config, record_scores


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
    assert score(questions, [prediction]) == {"em": pytest.approx(em), "f1": pytest.approx(f1)}


def test_score_is_the_mean_over_questions():
    answers = {"text": ["Berlin"], "answer_start": [0]}
    questions = Dataset.from_list([{"id": str(i), "answers": answers} for i in range(4)])
    assert score(questions, ["Berlin", "Rome", "in Berlin", "Berlin"]) == {
        "em": pytest.approx(50),
        "f1": pytest.approx((100 + 0 + 200 / 3 + 100) / 4),
    }


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


def distance(student, teacher):
    """Kullback-Leibler divergence of two folders' start distributions on one question, in nats."""
    tokenizer = load_tokenizer(teacher)
    inputs = tokenizer("Where does Ann live?", "Ann lives in Oslo. It is far from here.", return_tensors="pt")
    student, teacher = (
        QuaLAMiniLMForQuestionAnswering.from_pretrained(folder).eval()(**inputs).start_logits.log_softmax(-1)
        for folder in (student, teacher)
    )
    return torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="sum").item()


@trains
def test_a_fine_tuning_that_was_stopped_goes_on_to_the_same_weights(tmp_path, city_file, monkeypatch, capsys):
    from recipe import evaluate, finetune

    def run(module, *options):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, options)])
        module.main()

    base = tiny_folder(tmp_path / "base")
    options = ["--model", base, "--train", city_file, "--max_length", 40, "--doc_stride", 8, "--learning_rate", 1e-2]
    options += ["--per_device_train_batch_size", 8, "--num_train_epochs", 4, "--save_steps", 7]
    options += ["--save_total_limit", 5, "--bf16", "False"]
    run(finetune, *options, "--output_dir", tmp_path / "whole")
    whole = QuaLAMiniLMForQuestionAnswering.from_pretrained(tmp_path / "whole").state_dict()

    # Stopped in the middle of the third epoch: of checkpoints there is that of step 14 of 24.
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (tmp_path / "whole" / "checkpoint-14").rename(stopped / "checkpoint-14")
    run(finetune, *options, "--output_dir", stopped)
    resumed = QuaLAMiniLMForQuestionAnswering.from_pretrained(stopped).state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor)

    before, after = (
        json.loads((tmp_path / name / "all_results.json").read_text())["eval_loss"] for name in ("whole", "stopped")
    )
    assert before == pytest.approx(after)

    taught = tmp_path / "taught"
    run(finetune, *options, "--teacher", tmp_path / "whole", "--teacher_weight", 1.0, "--output_dir", taught)
    assert distance(taught, tmp_path / "whole") < distance(base, tmp_path / "whole") / 2

    result = tmp_path / "result.json"
    options = ["--model", tmp_path / "whole", "--data", city_file, "--length_config", "[20, 9]", "--output", result]
    run(evaluate, *options)
    printed = capsys.readouterr().out
    found = json.loads(result.read_text())
    assert found["questions"] == 48 and found["length_config"] == [20, 9]
    assert f"F1 {found['f1']:.2f}" in printed and str(result) in printed


@trains
def test_the_loss_by_hand():
    from recipe.finetune import FinetuneTrainer, SpanCollator

    collator = SpanCollator(load_tokenizer(ROOT))
    row = {
        "input_ids": [101, 7, 8, 102],
        "token_type_ids": [0] * 4,
        "length": 4,
        "starts": [1, 1, 2, 1],
        "ends": [2] * 4,
    }
    teacher = {"teacher_start": [0.0, -1.0, -2.0, -3.0], "teacher_end": [0.0, 0.0, 0.0, 0.0]}
    batch = collator([row | teacher])
    length = batch["input_ids"].shape[1]
    assert batch["targets"][0, 0, :4].tolist() == [0, 0.75, 0.25, 0]
    assert batch["targets"][0, 1, :4].tolist() == [0, 0, 1, 0]
    logits = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[4.0, 3.0, 2.0, 1.0]]])
    padded = torch.nn.functional.pad(logits, (0, length - 4), value=torch.finfo(torch.float32).min)

    def model(**inputs):
        assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids", "length_config"}
        assert inputs["length_config"] == "full"
        return SimpleNamespace(start_logits=padded[0], end_logits=padded[1])

    log_p = logits.log_softmax(-1)[:, 0]
    hard = -(0.75 * log_p[0, 1] + 0.25 * log_p[0, 2] + log_p[1, 2]) / 2
    soft_log_p = (logits / 2).log_softmax(-1)[:, 0]
    soft_teacher = [torch.tensor(teacher[name]).div(2).softmax(-1) for name in ("teacher_start", "teacher_end")]
    soft = 4 * -(soft_teacher[0] @ soft_log_p[0] + soft_teacher[1] @ soft_log_p[1]) / 2
    for weight in (0.0, 0.3, 1.0):
        trainer = SimpleNamespace(teacher_weight=weight)
        trainer.answer_loss = FinetuneTrainer.answer_loss.__get__(trainer)
        loss = FinetuneTrainer.compute_loss(trainer, model, dict(batch))
        assert loss.item() == pytest.approx(((1 - weight) * hard + weight * soft).item(), abs=1e-5)


@trains
def test_batches_of_like_lengths_come_in_any_order_but_the_same_for_a_seed_and_epoch():
    from recipe.finetune import EpochSampler

    lengths = torch.randint(10, 400, (1610,), generator=torch.Generator().manual_seed(0)).tolist()

    def order(seed, epoch):
        arguments = SimpleNamespace(train_batch_size=8, seed=seed, world_size=2)
        return list(EpochSampler(SimpleNamespace(args=arguments, state=SimpleNamespace(epoch=epoch)), lengths))

    indices = order(1, 2.0)
    assert sorted(indices) == list(range(1610)) and indices == order(1, 2.4)  # resumed within the epoch
    assert indices != order(1, 3.0) and indices != order(2, 2.0)
    together = [[lengths[i] for i in indices[first : first + 16]] for first in range(0, 1600, 16)]
    spread = sorted(max(step) - min(step) for step in together)
    assert spread[len(spread) // 2] < 20  # of 390
    falls = sum(sum(after) < sum(before) for before, after in pairwise(together))
    assert 30 < falls < 70  # of 99; in transformers' own order 96


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
    assert after.config.length_presets["half"] == half and bool(after.config.int8_storage) == int8


@trains
def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    from recipe.finetune import last_checkpoint

    assert last_checkpoint(tmp_path) is None
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
