"""Text in, spans out: the windows of a text, and the answers in what a model makes of them.

Nothing here computes with a model: whatever does, by torch or not, is handed windows and hands back logits. It takes
numpy and a tokenizer of the tokenizers package, so that all that answers, answers alike.

Where a text is one window, spans and scores are those of the `QuestionAnsweringPipeline` of transformers 4.57, but that
an answer does not end in the middle of an address, a file name or a decimal number.
"""

import contextlib
import copy
import itertools
import math
import reprlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from .spans_qualaminilm import ranked

PADDINGS = (True, False, "longest", "max_length", "do_not_pad")
PROBE = "a"  # what stands for the context where the tokens around it are found
BATCH_TOKENS = 8 * 384  # of a batch, padding included, where nobody says how many windows it has
GROUP_TOKENS = 2**16  # of the windows of a list that are sorted by length at a time


def check_options(
    top_k=None,
    max_answer_len=None,
    max_seq_len=None,
    max_question_len=None,
    doc_stride=None,
    batch_size=None,
    padding=None,
    no_answer_threshold=None,
    **switches,
):
    """Raises a [`ValueError`] that names an argument which is none of the accepted values; `None` is always one.
    `switches` are those which are on or off."""
    for name, value, least in (
        ("top_k", top_k, 1),
        ("max_answer_len", max_answer_len, 1),
        ("max_seq_len", max_seq_len, 1),
        ("max_question_len", max_question_len, 1),
        ("doc_stride", doc_stride, 0),
        ("batch_size", batch_size, 1),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
            raise ValueError(f"{name} parameter should be an int >= {least} (got {value!r})")
    if padding is not None and padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}, expected one of {PADDINGS}")
    if no_answer_threshold is not None and (
        isinstance(no_answer_threshold, bool)
        or not isinstance(no_answer_threshold, Real)
        or math.isnan(no_answer_threshold)
    ):
        raise ValueError(f"no_answer_threshold is {no_answer_threshold!r}, expected a number")
    for name, value in switches.items():
        if value is not None and not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} is {value!r}, expected True or False")


def given(**arguments):
    """Those that are not `None`, which stands for an argument's default."""
    return {name: value for name, value in arguments.items() if value is not None}


def check_asked(asked):
    """Raises a [`ValueError`] unless `asked`, a call's first argument, is a dict or can be an iterable of dicts."""
    if not isinstance(asked, Iterable) or isinstance(asked, (str, bytes)):
        raise ValueError(f"the first argument is {reprlib.repr(asked)}, expected a dict or an iterable of dicts")


def check_example(example):
    """Raises a [`ValueError`] unless both values of `example`, its question and context, are texts to be read."""
    for name in ("question", "context"):
        text = example[name]
        if text is None:
            raise ValueError(f"`{name}` cannot be None")
        if not isinstance(text, str):
            raise ValueError(f"`{name}` is {reprlib.repr(text)}, expected a str")
        if not text:
            raise ValueError(f"`{name}` cannot be empty")
        if text.isspace():
            fault = "is nothing but white space" if name == "question" else "holds no text"
            raise ValueError(f"`{name}` {fault}: {text[:50]!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"`{name}` is not valid Unicode text: {error}") from error


@contextlib.contextmanager
def naming_row(row):
    """Puts a row's number, unless it is `None`, before the message of what is found wrong with it."""
    try:
        yield
    except (ValueError, KeyError) as error:
        if row is not None:
            error.args = (f"row {row}: {error.args[0]}", *error.args[1:])
        raise


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text's tokens, special ones aside: int64 arrays with an entry a token.

    Attributes:
        ids: what the model reads.
        words: the number of the word that a token is part of, -1 for none.
        starts, ends: the token's characters are `text[start:end]`.
    """

    ids: np.ndarray
    words: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True, eq=False)
class Window:
    """Some of a context's tokens between the question's and the special ones. `len()` counts them all.

    Attributes:
        tokens ([`Tokens`]), span (`slice`): the window's are these of the context's.
        ids_around, type_ids_around: what stands before and after them, two int64 arrays each.
        type_id (`int`): of the context's tokens.
        question_ids: the question's tokens that are words or pieces of such, int64, each once.
        padded_length (`int`): tokens to pad to, where these are fewer.
    """

    tokens: Tokens
    span: slice
    ids_around: tuple
    type_ids_around: tuple
    type_id: int
    question_ids: np.ndarray
    padded_length: int

    def __len__(self):
        return len(self.ids_around[0]) + self.span.stop - self.span.start + len(self.ids_around[1])

    @property
    def width(self):
        """Tokens that it takes, its own padding included."""
        return max(len(self), self.padded_length)

    def model_inputs(self):
        """By name, one int64 array each, (tokens,)."""
        ids = self.tokens.ids[self.span]
        return {
            "input_ids": self._between(self.ids_around, ids),
            "token_type_ids": self._between(self.type_ids_around, np.full_like(ids, self.type_id)),
            "attention_mask": np.ones(len(self), dtype=np.int64),
        }

    @staticmethod
    def _between(around, array):
        return np.concatenate((around[0], array, around[1]))

    def scored(self):
        """Positions of [CLS] and of the context's tokens: int64 (1 + context tokens,)."""
        first = len(self.ids_around[0])
        return np.concatenate(([0], np.arange(first, first + self.span.stop - self.span.start)))

    def characters(self, first, last, align_to_words):
        """Characters of the context from the window's context token `first` to its `last`, (start, end); widened to
        whole words, which may reach out of the window, if `align_to_words`."""
        first, last = self.span.start + first, self.span.start + last
        words = self.tokens.words
        if align_to_words and words[first] != -1 != words[last]:
            while first > 0 and words[first - 1] == words[first]:
                first -= 1
            while last < len(words) - 1 and words[last + 1] == words[last]:
                last += 1
        return int(self.tokens.starts[first]), int(self.tokens.ends[last])


def padded(windows, pad_token_id, token_types=2):
    """What the model reads of [`Window`]s, padded on the right to the longest.

    Args:
        token_types (`int`): as many as the model has; RoBERTa has one.

    Returns:
        `dict` of input_ids, token_type_ids and attention_mask, int64 (windows, tokens).
    """
    shape = len(windows), max(window.width for window in windows)
    inputs = {
        "input_ids": np.full(shape, pad_token_id, dtype=np.int64),
        "token_type_ids": np.zeros(shape, dtype=np.int64),
        "attention_mask": np.zeros(shape, dtype=np.int64),
    }
    for row, window in enumerate(windows):
        for name, values in window.model_inputs().items():
            inputs[name][row, : len(window)] = values
    np.minimum(inputs["token_type_ids"], token_types - 1, out=inputs["token_type_ids"])
    return inputs


@dataclass(eq=False)
class Row:
    """A question under way: its windows and, as they come, each one's logits; how many are `missing`."""

    context: str
    windows: list
    logits: list
    missing: int


class Reading:
    """Reads texts in windows, and answers out of them.

    Args:
        tokenizer (`tokenizers.Tokenizer`): it is copied, since others may set how theirs truncates and pads.
        max_seq_len (`int`): tokens of a window, where a call does not say.
        positions (`int`): tokens of the longest input that the model takes.
        no_answer_threshold (`float`), answerable_calibration (two `float`): as in `QuaLAMiniLMConfig`.
    """

    def __init__(self, tokenizer, max_seq_len, positions, no_answer_threshold=None, answerable_calibration=None):
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # One word that the vocabulary lacks is not another. Not every kind of model has a token for them.
        unknown = self.tokenizer.token_to_id(getattr(self.tokenizer.model, "unk_token", None) or "")
        self.unknown_ids = [] if unknown is None else [unknown]
        self.max_seq_len, self.positions = max_seq_len, positions
        self.no_answer_threshold = 0.0 if no_answer_threshold is None else no_answer_threshold
        self.answerable_calibration = answerable_calibration or (1.0, 0.0)

    def answers(
        self,
        examples,
        run,
        windows=None,
        best=None,
        numbered=True,
        at_once=False,
        batch_size=None,
        batch_tokens=BATCH_TOKENS,
        progress=lambda characters: None,
    ):
        """Yields the answers to each example, in order.

        Args:
            examples: an iterable of `dict`s of a question and its context, checked by [`check_example`].
            run: what computes: given a `list` of [`Window`]s, it returns one float32 array each, the logits of starts
                and ends at `Window.scored()`, (2, 1 + context tokens).
            windows, best (`dict`): arguments of [`Reading.windows`] and [`Reading.best`].
            numbered (`bool`): whether a row's faults are called by its number.
            at_once (`bool`): whether each example is answered before the next one is read.
            batch_size (`int`): windows of a batch, in their order, whatever `at_once` says; by default as many as make
                `batch_tokens`, those of like length together.
            progress: called with a number of characters when these have been read.

        Raises:
            ValueError: what [`Reading.windows`] or [`Reading.best`] finds, after the answers to the rows before.
        """
        rows, done = deque(), 0

        def all_windows():
            context = tokens = None
            for number, example in enumerate(examples):
                with naming_row(number if numbered else None):
                    if context != example["context"]:
                        context = example["context"]
                        tokens = self.tokens(context)
                    found = self.windows(example["question"], tokens, **(windows or {}))
                row = Row(context, found, [None] * len(found), len(found))
                rows.append(row)
                yield from ((row, i) for i in range(len(found)))

        for batch in batches(all_windows(), batch_size, batch_tokens, at_once):
            for (row, i), logits in zip(batch, run([row.windows[i] for row, i in batch]), strict=True):
                row.logits[i] = logits
                row.missing -= 1
                n, characters = len(row.windows), len(row.context)
                progress(characters * (i + 1) // n - characters * i // n)
            while rows and not rows[0].missing:
                row = rows.popleft()
                with naming_row(done if numbered else None):
                    found = self.best(row.context, row.windows, row.logits, **(best or {}))
                yield found
                done += 1

    def tokens(self, text):
        """A text's [`Tokens`].

        Raises:
            ValueError: it has none.
        """
        encoding = self._encode(text, add_special_tokens=False)
        if not len(encoding):
            raise ValueError(f"`context` holds no text: {text[:50]!r}")
        offsets = np.array(encoding.offsets, dtype=np.int64)
        words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
        return Tokens(np.array(encoding.ids, dtype=np.int64), words, offsets[:, 0], offsets[:, 1])

    def windows(
        self,
        question,
        tokens,
        padding="do_not_pad",
        doc_stride=None,
        max_question_len=None,
        max_seq_len=None,
        from_the_end=False,
    ):
        """The windows of a context, a `list` of [`Window`] in its order.

        Args:
            question (`str`); tokens ([`Tokens`]): the context's.
            padding, doc_stride, max_question_len, max_seq_len: see the pipeline.
            from_the_end (`bool`): whether the last window is full rather than the first, as with a tokenizer that
                truncates on the left. They then come from the last to the first.

        Raises:
            ValueError: the question leaves no room for the context, `doc_stride` is too large, or the model has too
                few positions.
        """
        if max_seq_len is None:
            max_seq_len = self.max_seq_len
        if max_question_len is not None:
            question = self._cut(question, max_question_len)
        n = len(tokens.ids)
        around = self._encode((question, PROBE))
        sequence_ids = around.sequence_ids
        first, length = sequence_ids.index(1), sequence_ids.count(1)
        ids, type_ids = np.array(around.ids, dtype=np.int64), np.array(around.type_ids, dtype=np.int64)
        ids_around = ids[:first], ids[first + length :]
        type_ids_around = type_ids[:first], type_ids[first + length :]
        is_word = [
            sequence == 0 and any(map(str.isalnum, question[start:end]))
            for sequence, (start, end) in zip(sequence_ids, around.offsets)
        ]
        question_ids = np.setdiff1d(ids[is_word], self.unknown_ids)
        fitting = max_seq_len - len(sequence_ids) + length
        stride = self._checked_stride(doc_stride, max_seq_len, fitting, n, sequence_ids.count(0))
        longest = max_seq_len if padding == "max_length" else min(max_seq_len, max_seq_len - fitting + n)
        if longest > self.positions:
            raise ValueError(
                f"`max_seq_len` ({max_seq_len}) allows an input {longest} tokens long, the model has positions for "
                f"{self.positions}"
            )
        spans = [(start, min(start + fitting, n)) for start in range(0, max(1, n - stride), fitting - stride)]
        if from_the_end:
            spans = [(n - end, n - start) for start, end in spans]
        return [
            Window(
                tokens=tokens,
                span=slice(*span),
                ids_around=ids_around,
                type_ids_around=type_ids_around,
                type_id=type_ids[first],
                question_ids=question_ids,
                padded_length=max_seq_len if padding == "max_length" else 0,
            )
            for span in spans
        ]

    def _encode(self, text, add_special_tokens=True):
        """The `tokenizers.Encoding` of a text, or of a pair of them."""
        # Not `encode`, which keeps other threads waiting.
        return self.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def _cut(self, question, max_question_len):
        offsets = self._encode(question, add_special_tokens=False).offsets
        return question if len(offsets) <= max_question_len else question[: offsets[max_question_len - 1][1]]

    @staticmethod
    def _checked_stride(doc_stride, max_seq_len, fitting, context_length, question_length):
        """Tokens that neighbouring windows share, if `fitting` of a context's tokens fit in each."""
        stride = min(max_seq_len // 2, 128) if doc_stride is None else doc_stride
        if stride > max_seq_len:
            raise ValueError(f"`doc_stride` ({stride}) is larger than `max_seq_len` ({max_seq_len})")
        if fitting < 1:
            raise ValueError(
                f"`question` is {question_length} tokens long, which leaves no room for the context in `max_seq_len` "
                f"({max_seq_len})"
            )
        if stride < fitting:
            return stride
        if doc_stride is None:
            return fitting // 2
        if context_length <= fitting:
            return 0
        raise ValueError(
            f"`doc_stride` ({stride}) is not smaller than the {fitting} tokens of context that fit in `max_seq_len` "
            f"({max_seq_len}) beside the question"
        )

    def best(
        self,
        context,
        windows,
        logits,
        top_k=1,
        max_answer_len=15,
        align_to_words=True,
        handle_impossible_answer=False,
        no_answer_threshold=None,
        return_answerable=False,
    ):
        """The best answers over all windows of one text: a list, or where `top_k` is 1 a dict.

        Texts are [`ranked`] by their evidence times their window's weight; their score is that over Z, with
        Z = 1 + the sum over windows of weight (1/null - 1). Of one window that is the probability. Neither depends on
        `top_k`. "" wins where the evidence of the first text, without its weight, is below exp(`no_answer_threshold`);
        its score is what that text's would be with so much evidence, at most 1.

        Args:
            context (`str`), windows (`list` of [`Window`]), logits (as many arrays): see [`Reading.answers`].
            The others: see the pipeline.

        Raises:
            ValueError: logits that are not finite.
        """
        texts = ranked(context, windows, logits, max_answer_len, align_to_words)
        first = next(texts)
        log_evidence, _, log_null, *_ = first
        answers, seen = [], set()
        for _, log_score, _, start, end in itertools.chain([first], texts):
            text = context[start:end]
            if text.lower() not in seen:
                seen.add(text.lower())
                answers.append({"score": math.exp(min(0.0, log_score)), "start": start, "end": end, "answer": text})
                if len(answers) == top_k:
                    break
        if handle_impossible_answer:
            threshold = self.no_answer_threshold if no_answer_threshold is None else no_answer_threshold
            none = {"score": math.exp(min(0.0, threshold + log_null)), "start": 0, "end": 0, "answer": ""}
            # It stands last where it does not win; the one answer that was asked for stays.
            place = 0 if log_evidence < threshold else max(1, top_k - 1)
            answers = [*answers[:place], none, *answers[place:]][:top_k]
        if return_answerable:
            slope, intercept = self.answerable_calibration
            answerable = (1 + math.tanh((slope * log_evidence + intercept) / 2)) / 2  # the logistic function
            answers = [answer | {"answerable": answerable} for answer in answers]
        return answers if top_k > 1 else answers[0]


def batches(windows, size, tokens, at_once):
    """Yields lists of (row, number of its window): `size` each, in their order; or, where `size` is `None`, those of
    like length together, out of a row each if `at_once`, else out of groups of rows, as many as make `tokens`. Those
    that wait when `windows` raises come before its exception."""

    def cut(group):
        return of_like_length(group, tokens) if size is None else [group] if group else []

    group, waiting = [], 0
    try:
        for row, i in windows:
            group.append((row, i))
            waiting += row.windows[i].width
            if size is not None:
                full = len(group) == size
            else:
                full = waiting >= GROUP_TOKENS or (at_once and i == len(row.windows) - 1)
            if full:
                yield from cut(group)
                group, waiting = [], 0
    except Exception:
        yield from cut(group)
        raise
    yield from cut(group)


def of_like_length(group, tokens):
    """Yields the group's windows, shortest first, in lists that have so many tokens when padded; longer ones alone."""
    batch = []
    for row, i in sorted(group, key=lambda each: each[0].windows[each[1]].width):
        if batch and (len(batch) + 1) * row.windows[i].width > tokens:
            yield batch
            batch = []
        batch.append((row, i))
    if batch:
        yield batch
