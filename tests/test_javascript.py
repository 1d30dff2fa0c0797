"""The JavaScript of demo/browser reads and answers as Python and the tokenizers package do."""

import json
import random

import numpy as np
import pytest
import tokenizers

from conftest import ROOT, once
from qualaminilm.length_configs_qualaminilm import PRESETS_FILE, LengthConfigs, read_presets
from qualaminilm.reading_qualaminilm import Reading, check_example, check_options
from qualaminilm.spans_qualaminilm import whole_string
from tests.javascript import call, code_units, in_code_units, needs_node, read_cases

pytestmark = [once, needs_node]

WORDS = """The quick brown fox, it's 3.5% of $1,200! U.S. naïve Zürich İstanbul ΣΊΣΥΦΟΣ Škoda ﬁne ½ x² (a-b) [SEP]
    [CLS]x [MASK] [sep] http://a.b/c?d=e me@x.org e\u0301 o\u0308\u0323 \u0344 q\u0307\u0323 \u1ad9\u0323 한국어
    \u1112\u1161\u11ab 日本語 漢字かな 中文。 ไทย हिन्दी العربية עברית 👍 👩\u200d👩\u200d👧 🇩🇪 \U0001d518\U0001d52b 𠀀
    a\u200bb soft\u00adhyphen x\u0000y \ufffd \ufeff ...!!! ªº ǅ ß ẞ unaffable electroencephalographically
    _under_score_ ~/.x `code` $5 ^ + < = > |""".split()
BLANKS = [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\u2028", "\u3000", "\x0b", "\x85", ""]


def generated_text(seed):
    """A text of words of all kinds, and of characters that nobody expects."""
    draw = random.Random(seed)
    parts = []
    for _ in range(draw.randint(1, 30)):
        kind = draw.random()
        if kind < 0.7:
            part = draw.choice(WORDS)
        elif kind < 0.8:
            part = "".join(chr(draw.choice((draw.randint(0, 0x2FFF), draw.randint(0, 0xD7FF)))) for _ in range(3))
        elif kind < 0.9:
            part = "".join(chr(draw.randint(0xE000, 0x10FFFF)) for _ in range(3))
        else:
            part = draw.choice("aé漢x") * draw.choice((1, 30, 99, 100, 101, 150))
        parts += [part, draw.choice(BLANKS)]
    return "".join(parts)


def test_the_tokenizer_reads_as_the_tokenizers_package():
    """Of 2,000 generated texts and of characters between letters, every one of the planes in use: tokens, words and
    places."""
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0xE0000, 101), *range(0xE0000, 0xE0200)]
    characters = [chr(code) for code in codes]
    every = [" ".join(f"a{c}b" for c in characters[i : i + 5000]) for i in range(0, len(characters), 5000)]
    texts = [generated_text(seed) for seed in range(2000)] + every
    reference = tokenizers.Tokenizer.from_file(str(ROOT / "tokenizer.json"))
    encodings = reference.encode_batch(texts, add_special_tokens=False)
    for text, encoding, tokens in zip(texts, encodings, call([["tokens", text] for text in texts]), strict=True):
        places = code_units(text)
        expected = {
            "ids": encoding.ids,
            "words": encoding.word_ids,
            "starts": [places[start] for start, _ in encoding.offsets],
            "ends": [places[end] for _, end in encoding.offsets],
        }
        assert tokens == expected, text[:200]


def options_of(number):
    """Those of a case: by its number others, so that each is tried, and short windows too."""
    windows = [{}, {"max_seq_len": 96, "doc_stride": 20}, {"max_seq_len": 64, "max_question_len": 7}, {"doc_stride": 0}]
    best = [
        {},
        {"top_k": 20, "max_answer_len": 30},
        {"top_k": 3, "handle_impossible_answer": True, "no_answer_threshold": 2.5},
        {"handle_impossible_answer": True, "return_answerable": True},
        {"top_k": 5, "align_to_words": False},
    ]
    return windows[number % len(windows)], best[number % len(best)]


def generated_logits(windows, seed):
    """Some starts and ends stand out, and in some windows the null, as a model has it."""
    draw = np.random.default_rng(seed)
    logits = []
    for window in windows:
        each = draw.normal(-3, 2, (2, len(window.scored())))
        each += draw.random(each.shape) ** 30 * 10
        each[:, 0] += draw.uniform(0, 9)
        logits.append(each.astype(np.float32))
    return logits


def test_of_the_same_logits_comes_the_same():
    """Windows, places, texts and scores, on 200 of 200 cases."""
    reading = Reading(tokenizers.Tokenizer.from_file(str(ROOT / "tokenizer.json")), 384, 512)
    calls, expected = [], []
    for number, case in enumerate(read_cases()):
        window_options, best_options = options_of(number)
        windows = reading.windows(case["question"], reading.tokens(case["context"]), **window_options)
        logits = generated_logits(windows, number)
        answers = reading.best(case["context"], windows, logits, **best_options)
        expected.append((windows, in_code_units(case["context"], answers if isinstance(answers, list) else [answers])))
        given = [each.tolist() for each in logits]
        calls.append(["best", case["question"], case["context"], window_options | best_options, given])
    assert len(calls) == 200 and sum(len(windows) > 1 for windows, _ in expected) > 100
    for (windows, answers), (*_, options, _), found in zip(expected, calls, call(calls), strict=True):
        for window, inputs in zip(windows, found["windows"], strict=True):
            assert inputs == {name: array.tolist() for name, array in window.model_inputs().items()}
        found = found["answers"] if options.get("top_k", 1) > 1 else [found["answers"]]
        assert found == [close(answer) for answer in answers]


def close(answer):
    """Equal to an answer whose numbers are within 1e-6 of its own."""
    return {
        name: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value for name, value in answer.items()
    }


def test_strings_are_whole_alike():
    """Around every word of texts full of addresses, numbers and fields."""
    pieces = """me@x.org, http://a.b/c?d=e. U.S. end.Next 1,200 key:value (a/b) [x] 'US$5' it's x_y A/B and/or -3.5
        host:80 24-year-old ±2 C++11 wow!1 ~/.bash "q" é.f 👍.x \uff11.2 ٣.٤ ǅ.a""".split()
    fields = [
        "Name: Ann Lee\n",
        "Phone 📞: 030 1234\nnext line\n",
        "É: x\n",
        "a, \n",
        "no field here, and a long line that goes on\n",
    ]
    calls = []
    for seed in range(300):
        draw = random.Random(seed)
        text = "".join(
            draw.choice(fields) if draw.random() < 0.3 else draw.choice(pieces) + draw.choice(" \n") for _ in range(12)
        )
        start = draw.randrange(len(text) - 1)
        calls.append((text, start, draw.randint(start + 1, min(len(text), start + 40))))
    in_units = [["wholeString", text, code_units(text)[start], code_units(text)[end]] for text, start, end in calls]
    for (text, start, end), found in zip(calls, call(in_units), strict=True):
        assert found == [code_units(text)[place] for place in whole_string(text, start, end)], (text, start, end)


def test_bad_input_is_named_alike():
    """By the same message, but for how a value is written."""
    options = [{"top_k": 0}, {"max_answer_len": 1.5}, {"max_seq_len": -3}, {"doc_stride": -1}]
    options += [{"handle_impossible_answer": 1}, {"return_answerable": 0}, {"align_to_words": 2}]
    texts = [("", "b"), ("a", ""), (" \n\x1c", "b"), ("a", "\u3000"), (7, "b"), ("a", "b\ud800c")]
    calls = [["checkOptions", each] for each in options]
    calls += [["checkExample", {"question": question, "context": context}] for question, context in texts]
    for (_, given), found in zip(calls, call(calls), strict=True):
        with pytest.raises(ValueError) as raised:
            check_example(given) if "question" in given else check_options(**given)
        assert isinstance(found, ValueError) and str(found)[:24] == str(raised.value)[:24], given
    good = [
        ["checkOptions", {"top_k": 1, "doc_stride": 0, "no_answer_threshold": -1, "align_to_words": False}],
        ["checkExample", {"question": "a", "context": "\ufeff"}],
    ]
    assert call(good) == [None, None]


def test_what_does_not_fit_in_windows_is_named_alike():
    reading = Reading(tokenizers.Tokenizer.from_file(str(ROOT / "tokenizer.json")), 384, 512)
    given = [
        ("why " * 400, "text", {}),
        ("why", "text " * 400, {"doc_stride": 381}),
        ("why", "text", {"doc_stride": 500}),
        ("why", "text " * 600, {"max_seq_len": 600}),
        ("why", "\u200b", {}),
    ]
    found = call([["best", question, context, options, []] for question, context, options in given])
    for (question, context, options), error in zip(given, found, strict=True):
        with pytest.raises(ValueError) as raised:
            reading.windows(question, reading.tokens(context), **options)
        assert str(error).split(":")[0] == str(raised.value).split(":")[0]


class Shipped(LengthConfigs):
    def __init__(self):
        vars(self).update(json.loads((ROOT / "config.json").read_text()))
        self.length_presets = read_presets(ROOT / PRESETS_FILE, self.num_hidden_layers)


def test_length_configs_are_read_alike():
    config = Shipped()
    good = [
        *config.length_presets,
        None,
        [384, 300, 200, 100, 50, 2],
        [1.0, 1.0, 0.0625, 0.0005001, 0.0005001, 0.0005001],
    ]
    good += [{"max_macs": share} for share in (1.0, 0.7, 0.6, 0.5, 0.45)]
    bad = ["quick", [1.0] * 5, [0.5, 0.6, 0.5, 0.4, 0.3, 0.2], [0.5, 2, 0.5, 0.4, 0.3, 0.2], [9, 8, 7, 6, 5, 1]]
    bad += [[1.0, 1.0, 1.0, 1.0, 1.0, 0.0004], [1.0, 1.0, 1.0, 1.0, 1.0, True], {"max_macs": 0.1}, {"max_macs": 2}, {}]
    for given, found in zip(good, call([["tokenLengths", each] for each in good]), strict=True):
        lengths = config.token_lengths(given)
        assert found == {"entries": [*lengths.entries], "relative": lengths.relative}, given
    for given, found in zip(good, call([["macs", each, n] for each in good for n in (384, 100)])[::2], strict=True):
        assert found == config.macs(given)
    for given, error in zip(bad, call([["tokenLengths", each] for each in bad]), strict=True):
        with pytest.raises(ValueError) as raised:
            config.token_lengths(given)
        assert isinstance(error, ValueError) and ("entry 5" in str(error)) == ("entry 5" in str(raised.value)), given
