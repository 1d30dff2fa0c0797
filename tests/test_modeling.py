import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForQuestionAnswering, RobertaConfig, RobertaForQuestionAnswering

from conftest import right_padded, tiny_config
from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.dropping_qualaminilm import choose
from qualaminilm.kernels_qualaminilm import bfloat16_attention, over_rows
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering, QuaLAMiniLMModel
from tests.brute_force import BruteForce

FAMILIES = ("bert", "roberta")
SIGNIFICANCES = ("attention", "learned")


def tiny_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = QuaLAMiniLMForQuestionAnswering(tiny_config(**kwargs)).eval()
    for parameter in model.parameters():  # biases and LayerNorms too, or the twin need not get them right
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def length_configs(layers):
    ints = st.lists(st.integers(2, 14), min_size=layers, max_size=layers)
    floats = st.lists(st.integers(1, 1000).map(lambda p: p / 1000), min_size=layers, max_size=layers)
    return (ints | floats).map(lambda entries: sorted(entries, reverse=True))


cases = st.fixed_dictionaries(
    {
        "embedding_type": st.sampled_from(FAMILIES),
        "significance": st.sampled_from(SIGNIFICANCES),
        "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=3),
        "length_config": length_configs(3),
        "seed": st.integers(0, 1000),
    }
)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "reference_class, config",
    [
        (BertForQuestionAnswering, BertConfig(hidden_size=768, num_hidden_layers=2, num_attention_heads=12)),
        (BertForQuestionAnswering, BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12)),
        (
            RobertaForQuestionAnswering,
            RobertaConfig(
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
                type_vocab_size=1,
                max_position_embeddings=514,
                layer_norm_eps=1e-5,
            ),
        ),
    ],
)
def test_full_model_computes_what_transformers_own_class_does(reference_class, config, implementation):
    torch.manual_seed(1)
    config.vocab_size = 500
    reference = reference_class(config).eval()
    model = QuaLAMiniLMForQuestionAnswering._from_config(
        QuaLAMiniLMConfig.from_transformers(config), attn_implementation=implementation
    ).eval()
    model.load_state_dict(
        {name.replace("roberta.", "bert.", 1): tensor for name, tensor in reference.state_dict().items()}
    )
    input_ids, attention_mask = right_padded(model.config, [40, 17, 1])
    token_types = (torch.arange(40) > 8).long().expand(3, -1) if config.type_vocab_size > 1 else None
    labels = {"start_positions": torch.tensor([3, 9, 99]), "end_positions": torch.tensor([5, 20, 0])}  # 20 is padding
    with torch.no_grad():
        expected = reference(input_ids, attention_mask, token_type_ids=token_types, output_hidden_states=True)
        found = model(input_ids, attention_mask, token_type_ids=token_types, output_hidden_states=True, **labels)
    real = attention_mask.bool()
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(found[name][real], expected[name][real], atol=1e-5, rtol=0)
        assert (found[name][~real] == torch.finfo(torch.float32).min).all()
    for mine, theirs in zip(found.hidden_states, expected.hidden_states):
        torch.testing.assert_close(mine[real], theirs[real], atol=1e-5, rtol=0)

    # The loss is BERT's over the real tokens: row by row, each cut to its own length.
    losses = []
    for name in ("start", "end"):
        rows = [
            torch.nn.functional.cross_entropy(expected[f"{name}_logits"][row : row + 1, :n], labels[key][row : row + 1])
            for key in (f"{name}_positions",)
            for row, n in ((0, 40), (1, 17), (2, 1))
            if labels[key][row] < n
        ]
        losses.append(sum(rows) / len(rows))
    torch.testing.assert_close(found.loss, sum(losses) / 2, atol=1e-5, rtol=0)


@given(cases)
@settings(max_examples=80, deadline=None)
def test_dropping_equals_the_brute_force_twin(case):
    lengths, length_config = case.pop("lengths"), case.pop("length_config")
    model = tiny_model(**case)
    input_ids, attention_mask = right_padded(model.config, lengths, case["seed"])
    compare_with_twin(model, input_ids, attention_mask, length_config)


@given(cases)
@settings(max_examples=20, deadline=None)
def test_training_drops_what_evaluation_does(case):
    # In training rows are filled up with dead slots.
    lengths, length_config = case.pop("lengths"), case.pop("length_config")
    model = tiny_model(**case, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inputs = right_padded(model.config, [max(lengths) + 30, *lengths], case["seed"])
    outputs = []
    for training in (False, True):
        model.train(training)
        outputs.append(model(*inputs, length_config=length_config, output_kept_tokens=True))
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(*(each[name] for each in outputs), atol=1e-4, rtol=1e-4)
    for evaluated, trained in zip(*(each.kept_tokens for each in outputs)):
        assert torch.equal(evaluated, trained)


def test_one_row_of_types_or_positions_stands_for_all():
    """Position ids and token types of one row or of each, embeddings in the place of tokens."""
    model = tiny_model(type_vocab_size=2)
    input_ids, mask = right_padded(model.config, [9, 5, 7, 9, 2])
    generator = torch.Generator().manual_seed(0)
    types, positions = torch.randint(0, 2, (1, 9), generator=generator), torch.arange(9, 18)
    embeds = torch.randn(5, 9, model.config.hidden_size, generator=generator)

    def logits(**call):
        with torch.no_grad():
            return model(attention_mask=mask, length_config=[0.7, 0.7, 0.3], **call).start_logits

    for tokens in ({"input_ids": input_ids}, {"inputs_embeds": embeds}):
        of_each = logits(**tokens, token_type_ids=types.expand(5, 9), position_ids=positions.expand(5, 9))
        for of_all in (positions, positions[None]):
            torch.testing.assert_close(logits(**tokens, token_type_ids=types, position_ids=of_all), of_each)
        # What was passed counts.
        assert not torch.allclose(logits(**tokens, token_type_ids=types, position_ids=positions - 9), of_each)
        assert not torch.allclose(logits(**tokens, token_type_ids=1 - types, position_ids=positions), of_each)
    for batch in (1, 5):
        for others in ({"token_type_ids": types.expand(3, 9)}, {"position_ids": positions.expand(3, 9)}):
            with pytest.raises(RuntimeError), torch.no_grad():
                model(input_ids[:batch], **others)


@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries, keys", [(5, 7), (16, 32)])
@pytest.mark.parametrize("at_once", [2, 3])
def test_bfloat16_attention_is_torch_s_own(size, masked, queries, keys, at_once):
    """With scores so large that powers of them overflow, too, with a row of nothing but padding, and in parts."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 3, n, 8).bfloat16() for n in (queries, keys, keys))
    if size > 1:  # scores whose order bfloat16 knows: single numbers of the query
        query, key = query * size, torch.eye(8).repeat(3, 3, 4, 1)[..., :keys, :].bfloat16()
    mask = None
    if masked:
        mask = torch.zeros(3, 1, 1, keys, dtype=torch.bfloat16)
        mask[1, ..., 4:] = torch.finfo(torch.bfloat16).min
        mask[2] = torch.finfo(torch.bfloat16).min
    kept = query.clone(), key.clone(), value.clone()
    found = over_rows(bfloat16_attention, at_once * 3 * queries * keys, query, key, value, mask)
    assert found.dtype == torch.bfloat16 and found.shape == query.shape
    assert all(torch.equal(before, after) for before, after in zip(kept, (query, key, value)))
    floats = (each.float() for each in (query, key, value))
    expected = F.scaled_dot_product_attention(*floats, attn_mask=None if mask is None else mask.float())
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0)


@given(
    st.one_of(st.sampled_from([124.0, -132.0]), st.floats(-400, 400)),
    st.floats(0, 8),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
@example(124.0, 0.0, 30, 0)
@example(-132.0, 4.0, 30, 0)
def test_bfloat16_attention_is_right_for_any_score(score, spread, keys, seed):
    """Of scores about `score` (of powers of 2): as exact as bfloat16 knows them, and exact where they are beyond the
    numbers whose powers it adds up well."""
    generator = torch.Generator().manual_seed(seed)
    scores = score + spread * (torch.rand(1, 1, 3, keys, generator=generator) - 0.5)
    size = 48  # the query holds the score of each key, which is a row of the unit matrix
    query = F.pad(scores * math.log(2) * size**0.5, (0, size - keys)).bfloat16()
    key, value = torch.eye(size)[None, None, :keys].bfloat16(), torch.rand(1, 1, keys, 16, generator=generator) * 20
    value = (value + 30).bfloat16()
    found = bfloat16_attention(query, key, value, None)
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert found.dtype == torch.bfloat16
    # Scaling a score and storing it each err by 2**-9 of it; a power by so much more or less moves the mean of values
    # that lie 20 apart by at most a fourth of the factor between two powers.
    largest = abs(score) + spread / 2
    doubt = 0 if largest > 80 else 20 * (2 ** (4 * largest * 2**-9) - 1) / 4
    torch.testing.assert_close(found.float(), expected, atol=doubt + 50 * 2**-6, rtol=0)


@given(cases, st.data())
@settings(max_examples=40, deadline=None)
def test_dropping_equals_the_brute_force_twin_under_any_mask(case, data):
    length, length_config = case.pop("lengths")[0], case.pop("length_config")
    model = tiny_model(**case)
    input_ids, _ = right_padded(model.config, [length, length], case["seed"])
    masks = st.lists(st.sampled_from([0, 1]), min_size=length, max_size=length).filter(any)
    compare_with_twin(model, input_ids, torch.tensor([data.draw(masks), data.draw(masks)]), length_config)


def compare_with_twin(model, input_ids, attention_mask, length_config):
    with torch.no_grad():
        found = model(
            input_ids,
            attention_mask,
            length_config=length_config,
            output_hidden_states=True,
            output_kept_tokens=True,
        )
    logits, kept_tokens, hidden_states = BruteForce(model).logits(input_ids, attention_mask, length_config)
    for (row, position), (start, end) in logits.items():
        assert found.start_logits[row, position].item() == pytest.approx(start, abs=1e-5)
        assert found.end_logits[row, position].item() == pytest.approx(end, abs=1e-5)
    for layer, rows in enumerate(kept_tokens):
        width = max(map(len, rows))
        assert found.kept_tokens[layer].tolist() == [row + [-1] * (width - len(row)) for row in rows]
    for (layer, row, position), state in hidden_states.items():
        torch.testing.assert_close(found.hidden_states[layer][row, position].double(), state, atol=1e-5, rtol=0)


@given(cases, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_a_row_alone_equals_the_row_in_a_padded_batch(case, more_padding):
    lengths, length_config = case.pop("lengths"), case.pop("length_config")
    model = tiny_model(**case)
    input_ids, attention_mask = right_padded(model.config, lengths, case["seed"])
    input_ids = torch.nn.functional.pad(input_ids, (0, more_padding), value=model.config.pad_token_id)
    attention_mask = torch.nn.functional.pad(attention_mask, (0, more_padding))
    with torch.no_grad():
        batch = model(input_ids, attention_mask, length_config=length_config)
        for row, n in enumerate(lengths):
            alone = model(input_ids[row : row + 1, :n], length_config=length_config)
            for name in ("start_logits", "end_logits"):
                torch.testing.assert_close(batch[name][row, :n], alone[name][0], atol=1e-5, rtol=0)


def test_bfloat16_attention_of_no_rows():
    nothing = torch.ones(0, 3, 5, 8).bfloat16()
    assert bfloat16_attention(nothing, nothing, nothing, None).shape == (0, 3, 5, 8)


@pytest.mark.parametrize("significance", SIGNIFICANCES)
def test_linear_layers_see_real_tokens_only(significance):
    model = tiny_model(significance=significance)
    input_ids, mask = right_padded(model.config, [10, 4, 7])
    seen = {}
    for name, module in model.bert.encoder.named_modules():
        if isinstance(module, torch.nn.Linear) and ".scorer." not in name:
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].numel()}))
    with torch.inference_mode():
        model(input_ids, mask, length_config=[1.0, 0.5, 0.5])
    tokens = {
        name: count // (24 if name.endswith(f"{i}.output.dense") else 16)
        for i in range(3)
        for name, count in seen.items()
        if name.startswith(f"layer.{i}.")
    }
    queries = 11 if significance == "learned" else 21  # half of 10, 4 and 7, rounded up
    for i, (entering, asking, leaving) in enumerate([(21, 21, 21), (21, queries, 11), (11, 11, 11)]):
        assert tokens[f"layer.{i}.attention.self.key"] == tokens[f"layer.{i}.attention.self.value"] == entering
        assert tokens[f"layer.{i}.attention.self.query"] == asking
        for name in ("attention.output.dense", "intermediate.dense", "output.dense"):
            assert tokens[f"layer.{i}.{name}"] == leaving


def test_ties_go_to_the_earlier_token_and_the_first_is_always_kept():
    significance = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0], [3.0, 0.0, 0.0, 0.0, 0.0]])
    slots, alive = choose(significance, None, [3, 3])
    assert slots.tolist() == [[0, 1, 3], [0, 1, 2]]
    assert alive is None
    slots, alive = choose(significance, torch.tensor([[False, True, True, True, True], [True] * 5]), [2, 4])
    assert slots[0, :2].tolist() == [1, 3]
    assert slots[1].tolist() == [0, 1, 2, 3]
    assert alive.tolist() == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize("length_config", ["full", [0.8, 0.5, 0.3]])
def test_a_batch_of_no_rows_is_one(length_config):
    outputs = tiny_model()(torch.zeros(0, 5, dtype=torch.long), length_config=length_config, output_kept_tokens=True)
    assert outputs.start_logits.shape == (0, 5) and all(len(kept) == 0 for kept in outputs.kept_tokens)


@pytest.mark.parametrize("significance", SIGNIFICANCES)
def test_a_batch_with_a_row_of_padding_only_runs(significance):
    model = tiny_model(significance=significance)
    input_ids, _ = right_padded(model.config, [6, 6])
    mask = torch.tensor([[1] * 6, [0] * 6])
    outputs = model(input_ids, mask, length_config=[0.5, 0.5, 0.3], output_kept_tokens=True)
    assert torch.isfinite(outputs.start_logits).all()
    assert [kept[1].unique().tolist() for kept in outputs.kept_tokens] == [[-1]] * 3
    with torch.autocast("cpu", torch.bfloat16):
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            outputs = model(input_ids, mask, length_config=[0.5, 0.5, 0.3], output_hidden_states=True)
            assert all(torch.isfinite(states).all() for states in outputs.hidden_states)
    alone = model(input_ids[1:], mask[1:], length_config=[0.5, 0.5, 0.3])
    assert (alone.start_logits == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize(
    "significance, length_config, maps",
    [("attention", [5, 5, 3], 2), ("attention", "full", 0), ("learned", [5, 5, 3], 0), ("learned", "full", 0)],
)
def test_attention_maps_are_made_only_where_significance_needs_them(monkeypatch, significance, length_config, maps):
    model = tiny_model(significance=significance)
    fused = []
    original = F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        fused.append(True)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    input_ids, mask = right_padded(model.config, [8])
    outputs = model(input_ids, mask, length_config=length_config)
    assert len(fused) == 3 - maps  # of three layers, the first and the last drop at [5, 5, 3]
    assert outputs.attentions is None


def test_attentions_on_request_are_bert_s():
    model = tiny_model()
    reference = BertForQuestionAnswering(
        BertConfig(
            **{name: getattr(model.config, name) for name in BertConfig().to_dict() if hasattr(model.config, name)}
        )
    ).eval()
    reference.set_attn_implementation("eager")
    reference.load_state_dict(model.state_dict())
    input_ids, _ = right_padded(model.config, [9, 9])
    found = model(input_ids, output_attentions=True).attentions
    for mine, theirs in zip(found, reference(input_ids, output_attentions=True).attentions):
        torch.testing.assert_close(mine, theirs)
    dropping = model(input_ids, output_attentions=True, length_config=[6, 6, 4]).attentions
    assert [tuple(each.shape) for each in dropping] == [(2, 2, 9, 9), (2, 2, 6, 6), (2, 2, 6, 6)]


def test_outputs_as_a_tuple_and_on_request_only():
    model = tiny_model()
    input_ids, mask = right_padded(model.config, [7, 4])
    by_name = model(input_ids, mask)
    assert list(by_name) == ["start_logits", "end_logits"]
    start, end = model(input_ids, mask, return_dict=False)
    assert torch.equal(start, by_name.start_logits) and torch.equal(end, by_name.end_logits)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        of_encoder = model.bert(input_ids, mask, return_dict=False)
        assert [each.shape for each in of_encoder] == [(2, 7, 16)]
    hidden = model.bert(input_ids, mask, output_hidden_states=True)
    assert len(hidden.hidden_states) == 4
    assert torch.equal(hidden.hidden_states[-1], hidden.last_hidden_state)


@pytest.mark.parametrize("significance", SIGNIFICANCES)
def test_the_head_reads_what_the_encoder_returns(significance):
    model = tiny_model(significance=significance)
    input_ids, mask = right_padded(model.config, [9, 5])
    inputs = {"input_ids": input_ids, "attention_mask": mask, "length_config": [0.7, 0.7, 0.3]}
    start_logits, end_logits = model.qa_outputs(model.bert(**inputs).last_hidden_state).unbind(-1)
    for found in (model(**inputs), model(**inputs, output_hidden_states=True)):
        torch.testing.assert_close(found.start_logits[mask == 1], start_logits[mask == 1])
        torch.testing.assert_close(found.end_logits[mask == 1], end_logits[mask == 1])


def test_inputs_embeds_give_what_input_ids_give():
    for family in FAMILIES:
        model = tiny_model(embedding_type=family)
        input_ids, _ = right_padded(model.config, [8, 8])
        embeds = model.get_input_embeddings()(input_ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).start_logits, model(input_ids).start_logits)
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(input_ids, inputs_embeds=embeds)


@pytest.mark.parametrize("family, room", [("bert", 66), ("roberta", 64)])
def test_bad_inputs_are_named(family, room):
    model = tiny_model(embedding_type=family)
    model(torch.full((1, room), 5))
    with pytest.raises(ValueError, match=f"{room + 1} tokens long, the model has positions for {room}"):
        model(torch.full((1, room + 1), 5))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\), expected \(1, 4\)"):
        model(torch.full((1, 4), 5), torch.ones(1, 3))
    with pytest.raises(ValueError, match="entry 1 of length_config is 9"):
        model(torch.full((1, 4), 5), length_config=[4, 9, 2])
    with pytest.raises(ValueError, match="no preset"):
        QuaLAMiniLMModel(tiny_config(length_config="quick"))


def test_threads_get_the_budget_they_ask_for():
    model = tiny_model()
    input_ids, mask = right_padded(model.config, [12, 7])
    budgets = ["full", [6, 4, 2], [0.9, 0.5, 0.2], [3, 3, 3]]

    def logits(budget):
        with torch.no_grad():
            return [model(input_ids, mask, length_config=budget).start_logits for _ in range(20)]

    alone = {str(budget): logits(budget)[0] for budget in budgets}
    with ThreadPoolExecutor(4) as pool:
        for budget, found in zip(budgets, pool.map(logits, budgets)):
            assert all(torch.equal(each, alone[str(budget)]) for each in found)


def test_the_call_s_length_config_wins_over_the_configuration_s():
    model = tiny_model()
    input_ids, _ = right_padded(model.config, [10])
    call = model(input_ids, length_config=[6, 4, 2]).start_logits
    model.config.length_config = [6, 4, 2]
    assert torch.equal(model(input_ids).start_logits, call)
    assert not torch.equal(model(input_ids, length_config="full").start_logits, call)


def test_embeddings_can_be_resized():
    model = tiny_model()
    input_ids, _ = right_padded(model.config, [6])
    before = model(input_ids).start_logits
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 70
    assert torch.equal(model(input_ids).start_logits, before)
    model(torch.tensor([[2, 69]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("significance", SIGNIFICANCES)
def test_half_precision_runs_close_to_single(dtype, significance):
    model = tiny_model(significance=significance)
    input_ids, mask = right_padded(model.config, [9, 5])
    exact = model(input_ids, mask).start_logits
    half = model.to(dtype)
    found = half(input_ids, mask).start_logits
    assert found.dtype == dtype
    torch.testing.assert_close(found[mask.bool()].float(), exact[mask.bool()], atol=0.1, rtol=0.1)
    assert (found[~mask.bool()] == torch.finfo(dtype).min).all()
    dropped = half(input_ids, mask, length_config=[0.6, 0.5, 0.4], output_kept_tokens=True)
    assert [kept.shape[1] for kept in dropped.kept_tokens] == [6, 5, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("significance", SIGNIFICANCES)
def test_cuda_computes_what_the_cpu_does(significance):
    model = tiny_model(significance=significance)
    input_ids, mask = right_padded(model.config, [9, 5])
    expected = model(input_ids, mask, length_config=[0.7, 0.5, 0.4]).start_logits
    found = model.cuda()(input_ids.cuda(), mask.cuda(), length_config=[0.7, 0.5, 0.4]).start_logits
    torch.testing.assert_close(found.cpu()[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_reach_every_weight_with_and_without_checkpointing(implementation):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        model.set_attn_implementation(implementation)
        if checkpointing:
            model.gradient_checkpointing_enable()
        input_ids, mask = right_padded(model.config, [9, 5])
        labels = torch.tensor([2, 3])
        model(
            input_ids, mask, start_positions=labels, end_positions=labels, length_config=[0.7, 0.5, 0.4]
        ).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients[0].items() if "key.bias" not in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
