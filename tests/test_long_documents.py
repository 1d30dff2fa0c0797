import random
import tracemalloc

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from conftest import ROOT, tiny_config
from qualaminilm import reading_qualaminilm
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering, QuaLAMiniLMQuestionAnsweringOutput
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline

QUESTION = "What is the password?"
PASSWORDS = ["castle", "thunder", "marble", "lantern", "orchard"]  # one token each
WORDS = "the clerk wrote that it had rained again, unhappily reconsidered 1887 (naïve) 東京 שלום".split()
WORDS += ["e\u0301te\u0301", "🧑\u200d🚀", "👍🏽", "\x00", "\n\n\t"]


class Oracle(QuaLAMiniLMForQuestionAnswering):
    """Answers with the passwords, wherever they stand; remembers the shapes of the batches that it was asked."""

    def __init__(self, config, passwords):
        super().__init__(config)
        self.passwords, self.batches = torch.tensor(passwords), []

    def forward(self, input_ids, **kwargs):
        self.batches.append(tuple(input_ids.shape))
        logits = torch.isin(input_ids, self.passwords) * 20.0
        return QuaLAMiniLMQuestionAnsweringOutput(start_logits=logits, end_logits=logits)


class Listening:
    """A tokenizer that remembers the texts that it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.heard = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode_batch(self, texts, **kwargs):
        self.heard += texts
        return self.tokenizer.encode_batch(texts, **kwargs)


@pytest.fixture(scope="module")
def qa():
    config = tiny_config(vocab_size=30522, num_hidden_layers=1, max_position_embeddings=512)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, config=config)
    passwords = tokenizer.convert_tokens_to_ids(PASSWORDS)
    assert tokenizer.unk_token_id not in passwords
    return QuestionAnsweringPipeline(model=Oracle(config, passwords).eval(), tokenizer=tokenizer)


def book(words, planted, seed=0):
    """A text of so many words, the planted ones among them, and the places where these start."""
    chosen = random.Random(seed)
    parts = chosen.choices(WORDS, k=words)
    for password, place in zip(planted, sorted(chosen.sample(range(words), len(planted)))):
        parts[place] = password
    starts = np.cumsum([0] + [len(part) + 1 for part in parts])
    return " ".join(parts), {part: int(start) for part, start in zip(parts, starts) if part in planted}


def as_spans(answers):
    return {answer["answer"]: (answer["start"], answer["end"]) for answer in answers}


def test_planted_answers_of_200_pages_are_found_where_they_stand(qa):
    context, places = book(100_000, PASSWORDS)
    assert len(context) > 500_000 and max(places.values()) > len(context) / 2
    expected = {password: (start, start + len(password)) for password, start in places.items()}
    for parameters in ({}, {"max_seq_len": 100, "doc_stride": 20, "align_to_words": False}):
        qa.model.batches.clear()
        answers = qa(question=QUESTION, context=context, top_k=len(PASSWORDS), batch_size=16, **parameters)
        assert as_spans(answers) == expected
        assert all(context[answer["start"] : answer["end"]] == answer["answer"] for answer in answers)
        *full, last = [windows for windows, _ in qa.model.batches]
        assert set(full) == {16} and 1 <= last <= 16


def test_many_questions_against_one_text_tokenise_it_once_and_share_batches(qa, monkeypatch):
    context, places = book(3_000, PASSWORDS[:1])
    other, elsewhere = book(2_000, PASSWORDS[1:2], seed=1)
    questions = [QUESTION, "Who?", QUESTION]
    alone = [qa(question=question, context=context) for question in questions] + [qa(QUESTION, other)]
    listening = Listening(qa.reading.tokenizer)
    monkeypatch.setattr(qa.reading, "tokenizer", listening)
    for given in ({"batch_size": 8}, {}):
        listening.heard.clear()
        qa.model.batches.clear()
        together = qa(question=[*questions, QUESTION], context=[context] * 3 + [other], **given)
        assert together == alone
        assert as_spans(together) == {
            password: (start, start + len(password)) for password, start in (places | elsewhere).items()
        }
        assert listening.heard.count(context) == listening.heard.count(other) == 1
        assert {windows for windows, _ in qa.model.batches[1:-1]} == {8}


def test_a_stream_answers_each_row_before_the_next_and_its_windows_together(qa):
    long, places = book(2_000, PASSWORDS[:1])
    read = []

    def rows():
        for context in ("a castle", long, "a thunder"):
            read.append(context)
            yield {"question": QUESTION, "context": context}

    qa.model.batches.clear()
    answers = qa(rows())
    assert read == [] and next(answers)["answer"] == "castle"
    assert len(read) == 1 and qa.model.batches == [(1, 10)]
    qa.model.batches.clear()
    assert next(answers)["start"] == places["castle"] and len(read) == 2
    windows = len(qa.preprocess({"question": QUESTION, "context": long}))
    assert [batch for batch, _ in qa.model.batches] == [8] * (windows // 8) + [windows % 8] * (windows % 8 > 0)
    assert next(answers)["answer"] == "thunder" and list(answers) == []


@pytest.mark.parametrize("group_tokens", [1, 700, 2**16])
def test_rows_of_a_list_share_batches_with_those_of_like_length(qa, monkeypatch, group_tokens):
    draw = random.Random(0)
    contexts = [" ".join(draw.choices(WORDS, k=draw.choice([3, 30, 300, 900]))) + " castle" for _ in range(40)]
    rows = [{"question": QUESTION, "context": context} for context in contexts]
    alone = [qa(row) for row in rows]
    monkeypatch.setattr(reading_qualaminilm, "GROUP_TOKENS", group_tokens)
    qa.model.batches.clear()
    assert qa(rows) == alone
    lengths = [len(window) for row in rows for window in qa.preprocess(row)]
    assert sum(windows for windows, _ in qa.model.batches) == len(lengths)
    computed = sum(windows * longest for windows, longest in qa.model.batches)
    assert all(windows * longest <= reading_qualaminilm.BATCH_TOKENS for windows, longest in qa.model.batches)
    if group_tokens == 2**16:
        assert computed < 1.1 * sum(lengths)
        assert len(qa.model.batches) < 1.5 * sum(lengths) / reading_qualaminilm.BATCH_TOKENS + 1


def test_memory_does_not_grow_with_the_windows(qa):
    """Beside the text's own tokens: less than 20 kB more for each further window, though one of 300-token answers has
    100,000 spans, 0.8 MB of scores."""

    def peak_and_windows(words):
        context, _ = book(words, PASSWORDS)
        tokens = qa.reading.tokens(context)
        tracemalloc.start()
        windows = qa.reading.windows(QUESTION, tokens)
        logits = [each for window in windows for each in qa.forward([window])]
        answers = qa.postprocess(context, windows, logits, top_k=30, max_answer_len=300)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert set(PASSWORDS) <= {answer["answer"] for answer in answers}
        return peak, len(windows)

    (small, few), (large, many) = peak_and_windows(1_000), peak_and_windows(10_000)
    assert many > 5 * few > 20
    assert (large - small) / (many - few) < 20_000


def test_progress_is_drawn_on_request(qa, capfd):
    context, _ = book(2_000, PASSWORDS[:1])
    examples = [{"question": QUESTION, "context": context}] * 2
    qa(examples)
    assert "Answering" not in capfd.readouterr().err
    expected = qa(examples)
    assert qa(examples, show_progress_bar=True) == expected
    drawn = capfd.readouterr().err
    total = 2 * len(context)
    assert "Answering: 100%" in drawn and f"{total / 1000:.1f}k/{total / 1000:.1f}k" in drawn
    assert list(qa((example for example in examples), show_progress_bar=True)) == expected
    assert f"{total / 1000:.1f}k" in capfd.readouterr().err
