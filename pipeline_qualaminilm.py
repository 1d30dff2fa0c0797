"""`pipeline("question-answering")` for transformers 4.57, and for 5, where the task was removed.

Spans and scores are those of the `QuestionAnsweringPipeline` of transformers 4.57, but that an answer does not end in
the middle of an address, a file name or a number; the class lists where else it differs.
"""

import bisect
import contextlib
import difflib
import heapq
import inspect
import re
import reprlib
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

# Among this many best spans of a window the built-in pipeline merges the scores of spans of one text: widening spans to
# whole words makes some alike.
MERGED_SPANS = {True: 12, False: 1}  # by align_to_words
PADDINGS = (True, False, "longest", "max_length", "do_not_pad")
PROBE = "a"  # what stands for the context where the tokens around it are found
# Arguments that other versions of transformers take, or that its `pipeline()` reads and hands on all the same.
OF_TRANSFORMERS = ("framework", "modelcard", "local_files_only")
AT_CALLS = ("question", "context", "show_progress_bar")  # beside the pipeline's `PARAMETERS`

# For [`whole_string`]. A run stands between blanks, or quotes, brackets and letters that no address or file name has:
# those from Thai to Khmer, dashes, arrows, everything from Chinese on. The euro and the minus sign are in it.
RUN = re.compile(r'[^\s"<>\[\]{}|;`\u0e00-\u1dff\u2000-\u20ab\u20ad-\u2211\u2213-\U0010ffff]*')
# In a run, what its string begins after or ends before: lists and labels, but `1,200` and `host:80`.
PARTING = re.compile(r"(?<![0-9]),|,(?![0-9])|(?<=[^\W\d_]):(?=[^\W\d_])")
LONGEST_RUN = 1000  # characters
# What runs are strings, left as they are but for their ends; see `whole_string`.
STRING = re.compile(
    r"@|://|_"
    r"|[^\W_][#$%&*^~][^\W_]"
    r"|[^\W_]\+[0-9]"
    r"|[0-9]\.[0-9]|[^\W_]\.[a-z]|[A-Z]\.[A-Z](?![a-z])"
    r"|[0-9]/[0-9]|[A-Z]/[A-Z](?![a-z])|/.*/|^[.~]*/"
    r"|^[-+\u2212\u00b1]\.?[0-9]"
    r"|^(?=.*[0-9]).*[^\W_]![^\W_]"
)
SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*$")  # of an address, before its ://
COUNTRY = re.compile(r"[A-Z]{1,3}(?=[$\u00a3\u20ac][0-9])")  # the US of `US$5`
FIELD = re.compile(r"[^\w\n]*(?P<field>\w[^:\n]{0,39}):[ \t]+\S")  # a line that begins so is `field: value`
WRAPPED = 50  # characters, from which on a line may be one of several that are one paragraph


class QuestionAnsweringPipeline(ChunkPipeline):
    """Answers questions with spans of their contexts.

    What is asked, at each call:
        question, context: two `str`; or lists (or tuples) of them, as many of one as of the other, or one `str` as
            the context of all questions.
        Or, as first argument: a dict with the keys question and context, of texts or of lists of them; a list or
            tuple of such dicts; or any other iterable of them, a generator, a `csv.DictReader` or a
            `datasets.Dataset` for instance, or a map-style `torch.utils.data.Dataset`.

    Arguments, at construction or at each call; any other is an error:
        top_k (`int`, defaults to 1): answers to return, best first; they differ as text, ignoring case.
        doc_stride (`int`): tokens that neighbouring windows of a long context share; by default 128, or half the
            window where that is less.
        max_answer_len (`int`, defaults to 15): tokens of the longest answer, before it is widened.
        max_seq_len (`int`): tokens of a window, question included; by default 384, or the tokenizer's maximum.
        max_question_len (`int`): tokens after which a question is cut; by default it is not.
        handle_impossible_answer (`bool`, defaults to `False`): let "" compete with the score of [CLS].
        align_to_words (`bool`, defaults to `True`): widen answers to whole words, and to whole strings as
            [`whole_string`] says.
        padding (`bool` or `str`, defaults to `"do_not_pad"`): as in tokenizers.
        batch_size (`int`, defaults to 1): windows that pass through the model together.
        length_config: tokens each layer keeps; see `QuaLAMiniLMConfig.token_lengths`.
        show_progress_bar (`bool`, defaults to `False`, at each call): draw how many characters of the contexts have
            been read, with tqdm.

    A context is tokenised once for all questions that follow each other about it. A long one's windows are made and
    answered batch by batch: beside its text and tokens, only the logits are held, a few kB a window.

    Returns:
        for each question a dict with `score` (`float`), `start`, `end` (`int`, characters of the context) and
        `answer` (`str`, `context[start:end]`); where `top_k` is above 1, a list of at most as many. That for one
        question, given as two texts or a dict of them; a list of these for lists and tuples, of whatever length; an
        iterator over them for any other iterable, which is read as far as its answers are asked for.

    Raises:
        ValueError: an empty or blank question or context, one that is `None` or no text, logits of the model that are
            not finite, or an argument that is unknown or out of range, naming it.
        KeyError: a dict without `question` or `context`.

        Of several questions, the message names the one at fault by its number: "row 0: " is the first. In a list all
        are looked at before the model runs. What only the tokenizer or the model can tell, that a question leaves
        no room for its context for instance, is found when its turn comes. Every exception that ends a list has the
        answers to the questions before, in order, as its attribute `answers`; a stream gives them first, then raises.

    Where it differs from the pipeline of transformers 4.57:
        - A list of one question gives a list, where 4.57 gives what is in it; `top_k` above 1 a list even of one.
        - Unknown arguments are an error, 4.57 ignores them.
        - Iterables other than lists and tuples are streams, `datasets.Dataset` among them; 4.57 streams generators and
          torch's data sets, and makes lists of the others.
        - Questions of a stream are checked too. Faults name their row, and rows before them are answered.
        - A question or a context of nothing but white space is an error.
        - Answers are whole strings, and end with the `field: value` line that they begin in: [`whole_string`].
        - The answers of `top_k` differ as text and there are as many as asked for, if the text has as many; their
          scores do not depend on `top_k`.
        - `max_question_len` holds, and is unset by default; 4.57 ignores it with a fast tokenizer.
        - Where 128 shared tokens do not fit in a window beside a long question, by default fewer are shared.
    """

    # Truncation is a setting of the tokenizer object, which threads share.
    _tokenizing = threading.Lock()
    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    default_input_names = "question,context"
    modelcard = None  # transformers 5.0 saves it, and has none
    # Names of the arguments, but for those that are taken for 4.57's sake.
    PARAMETERS = (
        "align_to_words",
        "batch_size",
        "doc_stride",
        "handle_impossible_answer",
        "length_config",
        "max_answer_len",
        "max_question_len",
        "max_seq_len",
        "top_k",
    )

    def __init__(self, *args, **kwargs):
        known = inspect.signature(ChunkPipeline.__init__).parameters
        for name in OF_TRANSFORMERS:
            if name not in known:
                kwargs.pop(name, None)
        super().__init__(*args, **kwargs)
        if not getattr(self.tokenizer, "is_fast", False) or self.tokenizer.padding_side != "right":
            raise ValueError(f"tokenizer is {self.tokenizer!r}, expected a fast tokenizer that pads on the right")
        self._check_ints(batch_size=(self._batch_size, 1))

    @staticmethod
    def create_sample(question, context):
        """The dict (for lists: the list of dicts) that stands for a question and its context."""
        if isinstance(question, list):
            return [{"question": q, "context": c} for q, c in zip(question, context)]
        return {"question": question, "context": context}

    def _sanitize_parameters(
        self,
        padding=None,
        topk=None,
        top_k=None,
        doc_stride=None,
        max_answer_len=None,
        max_seq_len=None,
        max_question_len=None,
        handle_impossible_answer=None,
        align_to_words=None,
        length_config=None,
        **unknown,
    ):
        if unknown:
            name = next(iter(unknown))
            near = difflib.get_close_matches(name, (*self.PARAMETERS, *AT_CALLS), n=1)
            hint = f": did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown argument {name!r}{hint} Accepted: {', '.join(self.PARAMETERS)}")
        if topk is not None:
            warnings.warn("topk parameter is deprecated, use top_k instead", UserWarning, stacklevel=2)
            top_k = topk if top_k is None else top_k
        self._check_ints(
            top_k=(top_k, 1),
            max_answer_len=(max_answer_len, 1),
            max_seq_len=(max_seq_len, 1),
            max_question_len=(max_question_len, 1),
            doc_stride=(doc_stride, 0),
        )
        if padding is not None and padding not in PADDINGS:
            raise ValueError(f"padding is {padding!r}, expected one of {PADDINGS}")
        if length_config is not None:
            self.model.config.token_lengths(length_config)
        preprocess = {
            "padding": padding,
            "doc_stride": doc_stride,
            "max_question_len": max_question_len,
            "max_seq_len": max_seq_len,
        }
        postprocess = {
            "top_k": top_k,
            "max_answer_len": max_answer_len,
            "handle_impossible_answer": handle_impossible_answer,
            "align_to_words": align_to_words,
        }
        return tuple(
            {name: value for name, value in parameters.items() if value is not None}
            for parameters in (preprocess, {"length_config": length_config}, postprocess)
        )

    @staticmethod
    def _check_ints(**arguments):
        for name, (value, least) in arguments.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
                raise ValueError(f"{name} parameter should be an int >= {least} (got {value!r})")

    def __call__(
        self,
        *args,
        question=None,
        context=None,
        data=None,
        X=None,
        num_workers=None,
        batch_size=None,
        show_progress_bar=False,
        **kwargs,
    ):
        """See the class. `num_workers` is accepted as in other pipelines and has no effect: windows are tokenised in
        the calling thread, which takes a small part of the time that the model does. `data` and `X` are 4.57's names
        of the first argument."""
        self._check_ints(batch_size=(batch_size, 1))
        batch_size = batch_size or self._batch_size or 1
        call_parameters = self._sanitize_parameters(**kwargs)
        parameters = [
            {**at_init, **at_call}
            for at_init, at_call in zip(
                (self._preprocess_params, self._forward_params, self._postprocess_params), call_parameters
            )
        ]
        items, is_single = self._items(args, question, context, X if data is None else data)
        examples = self._examples(items, is_single)
        if not isinstance(items, list):
            return self._answers(examples, is_single, batch_size, show_progress_bar, *parameters)
        answers = []
        try:
            for answer in self._answers(list(examples), is_single, batch_size, show_progress_bar, *parameters):
                answers.append(answer)
        except Exception as error:
            error.answers = answers
            raise
        return answers[0] if is_single else answers

    @staticmethod
    def _items(args, question, context, data):
        """What a call asks, unchecked: a list, or another iterable for a stream; and whether it is a single
        question."""
        ways = bool(args) + (question is not None or context is not None) + (data is not None)
        if ways != 1:
            raise ValueError(
                "expected `question` and `context`, or as first argument a dict with these keys or an iterable of such "
                f"dicts{', not both' * (ways > 1)}"
            )
        if args:
            is_pair = len(args) == 2 and all(isinstance(argument, str) for argument in args)
            data = dict(zip(("question", "context"), args)) if is_pair else args[0] if len(args) == 1 else args
        elif data is None:
            data = {"question": question, "context": context}
        if isinstance(data, Mapping) or is_squad_example(data):
            return [data], not (isinstance(data, Mapping) and is_list(data.get("question")))
        if isinstance(data, (list, tuple)):
            return list(data), False
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            return map(data.__getitem__, range(len(data))), False
        if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
            return iter(data), False
        raise ValueError(f"the first argument is {reprlib.repr(data)}, expected a dict or an iterable of dicts")

    def _examples(self, items, is_single):
        """Yields the questions that `items` ask, one by one, as checked dicts."""
        row = 0
        for item in items:
            with naming_row(None if is_single else row):
                samples = self._samples(item)
            for sample in samples:
                with naming_row(None if is_single else row):
                    self._check(sample)
                yield sample
                row += 1

    def _samples(self, item):
        """The questions that an item asks, a list of dicts: itself, or each of its lists'."""
        if is_squad_example(item):
            return [self.create_sample(item.question_text, item.context_text)]
        if not isinstance(item, Mapping):
            raise ValueError(f"{reprlib.repr(item)} is no dict with the keys question and context")
        if not {"question", "context"} <= item.keys():
            raise KeyError("You need to provide a dictionary with keys {question:..., context:...}")
        question, context = item["question"], item["context"]
        if not is_list(question):
            return [self.create_sample(question, context)]
        contexts = [context] * len(question) if isinstance(context, str) else context
        if not is_list(contexts):
            raise ValueError(f"`context` is {reprlib.repr(context)}, expected a str or a list of them")
        if len(question) != len(contexts):
            raise ValueError("Questions and contexts don't have the same lengths")
        return self.create_sample(list(question), contexts)

    @staticmethod
    def _check(sample):
        for name, text in sample.items():
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

    def _answers(self, examples, is_single, batch_size, show_progress_bar, preprocess, forward, postprocess):
        """Yields each example's answers, in order; windows of neighbouring examples share a batch."""
        characters = sum(len(example["context"]) for example in examples) if isinstance(examples, list) else None
        bar = logging.tqdm(
            total=characters, desc="Answering", unit="character", unit_scale=True, disable=not show_progress_bar
        )
        row, answered = 0, []
        with bar:
            for batch in batches(self._windows(examples, is_single, preprocess), batch_size):
                for output in self.forward(batch, **forward):
                    bar.update(output["characters"])
                    answered.append(output)
                    if output["is_last"]:
                        with naming_row(None if is_single else row):
                            answer = self.postprocess(answered, **postprocess)
                        yield answer
                        row, answered = row + 1, []

    def _windows(self, examples, is_single, preprocess):
        """Yields the windows of all examples, see `preprocess`."""
        context = tokens = None
        for row, example in enumerate(examples):
            with naming_row(None if is_single else row):
                if context != example["context"]:
                    context = example["context"]
                    tokens = self._tokenize(context)
                yield from self.preprocess(example, **preprocess, tokens=tokens)

    def preprocess(
        self,
        example,
        padding="do_not_pad",
        doc_stride=None,
        max_question_len=None,
        max_seq_len=None,
        tokens=None,
    ):
        """Yields a dict for each window of the example, in the context's order: its [`Encoding`], how many characters
        of the context it stands for, and whether it is the last.

        `tokens` are the context's, where they are known: [`Tokens`].
        """
        question, context = example["question"], example["context"]
        if max_seq_len is None:
            max_seq_len = min(self.tokenizer.model_max_length, 384)
        if max_question_len is not None:
            question = self._cut(question, max_question_len)
        if tokens is None:
            tokens = self._tokenize(context)
        n = len(tokens.ids)
        if not n:
            raise ValueError(f"`context` holds no text: {context[:50]!r}")
        around = self._encode(question, PROBE)
        sequence_ids = around.sequence_ids
        first, length = sequence_ids.index(1), sequence_ids.count(1)
        ids, type_ids = np.array(around.ids), np.array(around.type_ids)
        ids_around = ids[:first], ids[first + length :]
        type_ids_around = type_ids[:first], type_ids[first + length :]
        room = max_seq_len - len(sequence_ids) + length
        stride = self._checked_stride(doc_stride, max_seq_len, room, n, sequence_ids.count(0))
        longest = max_seq_len if padding == "max_length" else min(max_seq_len, max_seq_len - room + n)
        positions = self.model.config.max_position_embeddings - self.model.config.first_position
        if longest > positions:
            raise ValueError(
                f"`max_seq_len` ({max_seq_len}) allows an input {longest} tokens long, the model has positions for "
                f"{positions}"
            )
        spans = [(start, min(start + room, n)) for start in range(0, max(1, n - stride), room - stride)]
        if self.tokenizer.truncation_side == "left":
            spans = [(n - end, n - start) for start, end in spans]
        for i, span in enumerate(spans):
            yield {
                "example": example,
                "encoding": Encoding(
                    tokens=tokens,
                    span=slice(*span),
                    ids_around=ids_around,
                    type_ids_around=type_ids_around,
                    type_id=type_ids[first],
                    padded_length=max_seq_len if padding == "max_length" else 0,
                ),
                "characters": len(context) * (i + 1) // len(spans) - len(context) * i // len(spans),
                "is_last": i == len(spans) - 1,
            }

    def _encode(self, *texts):
        """The `tokenizers.Encoding` of a text, or of two with the special tokens around them."""
        with self._tokenizing:
            return self.tokenizer(
                *texts,
                add_special_tokens=len(texts) == 2,
                padding=False,
                truncation=False,
                return_token_type_ids=False,
                return_attention_mask=False,
                verbose=False,  # else it warns of texts longer than a window
            ).encodings[0]

    def _tokenize(self, text):
        encoding = self._encode(text)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
        return Tokens(np.array(encoding.ids, dtype=np.int64), words, offsets[:, 0], offsets[:, 1])

    def _cut(self, question, max_question_len):
        offsets = self._encode(question).offsets
        return question if len(offsets) <= max_question_len else question[: offsets[max_question_len - 1][1]]

    @staticmethod
    def _checked_stride(doc_stride, max_seq_len, room, context_length, question_length):
        """Tokens that neighbouring windows share, if `room` of a context's tokens fit in each."""
        stride = min(max_seq_len // 2, 128) if doc_stride is None else doc_stride
        if stride > max_seq_len:
            raise ValueError(f"`doc_stride` ({stride}) is larger than `max_seq_len` ({max_seq_len})")
        if room < 1:
            raise ValueError(
                f"`question` is {question_length} tokens long, which leaves no room for the context in `max_seq_len` "
                f"({max_seq_len})"
            )
        if stride < room:
            return stride
        if doc_stride is None:
            return room // 2
        if context_length <= room:
            return 0
        raise ValueError(
            f"`doc_stride` ({stride}) is not smaller than the {room} tokens of context that fit in `max_seq_len` "
            f"({max_seq_len}) beside the question"
        )

    def _forward(self, windows, length_config=None):
        encodings = [window["encoding"] for window in windows]
        longest = max(max(len(encoding), encoding.padded_length) for encoding in encodings)
        shape = len(encodings), longest
        # Always all three: some versions of transformers say of BERT's tokenizer that it gives no token types.
        inputs = {
            "input_ids": torch.full(shape, self.tokenizer.pad_token_id),
            "token_type_ids": torch.zeros(shape, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        for row, encoding in enumerate(encodings):
            for name, values in encoding.model_inputs().items():
                inputs[name][row, : len(encoding)] = torch.from_numpy(values)
        inputs["token_type_ids"].clamp_(max=self.model.config.type_vocab_size - 1)  # RoBERTa has one type
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        outputs = self.model(**inputs, length_config=length_config)
        logits = torch.stack((outputs.start_logits, outputs.end_logits), 1).float().cpu().numpy()
        # Copied, or each window would hold its whole batch's.
        return [{**window, "logits": logits[row][:, window["encoding"].scored()]} for row, window in enumerate(windows)]

    def postprocess(
        self, model_outputs, top_k=1, handle_impossible_answer=False, max_answer_len=15, align_to_words=True
    ):
        """The best answers over all windows of one example: a list, or where `top_k` is 1 a dict.

        A text's score is the sum over windows of p(start) p(end) of those of its spans that are among the window's 12
        best (the best alone without `align_to_words`); of its best span alone if none is. Scores therefore do not
        depend on `top_k`.
        """
        merged_spans = MERGED_SPANS[bool(align_to_words)]
        windows = [SpanScores(output, max_answer_len, align_to_words) for output in model_outputs]
        answers = {}
        for window in windows:
            for answer in window.best(0, merged_spans):
                known = answers.setdefault(answer["answer"].lower(), answer)
                if known is not answer:
                    known["score"] += answer["score"]
        if top_k > 1:
            merged = sorted(-answer["score"] for answer in answers.values())
            rest = (window.best(merged_spans, window.size) for window in windows)
            for answer in heapq.merge(*rest, key=lambda answer: -answer["score"]):
                better = bisect.bisect_right(merged, -answer["score"]) + len(answers) - len(merged)
                if better >= top_k:
                    break
                answers.setdefault(answer["answer"].lower(), answer)
        answers = list(answers.values())
        if handle_impossible_answer:
            answers.append({"score": min(window.null_score for window in windows), "start": 0, "end": 0, "answer": ""})
        answers = sorted(answers, key=lambda answer: answer["score"], reverse=True)[:top_k]
        return answers if top_k > 1 else answers[0]


def is_list(value):
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def is_squad_example(item):
    """Whether it is 4.57's `SquadExample`."""
    return hasattr(item, "question_text") and hasattr(item, "context_text")


@contextlib.contextmanager
def naming_row(row):
    """Puts a row's number, unless it is `None`, before the message of what the pipeline finds wrong with it."""
    try:
        yield
    except (ValueError, KeyError) as error:
        if row is not None:
            error.args = (f"row {row}: {error.args[0]}", *error.args[1:])
        raise


def batches(items, size):
    """Yields lists of so many items; those that wait when `items` raises come before its exception."""
    batch = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def whole_string(context, start, end):
    """The answer `context[start:end]`, ended with its field, then widened to whole strings: (start, end).

    A run is what stands between blanks (more exactly: `RUN`), without quotes, brackets and closing punctuation at its
    ends. Where the answer's first or last character stands in a run that is a string, the answer begins or ends with
    it; elsewhere it stays as it is, so that plain words are never joined. A run is a string if it holds

    - @, :// or _;
    - a dot before a digit, after one; before a small letter, after any letter or digit; or between capitals. Not that
      of `end.Next`, a full stop whose blank is missing;
    - a slash between digits or capitals, at its beginning, or a second one. Not that of `and/or`;
    - one of # $ % & * ^ ~ between letters or digits, a + before a digit, a ! between such where it also has a digit;
    - a sign at its beginning, before a number.

    A hyphen makes no string: people mean the 24 of `24-year-old` and the 1914 of `1914-1918` as often as the whole.

    An answer ends with the line of the form `field: value` whose end it would run over, unless it begins with that
    line's field, or the next line goes on with the value: it is no field itself, and begins with a small letter, or
    the first ends with a comma or the like, or is so long (`WRAPPED`) that it was wrapped.

    Args:
        context (`str`); start, end (`int`): characters of it, `start < end`.
    """
    end = end_of_field(context, start, end)
    return min(start, string_around(context, start)[0]), max(end, string_around(context, end - 1)[1])


def string_around(context, place):
    """Where the string that the character at `place` is part of starts and ends; that character alone if it is of
    none."""
    alone = place, place + 1
    start = place - RUN.match(context[max(0, place - LONGEST_RUN) : place][::-1]).end()
    end = place + RUN.match(context[place : place + LONGEST_RUN]).end()
    if end - start >= LONGEST_RUN:
        return alone
    partings = [start + parting.start() for parting in PARTING.finditer(context[start:end])]
    start = max([start, *(parting + 1 for parting in partings if parting < place)])
    end = min([end, *(parting for parting in partings if parting >= place)])
    run = context[start:end]
    while run:
        unmatched = run.count("(") != run.count(")")
        if run[0] in "'*:=" or (run[0] == "(" and (unmatched or run[-1] == ")")):
            start += 1
        elif run[-1] in ".,:!?'*" or (run[-1] == ")" and unmatched):
            end -= 1
        elif run.endswith("'s"):
            end -= 2
        else:
            break
        run = context[start:end]
    if "://" in run:
        scheme = SCHEME.search(run[: run.index("://")])
        start += scheme.start() if scheme else 0
    else:
        country = COUNTRY.match(run)
        start += country.end() if country else 0
    return (start, end) if start <= place < end and STRING.search(run) else alone


def end_of_field(context, start, end):
    """Where the answer `context[start:end]` ends so that it does not run over the end of a field; see
    [`whole_string`]."""
    start += len(context[start:end]) - len(context[start:end].lstrip())
    stop = context.find("\n", start, end)
    if stop < 0:
        return end
    first = context.rfind("\n", 0, start) + 1
    while stop >= 0:
        line = context[first:stop].rstrip()
        following = context[stop + 1 : stop + 1 + WRAPPED]
        field = FIELD.match(line)
        if field and start not in range(first, first + field.start("field") + 1) and not goes_on(line, following):
            return first + len(line)
        first, stop = stop + 1, context.find("\n", stop + 1, end)
    return end


def goes_on(line, following):
    """Whether a paragraph's line goes on in what follows it."""
    following = following.split("\n")[0].strip()
    if not following or FIELD.match(following):
        return False
    return following[0].islower() or line[-1] in ",/&(" or len(line) >= WRAPPED


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
class Encoding:
    """One window: some of a context's tokens between the question's and the special ones. `len()` counts them all.

    Attributes:
        tokens ([`Tokens`]), span (`slice`): the window's are these of the context's.
        ids_around, type_ids_around: what stands before and after them, two int64 arrays each.
        type_id (`int`): of the context's tokens.
        padded_length (`int`): tokens to pad to, where these are fewer.
    """

    tokens: Tokens
    span: slice
    ids_around: tuple
    type_ids_around: tuple
    type_id: int
    padded_length: int

    def __len__(self):
        return len(self.ids_around[0]) + self.span.stop - self.span.start + len(self.ids_around[1])

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
        whole words, as far as they stand in the window, if `align_to_words`."""
        if align_to_words:
            words = self.tokens.words[self.span]
            if words[first] != -1 != words[last]:
                first = np.flatnonzero(words == words[first])[0]
                last = np.flatnonzero(words == words[last])[-1]
        return int(self.tokens.starts[self.span][first]), int(self.tokens.ends[self.span][last])


class SpanScores:
    """Probabilities of the answer spans of one window, over its context tokens and, for no answer, [CLS].

    Attributes:
        size (`int`): how many spans there are.
        null_score (`float`): p(start) p(end) of [CLS].
    """

    def __init__(self, output, max_answer_len, align_to_words):
        self.context, self.encoding = output["example"]["context"], output["encoding"]
        self.align_to_words = align_to_words
        logits = output["logits"]
        if not np.isfinite(logits).all():
            raise ValueError(
                "the model's logits are not finite: are its weights damaged, or too large for their dtype?"
            )
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        self.null_score = float(probabilities[0, 0] * probabilities[1, 0])
        self.starts, self.ends = probabilities[:, 1:]
        self.longest = min(max_answer_len, len(self.ends))
        self.size = len(self.ends) * self.longest - self.longest * (self.longest - 1) // 2

    def best(self, first, last):
        """Yields the answers from rank `first` to before rank `last`, best first; ties go to the earlier span."""
        last = min(last, self.size)
        while first < last:
            # A long text has many windows, of whose spans few are ever asked for.
            until = min(last, max(2 * first, 16))
            for score, start, end in self._ranked(first, until):
                start, end = self.encoding.characters(start, end, self.align_to_words)
                if self.align_to_words:
                    start, end = whole_string(self.context, start, end)
                yield {"score": score, "start": start, "end": end, "answer": self.context[start:end]}
            first = until

    def _ranked(self, first, last):
        """Spans from rank `first` to before rank `last`: a list of score, first and last token."""
        # Row i holds the spans that start at context token i; those past the last token do not exist.
        reach = np.concatenate((self.ends, np.full(self.longest - 1, np.nan, self.ends.dtype)))
        scores = self.starts[:, None] * np.lib.stride_tricks.sliding_window_view(reach, self.longest)
        scores = np.nan_to_num(scores, nan=-1.0).ravel()
        top = np.flatnonzero(scores >= np.partition(scores, -last)[-last])
        top = top[np.argsort(-scores[top], kind="stable")][first:last]
        return [
            (float(scores[flat]), flat // self.longest, flat // self.longest + flat % self.longest)
            for flat in top.tolist()
        ]
