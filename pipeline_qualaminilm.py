"""`pipeline("question-answering")` for transformers 4.57, and for 5, where the task was removed.

Answers, spans and scores at `top_k=1` are those of the `QuestionAnsweringPipeline` of transformers 4.57.
"""

import bisect
import heapq
import threading
import types
import warnings
from collections.abc import Iterable
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


class QuestionAnsweringPipeline(ChunkPipeline):
    """Answers questions with spans of their contexts.

    Arguments, at construction or at each call:
        question, context (`str` or lists of them, at each call): as in the built-in pipeline also one dict or a list,
            generator or `Dataset` of dicts with these keys, as first argument.
        top_k (`int`, defaults to 1): answers to return, best first; they differ as text, ignoring case.
        doc_stride (`int`): tokens that neighbouring windows of a long context share; by default 128, or half the
            window where that is less.
        max_answer_len (`int`, defaults to 15): tokens of the longest answer.
        max_seq_len (`int`): tokens of a window, question included; by default 384, or the tokenizer's maximum.
        max_question_len (`int`): tokens after which a question is cut; by default it is not.
        handle_impossible_answer (`bool`, defaults to `False`): let "" compete with the score of [CLS].
        align_to_words (`bool`, defaults to `True`): widen answers to whole words.
        padding (`bool` or `str`, defaults to `"do_not_pad"`): as in tokenizers.
        batch_size (`int`, defaults to 1): windows that pass through the model together.
        length_config: tokens each layer keeps; see `QuaLAMiniLMConfig.token_lengths`.
        show_progress_bar (`bool`, defaults to `False`, at each call): draw how many characters of the contexts have
            been read, with tqdm.

    A context is tokenised once for all questions that follow each other about it. A long one's windows are made and
    answered batch by batch: beside its text and tokens, only the logits are held, a few kB a window.

    Returns:
        for each question a dict with `score` (`float`), `start`, `end` (`int`, characters of the context) and
        `answer` (`str`, `context[start:end]`), or a list of them if there are several; a list for several questions,
        an iterator for a generator or `Dataset`.

    Raises:
        ValueError: an empty or blank question or context, one that is `None` or no text, or an argument out of range,
            naming it.
        KeyError: a dict without `question` or `context`.
    """

    # Truncation is a setting of the tokenizer object, which threads share.
    _tokenizing = threading.Lock()
    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    default_input_names = "question,context"

    def __init__(self, *args, **kwargs):
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
        **kwargs,
    ):
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

    def __call__(self, *args, num_workers=None, batch_size=None, show_progress_bar=False, **kwargs):
        """See the class. `num_workers` is accepted as in other pipelines and has no effect: windows are tokenised in
        the calling thread, which takes a small part of the time that the model does."""
        examples, single = self._examples(args, kwargs)
        self._check_ints(batch_size=(batch_size, 1))
        batch_size = batch_size or self._batch_size or 1
        call_parameters = self._sanitize_parameters(**kwargs)
        parameters = [
            {**at_init, **at_call}
            for at_init, at_call in zip(
                (self._preprocess_params, self._forward_params, self._postprocess_params), call_parameters
            )
        ]
        answers = self._answers(examples, batch_size, show_progress_bar, *parameters)
        if not isinstance(examples, list):
            return answers
        return next(answers) if single else list(answers)

    def _examples(self, args, kwargs):
        """The call's questions, a list of checked dicts or an iterator over them, and whether one answer is wanted
        rather than a list."""
        if args:
            inputs = args[0] if len(args) == 1 else list(args)
            if len(args) == 2 and all(isinstance(argument, str) for argument in args):
                inputs = {"question": args[0], "context": args[1]}
        elif "X" in kwargs or "data" in kwargs:
            inputs = kwargs.pop("X" if "X" in kwargs else "data")
        elif "question" in kwargs and "context" in kwargs:
            question, context = kwargs.pop("question"), kwargs.pop("context")
            if isinstance(question, list):
                contexts = [context] * len(question) if isinstance(context, str) else context
                if not isinstance(contexts, list):
                    raise ValueError(f"`context` is {context!r}, expected a str or a list of them")
                if len(question) != len(contexts):
                    raise ValueError("Questions and contexts don't have the same lengths")
                inputs = self.create_sample(question, contexts)
            elif isinstance(question, str) and isinstance(context, str):
                inputs = self.create_sample(question, context)
            else:
                name, text = ("context", context) if isinstance(question, str) else ("question", question)
                raise ValueError(f"`{name}` is {text!r}, expected a str, or lists of them as question and context")
        else:
            raise ValueError(f"Unknown arguments {kwargs}")
        if isinstance(inputs, Dataset) and not isinstance(inputs, IterableDataset):
            inputs = map(inputs.__getitem__, range(len(inputs)))
        if isinstance(inputs, (types.GeneratorType, IterableDataset, map)):
            return (example for item in inputs for example in self._checked(item)), False
        inputs = [inputs] if isinstance(inputs, dict) or not isinstance(inputs, Iterable) else list(inputs)
        examples = [self._checked(item) for item in inputs]
        single = len(examples) == 1 and not (isinstance(inputs[0], dict) and isinstance(inputs[0]["question"], list))
        return [example for of_item in examples for example in of_item], single

    def _checked(self, item):
        """The examples that an item stands for: itself, or one for each question of a dict of lists."""
        if hasattr(item, "question_text") and hasattr(item, "context_text"):  # 4.57's SquadExample
            item = self.create_sample(item.question_text, item.context_text)
        if not isinstance(item, dict):
            raise ValueError(f"{item} argument needs to be of type (SquadExample, dict)")
        for name in ("question", "context"):
            if name not in item:
                raise KeyError("You need to provide a dictionary with keys {question:..., context:...}")
            text = item[name]
            if text is None:
                raise ValueError(f"`{name}` cannot be None")
            if isinstance(text, str):
                if not text:
                    raise ValueError(f"`{name}` cannot be empty")
                if name == "question" and text.isspace():
                    raise ValueError(f"`question` is nothing but white space: {text[:50]!r}")
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"`{name}` is not valid Unicode text: {error}") from error
            elif not isinstance(text, list):
                raise ValueError(f"`{name}` is {text!r}, expected a str")
        if isinstance(item["question"], list):
            if not isinstance(item["context"], list) or len(item["question"]) != len(item["context"]):
                raise ValueError("Questions and contexts don't have the same lengths")
            samples = self.create_sample(item["question"], item["context"])
            return [example for sample in samples for example in self._checked(sample)]
        if isinstance(item["context"], list):
            raise ValueError("`context` is a list while `question` is one str")
        return [item]

    def _answers(self, examples, batch_size, show_progress_bar, preprocess, forward, postprocess):
        """Yields each example's answers, in order; windows of neighbouring examples share a batch."""
        waiting, answered = [], []
        characters = sum(len(example["context"]) for example in examples) if isinstance(examples, list) else None
        bar = logging.tqdm(
            total=characters, desc="Answering", unit="character", unit_scale=True, disable=not show_progress_bar
        )

        def run():
            outputs = self.forward(waiting, **forward)
            waiting.clear()
            for output in outputs:
                bar.update(output["characters"])
                answered.append(output)
                if output["is_last"]:
                    yield self.postprocess(answered, **postprocess)
                    answered.clear()

        context = tokens = None
        with bar:
            for example in examples:
                if context != example["context"]:
                    context = example["context"]
                    tokens = self._tokenize(context)
                for window in self.preprocess(example, **preprocess, tokens=tokens):
                    waiting.append(window)
                    if len(waiting) == batch_size:
                        yield from run()
            if waiting:
                yield from run()

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
        names = self.tokenizer.model_input_names
        inputs = {
            name: torch.full((len(encodings), longest), self.tokenizer.pad_token_id if name == "input_ids" else 0)
            for name in names
        }
        for row, encoding in enumerate(encodings):
            values = encoding.model_inputs()
            for name in names:
                inputs[name][row, : len(encoding)] = torch.from_numpy(values[name])
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        outputs = self.model(**inputs, length_config=length_config)
        logits = torch.stack((outputs.start_logits, outputs.end_logits), 1).float().cpu().numpy()
        # Copied, or each window would hold its whole batch's.
        return [{**window, "logits": logits[row][:, window["encoding"].scored()]} for row, window in enumerate(windows)]

    def postprocess(
        self, model_outputs, top_k=1, handle_impossible_answer=False, max_answer_len=15, align_to_words=True
    ):
        """The best answers over all windows of one example.

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
        return answers[0] if len(answers) == 1 else answers


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
