"""Windows, answers and no answer, without a model: logits are drawn, and compared with arithmetic of many digits.

`ROUGH_INPUTS=20000 python -m pytest tests/test_reading.py -k score` draws as many.
"""

import decimal
import itertools
import math
import os
import random
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from conftest import ROOT, once
from qualaminilm import reading_qualaminilm
from qualaminilm.reading_qualaminilm import Reading, Row, Tokens, batches, check_options, padded
from qualaminilm.spans_qualaminilm import weights_of

WORDS = ["who", "Ann", "ann", "Bob", "Cleo", "Lima"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
# Of one scale a text: sure and unsure windows beside each other; sums up to what float32 holds.
SCALES = st.sampled_from([0.0, 0.1, 3.0, 30.0, 1e3, 1e5])


def a_tokenizer():
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


READING = Reading(a_tokenizer(), max_seq_len=8, positions=50)
SETTINGS = {"doc_stride": 1}  # windows of four words, that share one


def windows_of(context):
    return READING.windows("who", READING.tokens(context), **SETTINGS)


def drawn_logits(windows, seed, scale):
    draw = np.random.default_rng(seed)
    return [draw.normal(0, scale, (2, len(window.scored()))).astype(np.float32) for window in windows]


def softmax(logits):
    powers = [Decimal(float(each)).exp() for each in logits]
    return [power / sum(powers) for power in powers]


def twin(context, windows, logits, max_answer_len, align_to_words):
    """Of every text and window the evidence times the window's weight, and that weight; and Z, of the null 1. In plain
    loops, `Decimal`s of as many digits as they need. The question is "who"."""
    words = [set(context[slice(*window.characters(0, len(window.scored()) - 2, True))].split()) for window in windows]
    found = sum("who" in each for each in words)
    weighted, total = [], Decimal(1)
    for of_words, window, of_window in zip(words, windows, logits):
        # Where some windows have it, the others have less, by so much.
        weight = Decimal(1) if "who" in of_words or not found else Decimal(2 * found + 1) / (2 * len(windows) + 2)
        starts, ends = map(softmax, of_window)
        null = starts[0] * ends[0]
        total += weight * (1 / null - 1)
        spans = [
            (starts[first] * ends[last], first - 1, last - 1)
            for first in range(1, len(starts))
            for last in range(first, min(first + max_answer_len, len(starts)))
        ]
        spans.sort(key=lambda span: -span[0])
        texts = {}
        for rank, (probability, first, last) in enumerate(spans):
            start, end = window.characters(first, last, align_to_words)
            text = context[start:end].lower()
            if rank < (12 if align_to_words else 1):
                texts[text] = texts.get(text, 0) + probability
            texts.setdefault(text, probability)
        weighted += [(text, weight * probability / null, weight) for text, probability in texts.items()]
    return weighted, total


@given(TEXTS, st.integers(0, 2**32), SCALES, st.integers(1, 5), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_answers_are_those_of_exact_arithmetic(context, seed, scale, max_answer_len, align_to_words, wants_none):
    decimal.setcontext(decimal.Context(prec=60, Emin=-(10**9), Emax=10**9))
    windows = windows_of(context)
    logits = drawn_logits(windows, seed, scale)
    options = {"max_answer_len": max_answer_len, "align_to_words": align_to_words}
    weighted, total = twin(context, windows, logits, **options)
    answers = READING.best(
        context, windows, logits, top_k=99, handle_impossible_answer=wants_none, return_answerable=True, **options
    )
    counts = {text: max(each for of, each, _ in weighted if of == text) for text, _, _ in weighted}
    best = max(counts.values())
    weight, *others = {weight for _, each, weight in weighted if each >= best * (1 - Decimal("1e-9"))}
    assume(not others)  # which of two texts is the first is the rounding's choice
    evidence = best / weight
    answerable = evidence / (1 + evidence)
    assert [answer["answerable"] for answer in answers] == pytest.approx([float(answerable)] * len(answers))
    if wants_none:
        wins = evidence < 1
        none = answers.pop(0 if wins else -1)
        assert (none["answer"], none["start"], none["end"]) == ("", 0, 0)
        assert none["score"] == pytest.approx(float(weight / total), abs=1e-9)
    scores = {text: float(each / total) for text, each in counts.items()}
    assert {answer["answer"].lower(): answer["score"] for answer in answers} == pytest.approx(scores, abs=1e-9)
    assert len(answers) == len(scores)
    of_answers = [counts[answer["answer"].lower()] for answer in answers]
    for better, worse in itertools.pairwise(of_answers):
        assert better >= worse * (1 - Decimal("1e-9"))
    assert all(context[answer["start"] : answer["end"]] == answer["answer"] for answer in answers)
    first = READING.best(context, windows, logits, **options)
    assert first.items() <= answers[0].items()


@once
def test_no_score_is_above_1_or_below_0():
    """Of each input, its first answer, which has the greatest score, and the null."""
    draw, rng = random.Random(0), np.random.default_rng(0)
    made = [(context, windows_of(context)) for context in ("Ann", "Ann Bob", " ".join(WORDS * 2))]
    options = {"handle_impossible_answer": True, "top_k": 2, "align_to_words": False, "max_answer_len": 3}
    for _ in range(int(os.environ.get("ROUGH_INPUTS", 2000))):
        context, windows = draw.choice(made)
        scale = 10 ** draw.uniform(-3, draw.choice([2, 37]))
        logits = [(rng.standard_normal((2, len(window.scored()))) * scale).astype(np.float32) for window in windows]
        for answer in READING.best(context, windows, logits, **options):
            assert 0 <= answer["score"] <= 1


def logits_of(windows, *of_windows):
    """One window's logits each by word: (start, end) where it is not 0; "" is the null."""
    for window, of_window in zip(windows, of_windows, strict=True):
        logits = np.zeros((2, len(window.scored())), np.float32)
        for place, (start, end) in of_window.items():
            logits[:, place] = start, end
        yield logits


def test_the_window_that_answers_wins_over_one_that_is_surer_of_itself():
    context = "Ann Cleo who Lima who Bob who"
    windows = windows_of(context)
    assert len(windows) == 2
    logits = list(logits_of(windows, {1: (9, 9), 2: (8, 8)}, {0: (1, 1), 3: (4, 4)}))
    ann, _, bob, *_ = READING.best(context, windows, logits, top_k=9, max_answer_len=1)
    assert (ann["answer"], bob["answer"]) == ("Ann", "Bob")
    assert bob["score"] / ann["score"] == pytest.approx(math.exp(6 - 18), rel=1e-6)
    # By the windows' own probabilities it is the other way round.
    by_itself = READING.best(context, windows[1:], logits[1:], max_answer_len=1)
    assert by_itself["score"] > 0.7 > READING.best(context, windows[:1], logits[:1], max_answer_len=1)["score"]


def test_a_window_weighs_by_the_words_of_the_question_that_it_holds():
    """By hand: of three windows all hold "who", one "Lima", two "Cleo", which weigh log(4/3.5), log(4/1.5), log(4/2.5);
    marks, words that are not in the vocabulary and what is asked twice add nothing."""
    context = "Ann ? Lima who Cleo Ann who Lena Cleo Bob"
    windows = READING.windows("Cleo Lena who Cleo Lima?", READING.tokens(context), doc_stride=1, max_seq_len=13)
    assert [context.split()[window.span] for window in windows] == [context.split()[i : i + 4] for i in (0, 3, 6)]
    other = math.log(4 / 2.5) - math.log(4 / 1.5)
    assert weights_of(windows) == pytest.approx([0, other, other])
    assert weights_of(windows[1:2]) == [0]
    assert weights_of(READING.windows("?", READING.tokens(context), **SETTINGS)) == pytest.approx([0] * 3)


def test_a_text_that_is_repeated_counts_once_where_it_has_most_evidence():
    context = "Ann who Bob who who ann who"
    windows = windows_of(context)
    assert len(windows) == 2
    logits = list(logits_of(windows, {1: (4, 4), 3: (5, 5)}, {3: (4.25, 4.25)}))
    answers = READING.best(context, windows, logits, top_k=2, max_answer_len=1)
    assert [(answer["answer"], answer["start"]) for answer in answers] == [("Bob", 8), ("ann", 20)]
    assert answers[0]["score"] / answers[1]["score"] == pytest.approx(math.exp(10 - 8.5), rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_no_answer_where_the_evidence_is_below_the_threshold(top_k):
    context = "Ann who Bob"
    windows = windows_of(context)
    logits = list(logits_of(windows, {1: (4, 4), 3: (3, 3)}))
    reading = Reading(a_tokenizer(), 8, 50, no_answer_threshold=8.5, answerable_calibration=[0.5, -2.0])

    def texts(by=reading, **options):
        found = by.best(context, windows, logits, top_k=top_k, max_answer_len=1, return_answerable=True, **options)
        found = found if top_k > 1 else [found]
        assert len(found) <= top_k
        return [answer["answer"] for answer in found], found

    ranked = ["Ann", "Bob", "who"]  # of evidence exp(8), exp(6) and 1
    assert texts()[0] == ranked[:top_k]
    # Its own threshold, that of the call, and none.
    assert texts(handle_impossible_answer=True)[0] == ["", *ranked][:top_k]
    for by, threshold in ((reading, 7.5), (reading, -math.inf), (READING, None)):
        found, answers = texts(by, handle_impossible_answer=True, no_answer_threshold=threshold)
        assert found == [*ranked[: max(1, top_k - 1)], ""][:top_k]
        logistic = 8 * 0.5 - 2.0 if by is reading else 8.0
        assert answers[0]["answerable"] == pytest.approx(1 / (1 + math.exp(-logistic)))
    found, answers = texts(READING, handle_impossible_answer=True, no_answer_threshold=8.001)
    assert found == ["", *ranked][:top_k]
    if top_k > 1:
        assert answers[0]["score"] / answers[1]["score"] == pytest.approx(math.exp(0.001), rel=1e-6)
    assert texts(READING, handle_impossible_answer=True, no_answer_threshold=math.inf)[1][0]["score"] == 1


@pytest.mark.parametrize("value", [math.nan, "3", True, [1]])
def test_a_threshold_that_is_no_number_is_named(value):
    with pytest.raises(ValueError, match="no_answer_threshold is .*, expected a number"):
        check_options(no_answer_threshold=value)


def computed(batches):
    """Something that computes, and keeps the lengths of the batches that it was given."""

    def run(windows):
        batches.append([len(window) for window in windows])
        return [
            np.float32(window.tokens.ids[None, window.span]).repeat(2, 0) @ np.eye(n, n + 1, 1, np.float32)
            for window in windows
            for n in [window.span.stop - window.span.start]
        ]

    return run


@given(
    st.lists(st.tuples(TEXTS, st.booleans()), max_size=12),
    st.integers(1, 60),
    st.integers(1, 60),
    st.none() | st.integers(1, 5),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_answers_come_in_order_however_their_windows_are_batched(rows, batch, group, batch_size, at_once):
    """And those of the rows before a bad one come first."""
    examples = [{"question": "who" if good else "who " * 9, "context": context} for context, good in rows]
    first_bad = next((i for i, (_, good) in enumerate(rows) if not good), None)
    batches = []
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading_qualaminilm, "GROUP_TOKENS", group)
        answers = READING.answers(
            examples, computed(batches), SETTINGS, at_once=at_once, batch_size=batch_size, batch_tokens=batch
        )
        if first_bad is None:
            found += answers
        else:
            with pytest.raises(ValueError, match=f"^row {first_bad}: `question` is 9 tokens long"):
                for answer in answers:
                    found.append(answer)
    alone = [
        READING.best(context, windows, computed([])(windows))
        for context, _ in rows[:first_bad]
        for windows in [windows_of(context)]
    ]
    assert found == alone
    lengths = [len(window) for context, _ in rows[:first_bad] for window in windows_of(context)]
    assert sorted(length for each in batches for length in each) == sorted(lengths)
    if batch_size:
        assert [length for each in batches for length in each] == lengths
        assert {len(each) for each in batches[:-1]} <= {batch_size}
    else:
        assert all(len(each) == 1 or len(each) * max(each) <= batch for each in batches)


def test_padding_is_masked_and_windows_are_as_long_as_the_longest():
    windows = windows_of("Ann Bob") + windows_of("Lima")
    inputs = padded(windows, pad_token_id=0)
    assert inputs["input_ids"].tolist() == [[1, 4, 2, 5, 7, 2], [1, 4, 2, 9, 2, 0]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert inputs["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert not padded(windows, 0, token_types=1)["token_type_ids"].any()


def test_padding_that_is_asked_for_counts_in_a_batch():
    windows = READING.windows("who", READING.tokens("Ann"), padding="max_length", max_seq_len=40)
    row = Row("Ann", windows * 7, [None] * 7, 7)
    found = list(batches(((row, i) for i in range(7)), None, 100, at_once=False))
    assert [len(each) for each in found] == [2, 2, 2, 1] and padded(windows, 0)["input_ids"].shape == (1, 40)


def test_a_word_that_a_window_s_edge_cuts_is_whole_in_both_windows():
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "who", "rain", "met", "##oc", "##lo"]
    wordpiece = models.WordPiece({token: i for i, token in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = Tokenizer(wordpiece)
    tokenizer.pre_tokenizer, tokenizer.post_processor = pre_tokenizers.Whitespace(), a_tokenizer().post_processor
    reading = Reading(tokenizer, max_seq_len=8, positions=50)
    context = "rain rain metoclo rain"
    windows = reading.windows("who", reading.tokens(context), doc_stride=0)
    assert [window.span for window in windows] == [slice(0, 4), slice(4, 6)]
    for window, first, last in ((windows[0], 2, 3), (windows[1], 0, 0)):
        start, end = window.characters(first, last, True)
        assert context[start:end] == "metoclo"
    cut = [context[slice(*windows[0].characters(2, 3, False))], context[slice(*windows[1].characters(0, 0, False))]]
    assert cut == ["metoc", "lo"]
    # The same characters seen by two windows are one answer.
    logits = list(logits_of(windows, {3: (9, 0), 4: (0, 9)}, {1: (8, 8)}))
    answers = reading.best(context, windows, logits, top_k=9, max_answer_len=2)
    assert [answer["answer"] for answer in answers].count("metoclo") == 1
    assert answers[0]["answer"] == "metoclo" and not {"metoc", "lo"} & {answer["answer"] for answer in answers}


def test_tokens_of_nothing_but_blanks_are_no_answer():
    """As byte-level tokenizers have them."""
    context = "\n \nBerlin is"
    places = [(0, 1), (1, 1), (2, 9), (10, 12)]
    starts, ends = np.array(places).T
    windows = READING.windows("who", Tokens(np.arange(4), np.array([0, 1, 2, 3]), starts, ends))
    logits = list(logits_of(windows, {1: (9, 9), 2: (8, 8), 3: (3, 3)}))
    answers = READING.best(context, windows, logits, top_k=99)
    assert answers[0] == answers[0] | {"answer": "Berlin", "start": 3, "end": 9}
    assert all(each["answer"] == context[each["start"] : each["end"]].strip() != "" for each in answers)


@pytest.mark.parametrize("name", ["handle_impossible_answer", "return_answerable", "align_to_words"])
def test_a_switch_is_on_or_off(name):
    check_options(**{name: None}), check_options(**{name: np.True_}), check_options(**{name: False})
    with pytest.raises(ValueError, match=f"{name} is 'false', expected True or False"):
        check_options(**{name: "false"})


def test_what_others_set_on_their_tokenizer_is_left_alone():
    tokenizer = a_tokenizer()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    reading = Reading(tokenizer, 8, 50)
    assert len(reading.tokens("Ann Bob Cleo Lima Ann Bob").ids) == 6
    assert tokenizer.truncation["max_length"] == 5 and tokenizer.padding["length"] == 9


WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] not in {"numpy", "tokenizers", "qualaminilm", *sys.stdlib_module_names}:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
from tokenizers import Tokenizer
from qualaminilm.reading_qualaminilm import Reading
import numpy as np

reading = Reading(Tokenizer.from_file(sys.argv[1] + "/tokenizer.json"), max_seq_len=384, positions=512)

def run(windows):
    return [np.stack([window.tokens.starts[window.span] == 24] * 2).astype(np.float32) @ np.eye(n, n + 1, 1)
            for window in windows for n in [window.span.stop - window.span.start]]

example = {"question": "Where do I live?", "context": "I was born in Turku, in Finland."}
(answer,) = reading.answers([example], run)
print(answer["answer"], *sorted({"torch", "transformers"} & sys.modules.keys()))
"""


def test_reading_takes_neither_torch_nor_transformers():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(ROOT)], capture_output=True, text=True)
    assert done.stdout.split() == ["Finland"], done.stderr
