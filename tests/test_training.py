import json
import sys
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from conftest import ROOT, tiny_config, tiny_folder, trains
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe import student
from recipe.training import (
    EpochSampler,
    SpanArguments,
    SpanTrainer,
    WindowCollator,
    bert_inputs,
    last_checkpoint,
    load_model,
    token_f1,
    with_labelled,
)

pytestmark = trains


def train(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["student", *map(str, options)])
    student.main()


def test_what_is_trained_is_floats_without_dropout():
    model = load_model(ROOT)  # int8
    assert not model.config.int8_weights and all(each.is_floating_point() for each in model.parameters())
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, city_windows, monkeypatch):
    base = tiny_folder(tmp_path / "base")
    options = ["--model", base, "--windows", city_windows, "--learning_rate", 1e-2, "--bf16", "False"]
    options += ["--per_device_train_batch_size", 8, "--num_train_epochs", 4, "--save_steps", 7, "--save_total_limit", 5]
    train(monkeypatch, *options, "--output_dir", tmp_path / "whole")
    whole = QuaLAMiniLMForQuestionAnswering.from_pretrained(tmp_path / "whole").state_dict()

    # Stopped in the middle of the third epoch: of checkpoints there is that of step 14 of 24.
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (tmp_path / "whole" / "checkpoint-14").rename(stopped / "checkpoint-14")
    train(monkeypatch, *options, "--output_dir", stopped)
    resumed = QuaLAMiniLMForQuestionAnswering.from_pretrained(stopped).state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor)

    metrics = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("whole", "stopped")]
    for name in ("eval_loss", "eval_f1"):
        assert metrics[0][name] == pytest.approx(metrics[1][name])


def test_a_student_follows_the_answers_that_it_is_given(tmp_path, city_windows, monkeypatch):
    """The teacher says, whatever the question: from the third token to the fourth, or no answer."""
    rows = datasets.load_from_disk(city_windows / "train")
    thought = {"tokens": [0, 2, 3], "log_probabilities": np.log([0.3, 0.6, 0.1]).astype(np.float16)}
    answer = {f"{name}_{kind}": values for name in ("start", "end") for kind, values in thought.items()}
    datasets.Dataset.from_list([answer] * len(rows)).save_to_disk(tmp_path / "answers")
    options = ["--model", tiny_folder(tmp_path / "base"), "--windows", city_windows, "--learning_rate", 1e-2]
    options += ["--max_steps", 60, "--answers", tmp_path / "answers", "--teacher_weight", 1.0, "--bf16", "False"]
    train(monkeypatch, *options, "--output_dir", tmp_path / "out")
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    batch = WindowCollator(0)(list(rows.select(range(4))))
    with torch.inference_mode():
        found = model(**bert_inputs(batch, model.config)).start_logits.softmax(-1).mean(0)
    assert found[[0, 2, 3]].tolist() == pytest.approx([0.3, 0.6, 0.1], abs=0.06)


def test_a_student_follows_labels_where_no_teacher_answered(tmp_path, city_windows, monkeypatch):
    """The teacher says of all windows that they have no answer; of those beside them, whose ids are others, the labels
    say that it stands at the third token."""
    rows = datasets.load_from_disk(city_windows / "train")
    thought = {"tokens": [0], "log_probabilities": np.zeros(1, dtype=np.float16)}
    answer = {f"{name}_{kind}": values for name in ("start", "end") for kind, values in thought.items()}
    datasets.Dataset.from_list([answer] * len(rows)).save_to_disk(tmp_path / "answers")
    others = rows.select(range(4)).map(
        lambda row: {"input_ids": [101, *[7] * (row["length"] - 2), 102], "starts": [2], "ends": [2]}
    )
    others.save_to_disk(tmp_path / "labelled" / "train")
    options = ["--model", tiny_folder(tmp_path / "base"), "--windows", city_windows, "--learning_rate", 1e-2]
    options += ["--max_steps", 60, "--answers", tmp_path / "answers", "--teacher_weight", 1.0, "--bf16", "False"]
    options += ["--labelled", tmp_path / "labelled", "--labelled_share", 0.5]
    train(monkeypatch, *options, "--output_dir", tmp_path / "out")
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    for table, token in ((rows, 0), (others, 2)):
        batch = WindowCollator(0)(list(table.select(range(4))))
        with torch.inference_mode():
            found = model(**bert_inputs(batch, model.config)).start_logits.softmax(-1)
        assert found[:, token].min() > 0.9


def test_a_batch_by_hand():
    rows = [
        {
            "input_ids": [101, 7, 102, 9, 8, 102],
            "question_length": 3,
            "length": 6,
            "starts": [3, 3, 4],
            "ends": [4] * 3,
        },
        {"input_ids": [101, 5, 6, 102], "question_length": 2, "length": 4, "starts": [0], "ends": [0]},
    ]
    batch = WindowCollator(1, multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[101, 7, 102, 9, 8, 102, 1, 1], [101, 5, 6, 102, 1, 1, 1, 1]]
    assert batch["targets"][0, 0].tolist() == pytest.approx([0, 0, 0, 2 / 3, 1 / 3, 0, 0, 0])
    assert batch["targets"][:, 1].argmax(-1).tolist() == [4, 0]
    inputs = bert_inputs(batch, tiny_config())
    assert inputs["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 4 + [0] * 4]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]]
    assert not bert_inputs(batch, tiny_config(type_vocab_size=1))["token_type_ids"].any()


def test_the_loss_by_hand():
    row = {"input_ids": [101, 7, 8, 102], "question_length": 1, "length": 4, "starts": [1, 1, 2, 1], "ends": [2] * 4}
    log_probabilities = torch.tensor([0.5, 0.3, 0.2]).log()
    thought = {"start_tokens": [0, 1, 3], "end_tokens": [0, 2, 1]}
    thought |= {f"{name}_log_probabilities": log_probabilities.tolist() for name in ("start", "end")}
    batch = WindowCollator(0)([row | thought])
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])

    def model(**inputs):
        return SimpleNamespace(start_logits=logits[:1], end_logits=logits[1:])

    log_p = logits.log_softmax(-1)
    hard = -(0.75 * log_p[0, 1] + 0.25 * log_p[0, 2] + log_p[1, 2]) / 2
    soft_log_p = (logits / 2).log_softmax(-1)
    softened = (log_probabilities / 2).softmax(-1)
    soft = 4 * -(softened @ soft_log_p[0, [0, 1, 3]] + softened @ soft_log_p[1, [0, 2, 1]]) / 2
    for weight in (0.0, 0.3, 1.0):
        trainer = SimpleNamespace(arguments=SpanArguments(windows="", teacher_weight=weight), inputs_of=dict)
        trainer.answer_loss = SpanTrainer.answer_loss.__get__(trainer)
        loss = SpanTrainer.compute_loss(trainer, model, dict(batch))
        assert loss.item() == pytest.approx(((1 - weight) * hard + weight * soft).item(), abs=1e-5)


def test_windows_without_an_answer_may_follow_their_label_alone():
    targets = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    teacher_logits = torch.tensor([[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]], [[0.6, 0.2, 0.2], [0.3, 0.3, 0.4]]]).log()
    logits = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))

    def loss(rows, **fields):
        trainer = SimpleNamespace(arguments=SpanArguments(windows="", **fields))
        return SpanTrainer.answer_loss(trainer, logits[rows], targets[rows], teacher_logits[rows]).item()

    answered, without = loss([0]), loss([1], teacher_weight=0.0)
    assert loss([0, 1], no_answer_by_label=True) == pytest.approx((answered + without) / 2)
    assert loss([0, 1]) == pytest.approx((answered + loss([1])) / 2) and loss([1]) != pytest.approx(without, rel=0.01)


def test_windows_that_no_teacher_answered_follow_their_labels():
    row = {"input_ids": [101, 7, 8, 102], "question_length": 1, "length": 4, "starts": [1], "ends": [2]}
    thought = {"start_tokens": [0, 1], "end_tokens": [0, 2]}
    thought |= {f"{name}_log_probabilities": [-0.7, -0.7] for name in ("start", "end")}
    batch = WindowCollator(0)([row | thought, row | dict.fromkeys(thought)])
    logits = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))

    def loss(rows, **fields):
        trainer = SimpleNamespace(arguments=SpanArguments(windows="", **fields))
        targets, teacher_logits = batch["targets"][rows], batch["teacher_logits"][rows]
        return SpanTrainer.answer_loss(trainer, logits[rows], targets, teacher_logits).item()

    assert loss([1]) == pytest.approx(loss([1], teacher_weight=0.0))
    assert loss([0, 1]) == pytest.approx((loss([0]) + loss([1], teacher_weight=0.0)) / 2)
    assert loss([0]) != pytest.approx(loss([0], teacher_weight=0.0), rel=0.01)


def test_labelled_windows_are_their_share_of_all(city_windows):
    rows = datasets.load_from_disk(city_windows / "train")
    answered = rows.add_column("start_tokens", [[0, 1]] * len(rows))
    labelled = rows.select(range(3)).map(lambda row: {"id": f"labelled {row['id']}"})
    both = with_labelled(answered, labelled, 0.4)
    of_labelled = both["id"][len(rows) :]
    assert both["id"][: len(rows)] == rows["id"][:] and len(of_labelled) == pytest.approx(0.4 * len(both), abs=1)
    counts = Counter(of_labelled)
    assert counts.keys() == set(labelled["id"]) and max(counts.values()) - min(counts.values()) <= 1
    assert both[0]["start_tokens"] == [0, 1] and both[len(both) - 1]["start_tokens"] is None
    assert both[len(rows)]["input_ids"] == labelled[0]["input_ids"]
    for share, some in ((0.0, labelled), (1.0, labelled), (0.4, labelled.select([]))):
        with pytest.raises(ValueError, match="labelled_share is"):
            with_labelled(answered, some, share)


def test_batches_of_like_lengths_come_in_any_order_but_the_same_for_a_seed_and_epoch():
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


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (5, 10, 15):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize(
    "first, last, f1", [(3, 4, 1.0), (3, 3, 2 / 3), (2, 5, 2 * 2 / 6), (6, 7, 0.0), (0, 0, 0.0), (9, 9, 1.0)]
)
def test_token_f1_by_hand(first, last, f1):
    """The answers are the tokens 3 to 4, and 9."""
    logits = np.zeros((2, 12))
    logits[0, first] = logits[1, last] = 9
    assert token_f1(logits, starts=[3, 9], ends=[4, 9]) == pytest.approx(f1)
