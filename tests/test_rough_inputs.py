"""Whatever people throw at the pipeline: an answer that is a slice of its context, or a ValueError that says why.

`ROUGH_INPUTS=20000 python -m pytest tests/test_rough_inputs.py -k shipped` tries as many inputs on the shipped model.
"""

import functools
import math
import os
import unicodedata

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conftest import ROOT, tiny_config
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline

INPUTS = {"tiny": 400, "shipped": 100}  # by default

# Texts: pieces of every kind, put together with and without spaces.
ALPHABETS = [
    st.characters(codec="utf-8"),
    st.characters(min_codepoint=32, max_codepoint=126),
    st.sampled_from("אבגשלוםمرحباسلام\u200f\u202e"),
    st.sampled_from("\u0301\u0308\u0327\u20dd\u0e33\u200d\ufe0fae" + "\u0130\u0131ßŉﬁ"),
    st.sampled_from(["👩‍👩‍👧‍👦", "👍🏽", "🇩🇪", "🧑‍🚀", "😀", "1️⃣"]),
    st.sampled_from("\x00\x01\x7f\x85\ufeff\ufffd\ufffe"),
    st.sampled_from("東京都の日本語中文한국어"),
    st.sampled_from(" \t\n\r\x0b\x0c\u00a0\u2003\u2028\u3000\u200b"),
    st.sampled_from(["[CLS]", "[SEP]", "[PAD]", "[MASK]", "##s", "Berlin", "I live in ", "1887", "..."]),
]
PIECES = st.one_of([st.lists(alphabet, max_size=12).map("".join) for alphabet in ALPHABETS])
TEXTS = st.tuples(st.sampled_from(["", " "]), st.lists(PIECES, max_size=8)).map(lambda both: both[0].join(both[1]))
LONG_TEXTS = st.tuples(TEXTS.filter(len), st.integers(500, 1_500)).map(
    lambda both: (both[0] * math.ceil(both[1] / len(both[0])))[: both[1]]
)
SURROGATES = st.tuples(TEXTS, st.characters(categories=["Cs"]), TEXTS).map("".join)
NO_TEXTS = st.sampled_from([None, 5, 2.5, b"bytes", {"a"}, {"a": "b"}])
QUESTIONS = st.one_of(*[TEXTS] * 12, LONG_TEXTS, SURROGATES, NO_TEXTS)
CONTEXTS = st.one_of(*[TEXTS] * 12, *[LONG_TEXTS] * 2, SURROGATES, NO_TEXTS)

NO_INTS = st.sampled_from([True, "3", 1.5, math.nan, [2], -1, -(10**30)])


def ints(least, *usual):
    """Legal values and, more rarely, others."""
    legal = st.one_of(st.none(), *usual, st.just(least), st.just(10**30))
    return st.one_of(*[legal] * 15, NO_INTS)


def length_configs(layers):
    """`length_config`s and whether each is legal."""
    presets = st.sampled_from([None, "full", {"max_macs": 1}, {"max_macs": 1.0}])
    counts = st.lists(st.integers(2, 500) | st.just(10**30), min_size=layers, max_size=layers)
    shares = st.lists(st.floats(0.001, 1), min_size=layers, max_size=layers)
    legal = (
        presets
        | (counts | shares).map(lambda entries: sorted(entries, reverse=True))
        | counts.map(lambda entries: tuple(sorted(entries, reverse=True)))
    )
    entries = st.sampled_from([True, None, "2", 0, 1, -3, 0.0, 0.0004, 1.5, math.nan, math.inf, [2], 1 + 1j])
    illegal = st.one_of(
        st.sampled_from(["", "quick", "Full", 5, 0.5, {}, {"max_macs": 0}, {"max_macs": math.nan}, {"max_macs": True}]),
        st.sampled_from([{"max_macs": "1"}, {"max_macs": 1e-9}, {"max_macs": 1, "n": 3}, {1, 2}, b"full", [], ()]),
        st.lists(st.integers(2, 500), min_size=1, max_size=9).filter(lambda entries: len(entries) != layers),
        st.lists(st.integers(2, 500), min_size=layers - 1, max_size=layers - 1).flatmap(
            lambda others: st.tuples(st.integers(0, layers - 1), entries).map(
                lambda place: [*sorted(others, reverse=True)[: place[0]], place[1], *others[place[0] :]]
            )
        ),
        st.just([*range(2, layers + 2)]),
        st.just([0.5] * (layers - 1) + [2]),
    )
    return st.one_of(*[legal.map(lambda value: (value, True))] * 15, illegal.map(lambda value: (value, False)))


def calls(layers):
    return st.fixed_dictionaries(
        {
            "question": QUESTIONS,
            "context": CONTEXTS,
            "length_config": length_configs(layers),
            "top_k": ints(1, st.integers(1, 40)),
            "max_answer_len": ints(1, st.integers(1, 40)),
            "max_question_len": ints(1, st.integers(1, 40)),
            "max_seq_len": st.one_of(*[st.none()] * 2, ints(1, st.integers(1, 60), st.integers(60, 512))),
            "doc_stride": st.one_of(*[st.none()] * 2, ints(0, st.integers(0, 40), st.integers(40, 400))),
            "batch_size": ints(1, st.integers(1, 9)).filter(lambda value: value != 10**30),
            "padding": st.sampled_from([None, True, False, "longest", "max_length", "do_not_pad", "long", 3]),
            "align_to_words": st.booleans(),
            "handle_impossible_answer": st.booleans(),
        }
    )


@functools.cache
def load(kind):
    if kind == "shipped":
        model = QuaLAMiniLMForQuestionAnswering.from_pretrained(ROOT)
    else:
        torch.manual_seed(0)
        model = QuaLAMiniLMForQuestionAnswering(
            tiny_config(vocab_size=30522, max_position_embeddings=512, significance="learned")
        )
    tokenizer = AutoTokenizer.from_pretrained(ROOT, config=model.config)
    return QuestionAnsweringPipeline(model=model.eval(), tokenizer=tokenizer)


def number_of_tokens(qa, text):
    return len(qa.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def is_int(value, least):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def at_fault(qa, call, length_config_is_legal):
    """Names of the arguments that are not legal, as the pipeline documents them: a `set`, empty if all are."""
    fault = set() if length_config_is_legal else {"length_config"}
    for name in ("question", "context"):
        text = call[name]
        if not isinstance(text, str) or not text or any(unicodedata.category(letter) == "Cs" for letter in text):
            fault.add(name)
    if isinstance(call["question"], str) and call["question"].isspace():
        fault.add("question")
    least = {"top_k": 1, "max_answer_len": 1, "max_question_len": 1, "max_seq_len": 1, "doc_stride": 0, "batch_size": 1}
    for name in least:
        if call[name] is not None and not is_int(call[name], least[name]):
            fault.add(name)
    if call["padding"] not in (None, True, False, "longest", "max_length", "do_not_pad"):
        fault.add("padding")
    if fault:
        return fault
    context, question = (number_of_tokens(qa, call[name]) for name in ("context", "question"))
    if not context:
        return {"context"}
    max_seq_len, stride = call["max_seq_len"] or 384, call["doc_stride"]
    if call["max_question_len"] and question > call["max_question_len"]:
        offsets = qa.tokenizer(call["question"], add_special_tokens=False, return_offsets_mapping=True)
        cut = call["question"][: offsets["offset_mapping"][call["max_question_len"] - 1][1]]
        question = number_of_tokens(qa, cut)
    room = max_seq_len - 3 - question
    window = max_seq_len if call["padding"] == "max_length" else min(max_seq_len, context + 3 + question)
    bad_stride = stride is not None and (stride > max_seq_len or (stride >= room and context > room))
    if room < 1 or bad_stride or window > 512:
        return {"question", "max_seq_len", "doc_stride"}
    return set()


def check(qa, call):
    length_config, is_legal = call["length_config"]
    call = call | {"length_config": length_config}
    fault = at_fault(qa, call, is_legal)
    arguments = {name: value for name, value in call.items() if value is not None or name in ("question", "context")}
    if fault:
        with pytest.raises(ValueError) as error:
            qa(**arguments)
        assert any(name in str(error.value) for name in fault), (error.value, fault)
        return
    answers = qa(**arguments)
    assert isinstance(answers, list) == ((call["top_k"] or 1) > 1)
    answers = answers if isinstance(answers, list) else [answers]
    assert 1 <= len(answers) <= (call["top_k"] or 1)
    for answer in answers:
        assert call["context"][answer["start"] : answer["end"]] == answer["answer"]
        assert answer["answer"] or call["handle_impossible_answer"]
        assert 0 <= answer["score"] < math.inf
    if not call["handle_impossible_answer"]:
        assert len({answer["answer"].lower() for answer in answers}) == len(answers)


@pytest.mark.parametrize("kind", INPUTS)
def test_an_answer_or_a_reason(kind):
    qa, inputs = load(kind), int(os.environ.get("ROUGH_INPUTS", INPUTS[kind]))

    @given(calls(qa.model.config.num_hidden_layers))
    @settings(max_examples=inputs, deadline=None, suppress_health_check=list(HealthCheck))
    def generated(call):
        check(qa, call)

    generated()


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        " ",
        "a ",
        "東",
        "e\u0301",
        "שלום ",
        "👩‍👩‍👧‍👦",
        "\x00",
        "\x00a",
        "\u0301",
        "##s",
        "[SEP]",
        "\u202eabc",
        "1" * 101 + " ",
    ],
)
def test_a_hundred_thousand_characters(piece):
    call = dict.fromkeys(["top_k", "max_answer_len", "max_question_len", "max_seq_len", "doc_stride", "padding"])
    call |= {"align_to_words": True, "handle_impossible_answer": False, "batch_size": 16, "length_config": (None, True)}
    check(load("tiny"), call | {"question": "Where?", "context": piece * (100_000 // len(piece))})


def test_a_question_of_a_hundred_thousand_characters():
    qa = load("tiny")
    with pytest.raises(ValueError, match="`question` is 100000 tokens long, which leaves no room"):
        qa(question="a " * 100_000, context="Berlin")
    assert qa(question="a " * 100_000, context="Berlin", max_question_len=50)["answer"] == "Berlin"
