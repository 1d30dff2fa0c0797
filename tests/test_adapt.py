import json
import sys
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import TRANSFORMERS_5, run, tiny_config, tiny_folder, trains
from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering, QuaLAMiniLMScorer

pytestmark = trains
if TRANSFORMERS_5:
    from recipe.adapt import AdaptArguments, AdaptTrainer, main, ranking_loss, relevance
    from recipe.training import WindowCollator, bert_inputs


def trainer(seed=0, step=0, **fields):
    """What `AdaptTrainer`'s own methods read of it."""
    this = SimpleNamespace(
        args=SimpleNamespace(seed=seed),
        state=SimpleNamespace(global_step=step),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        arguments=AdaptArguments(windows="", **fields),
        inputs_of=lambda batch: bert_inputs(batch, tiny_config()),
    )
    for name in ("choosing", "sub_models", "answer_loss"):
        setattr(this, name, getattr(AdaptTrainer, name).__get__(this))
    return this


@given(st.integers(0, 10**6), st.sets(st.integers(0, 5)).map(sorted), st.integers(0, 2), st.data())
def test_sub_models_choose_where_they_may(step, choosing, first, data):
    choosing = sorted({first, *choosing})  # from layer 2 on 0.45 can be had
    at_most, least_macs = data.draw(st.integers(1, 7)), data.draw(st.floats(0.45, 0.6))
    config = QuaLAMiniLMConfig()
    with mock.patch("recipe.adapt.LEAST_MACS", least_macs):
        smallest, other = trainer(step=step, choosing=choosing, at_most=at_most).sub_models(config)
    assert config.macs_share(smallest) == pytest.approx(least_macs, abs=0.01)
    for shares in (smallest, other):
        assert least_macs - 0.01 <= config.macs_share(shares) <= 0.7 and shares[-1] >= 0.05
        dropping = [layer for layer, (a, b) in enumerate(pairwise([1.0, *shares])) if b < a]
        assert set(dropping) <= set(choosing) and 1 <= len(dropping) <= at_most


def test_of_a_model_that_cannot_drop_as_much_little_is_left():
    config = QuaLAMiniLMConfig()
    for shares in trainer(choosing=[4]).sub_models(config):
        assert shares == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.05, 0.05])


def test_sub_models_that_were_asked_for_are_the_only_ones():
    shares = [1.0, 1.0, 0.5, 0.25, 0.1, 0.1]
    assert list(trainer(length_configs=[str(shares), "[16, 8, 8, 4, 4, 2]"]).sub_models(QuaLAMiniLMConfig())) == [
        shares,
        [16, 8, 8, 4, 4, 2],
    ]


def test_sub_models_follow_from_the_seed_and_the_step():
    config = QuaLAMiniLMConfig()
    first = list(trainer(seed=1, step=7).sub_models(config))
    assert first == list(trainer(seed=1, step=7).sub_models(config))
    assert first != list(trainer(seed=1, step=8).sub_models(config))
    assert first != list(trainer(seed=2, step=7).sub_models(config))


def test_relevance_by_hand():
    # Two layers, two heads, three tokens; the answer stands at the last.
    answer = torch.tensor([[0.0, 0.0, 1.0]])
    first, second = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    second[0, 0, 2], second[0, 1, 2] = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    first[0, :, 0] = torch.tensor([0.0, 1.0, 0.0])  # what is read of the first layer's input counts for nobody
    after_first, after_second = relevance(answer, [first, second])
    assert after_second.tolist() == [[0, 0, 1]]
    # Half the answer; half the rollout, itself half residual and half what two heads read: (0.5, 0, 0.5).
    assert after_first.tolist() == [[0.125, 0, 0.875]]


def test_ranking_loss_is_the_cross_entropy_over_real_tokens():
    torch.manual_seed(0)
    scorers = [QuaLAMiniLMScorer(tiny_config(significance="learned")) for _ in range(2)]
    states = [torch.randn(2, 5, 16) for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    needed = [torch.rand(2, 5).mul(mask) for _ in range(2)]
    needed = [each / each.sum(-1, keepdim=True) for each in needed]
    losses = []
    for scorer, state, target in zip(scorers, states, needed):
        for row, length in enumerate([5, 3]):
            scores = scorer(state[row : row + 1, :length], None).flatten()
            losses.append(torch.nn.functional.cross_entropy(scores, target[row, :length]))
    expected = sum(losses) / 4
    assert ranking_loss(scorers, states, needed, mask).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("choosing", [[0, 1], [1, 2]])
@pytest.mark.parametrize("significance", ["attention", "learned"])
def test_the_loss_is_that_of_the_full_model_and_of_what_follows_it(significance, choosing):
    torch.manual_seed(0)
    model = QuaLAMiniLMForQuestionAnswering(
        tiny_config(significance=significance, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ).train()
    row = {"question_length": 2, "length": 6, "starts": [1, 2], "ends": [3, 3]}
    rows = [row | {"input_ids": [3, 7, 8, 9, 5, 4]}, row | {"input_ids": [3, 9, 8, 6, 7, 4]}]
    batch = WindowCollator(0)(rows)
    inputs = bert_inputs(batch, model.config)
    this = trainer(step=3, significance=significance, choosing=choosing)
    AdaptTrainer.compute_loss(this, model, dict(batch)).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()

    def logits(shares):
        outputs = model(
            **inputs | {"length_config": shares},
            output_hidden_states=True,
            output_attentions=True,
            output_kept_tokens=True,
        )
        return outputs, torch.stack((outputs.start_logits, outputs.end_logits), 1)

    full, of_full = logits([1.0, 1.0, 1.0])
    answer = of_full.softmax(-1).detach()
    expected = torch.nn.functional.cross_entropy(of_full.flatten(0, 1), batch["targets"].flatten(0, 1))
    for shares in this.sub_models(model.config):
        outputs, of_sub_model = logits(shares)
        for row, held in enumerate(outputs.kept_tokens[0].tolist()):  # three layers: half-way is after the first
            of_row = torch.nn.functional.cross_entropy(of_sub_model[row], answer[row])
            expected += 0.5 * of_row / 2 * sum(answer[row, :, token].mean() for token in held if token >= 0)
    if significance == "learned":
        needed = relevance(answer.mean(1), full.attentions)
        scorers = [layer.scorer for layer in model.bert.encoder.layer]
        states = [each if i in choosing else each.detach() for i, each in enumerate(full.hidden_states)]
        expected += ranking_loss(scorers, states, needed, inputs["attention_mask"])
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
        if not name.endswith("key.bias"):  # which moves all of a query's scores alike
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("significance", ["learned", "attention"])
def test_an_adaptation_that_was_stopped_goes_on_to_the_same_weights(tmp_path, city_windows, monkeypatch, significance):
    base = tiny_folder(tmp_path / "base")
    options = ["--model", base, "--windows", city_windows, "--learning_rate", 1e-3]
    options += ["--significance", significance, "--per_device_train_batch_size", 8, "--num_train_epochs", 2]
    options += ["--save_steps", 7, "--bf16", "False"]

    def adapt(folder):
        monkeypatch.setattr(sys, "argv", ["adapt", *map(str, options), "--output_dir", str(folder)])
        main()
        return QuaLAMiniLMForQuestionAnswering.from_pretrained(folder)

    whole = adapt(tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "whole" / "checkpoint-7").rename(tmp_path / "stopped" / "checkpoint-7")
    resumed = adapt(tmp_path / "stopped").state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed[name], tensor)
    assert whole.config.significance == significance
    assert any(".scorer." in name for name in resumed) == (significance == "learned")
    assert whole.config.hidden_dropout_prob == QuaLAMiniLMConfig.from_pretrained(base).hidden_dropout_prob


def test_scorers_learn_at_their_own_rate(tmp_path, city_windows, monkeypatch):
    from recipe import adapt

    base = tiny_folder(tmp_path / "base")
    rates = {}

    class Spy(AdaptTrainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            for group in optimizer.param_groups:
                rates.update(dict.fromkeys((names[parameter] for parameter in group["params"]), group["lr"]))
            assert set(rates) == set(names.values())
            return optimizer

    monkeypatch.setattr(adapt, "AdaptTrainer", Spy)
    options = ["--model", base, "--windows", city_windows, "--max_steps", 1]
    options += ["--bf16", "False"]
    options += ["--learning_rate", 1e-5, "--scorer_learning_rate", 1e-2, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["adapt", *map(str, options)])
    main()
    assert all(rate == (1e-2 if ".scorer." in name else 1e-5) for name, rate in rates.items())
    assert sum(".scorer." in name for name in rates) == 10


def test_scorers_can_be_trained_alone(tmp_path, city_windows, monkeypatch):
    base = tiny_folder(tmp_path / "base")

    def adapt(*options):
        options = ["--model", base, "--windows", city_windows, *options]
        options += ["--scorers_only", "--bf16", "False"]
        monkeypatch.setattr(sys, "argv", ["adapt", *map(str, options), "--output_dir", str(tmp_path / "out")])
        main()

    adapt("--max_steps", 4)
    before, after = (
        QuaLAMiniLMForQuestionAnswering.from_pretrained(folder).state_dict() for folder in (base, tmp_path / "out")
    )
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert len(after) == len(before) + 10


def test_options_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="--significance attention, which has no scorers"):
        AdaptArguments(windows="", scorers_only=True, significance="attention")


def test_two_processes_train_one_model(tmp_path, city_windows, monkeypatch):
    """With scorers and layers that some steps do not use, whose gradients no process may wait for."""
    base = tiny_folder(tmp_path / "base")
    options = ["--model", base, "--windows", city_windows, "--max_steps", 3, "--per_device_train_batch_size", 4]
    options += ["--bf16", "False", "--output_dir"]
    torchrun = ["--standalone", "--nproc_per_node", 2, "--module", "recipe.adapt"]
    run("torch.distributed.run", *torchrun, *options, tmp_path / "two")
    monkeypatch.setattr(sys, "argv", ["adapt", *map(str, options), str(tmp_path / "one")])
    main()
    # Three steps of two batches, not of one: one of 48 cities' training questions is an epoch.
    epochs = [
        json.loads((tmp_path / name / "checkpoint-3" / "trainer_state.json").read_text())["epoch"]
        for name in ("one", "two")
    ]
    assert epochs[1] == pytest.approx(2 * epochs[0], rel=0.1)
    trained = QuaLAMiniLMForQuestionAnswering.from_pretrained(tmp_path / "two").state_dict()
    before = QuaLAMiniLMForQuestionAnswering.from_pretrained(base).state_dict()
    assert any(not torch.equal(trained[name], tensor) for name, tensor in before.items())
