"""`pipeline("question-answering")` for transformers 4.57, and for 5, where the task was removed.

Answers, spans and scores at `top_k=1` are those of the `QuestionAnsweringPipeline` of transformers 4.57.
"""

import bisect
import heapq
import threading
import types
import warnings
from collections.abc import Iterable
from numbers import Integral

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers.pipelines.base import ChunkPipeline

# Among this many best spans of a window the built-in pipeline merges the scores of spans of one text: widening spans to
# whole words makes some alike.
MERGED_SPANS = {True: 12, False: 1}  # by align_to_words
MAX_TOKENS_PER_CHARACTER = 4  # of a byte-level tokenizer; UTF-8 has no more bytes


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

    Returns:
        for each question a dict with `score` (`float`), `start`, `end` (`int`, characters of the context) and
        `answer` (`str`, `context[start:end]`), or a list of them if there are several; a list for several questions,
        an iterator for a generator or `Dataset`.

    Raises:
        ValueError: an empty question or context, one that is `None` or no text, or an argument out of range, naming it.
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

    def __call__(self, *args, num_workers=None, batch_size=None, **kwargs):
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
        answers = self._answers(examples, batch_size, *parameters)
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
                    raise ValueError("Arguments can't be understood")
                if len(question) != len(contexts):
                    raise ValueError("Questions and contexts don't have the same lengths")
                inputs = self.create_sample(question, contexts)
            elif isinstance(question, str) and isinstance(context, str):
                inputs = self.create_sample(question, context)
            else:
                raise ValueError("Arguments can't be understood")
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

    def _answers(self, examples, batch_size, preprocess, forward, postprocess):
        """Yields each example's answers, in order; windows of neighbouring examples share a batch."""
        waiting, answered = [], []

        def run():
            outputs = self.forward(waiting, **forward)
            waiting.clear()
            for output in outputs:
                answered.append(output)
                if output["is_last"]:
                    yield self.postprocess(answered, **postprocess)
                    answered.clear()

        for example in examples:
            for window in self.preprocess(example, **preprocess):
                waiting.append(window)
                if len(waiting) == batch_size:
                    yield from run()
        if waiting:
            yield from run()

    def preprocess(self, example, padding="do_not_pad", doc_stride=None, max_question_len=None, max_seq_len=None):
        """Yields a dict for each window of the example: its `tokenizers.Encoding` and the range of its context."""
        question, context = example["question"], example["context"]
        if max_seq_len is None:
            max_seq_len = min(self.tokenizer.model_max_length, 384)
        if max_question_len is not None:
            question = self._cut(question, max_question_len)
        with self._tokenizing:
            encoded = self.tokenizer(
                question,
                context,
                padding=padding,
                truncation="only_second",
                max_length=max_seq_len,
                stride=self._checked_stride(doc_stride, question, context, max_seq_len),
                return_overflowing_tokens=True,
            )
        windows = []
        for encoding in encoded.encodings:
            sequence_ids = np.array([-1 if i is None else i for i in encoding.sequence_ids])
            in_context = np.flatnonzero(sequence_ids == 1)
            if in_context.size:
                windows.append({"example": example, "encoding": encoding, "in_context": in_context, "is_last": False})
        if not windows:
            raise ValueError(f"`context` holds no text: {context[:50]!r}")
        windows[-1]["is_last"] = True
        yield from windows

    def _cut(self, question, max_question_len):
        with self._tokenizing:
            encoded = self.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        return question if len(offsets) <= max_question_len else question[: offsets[max_question_len - 1][1]]

    def _checked_stride(self, doc_stride, question, context, max_seq_len):
        """A stride that the tokenizer takes: it panics at one as large as what the question leaves of the window."""
        stride = min(max_seq_len // 2, 128) if doc_stride is None else doc_stride
        if stride > max_seq_len:
            raise ValueError(f"`doc_stride` ({stride}) is larger than `max_seq_len` ({max_seq_len})")
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        if MAX_TOKENS_PER_CHARACTER * len(question) + special + stride < max_seq_len:
            return stride
        length = len(self.tokenizer(question, add_special_tokens=False)["input_ids"])
        room = max_seq_len - special - length
        if room < 1:
            raise ValueError(
                f"`question` is {length} tokens long, which leaves no room for the context in `max_seq_len` "
                f"({max_seq_len})"
            )
        if stride < room:
            return stride
        if doc_stride is None:
            return room // 2
        if len(self.tokenizer(context, add_special_tokens=False)["input_ids"]) <= room:
            return 0
        raise ValueError(
            f"`doc_stride` ({stride}) is not smaller than the {room} tokens of context that fit in `max_seq_len` "
            f"({max_seq_len}) beside the question"
        )

    def _forward(self, windows, length_config=None):
        encodings = [window["encoding"] for window in windows]
        longest = max(len(encoding) for encoding in encodings)
        names = self.tokenizer.model_input_names
        inputs = {
            name: torch.full((len(encodings), longest), self.tokenizer.pad_token_id if name == "input_ids" else 0)
            for name in names
        }
        attributes = {"input_ids": "ids", "token_type_ids": "type_ids", "attention_mask": "attention_mask"}
        for row, encoding in enumerate(encodings):
            for name in names:
                values = getattr(encoding, attributes[name])
                inputs[name][row, : len(values)] = torch.tensor(values)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        outputs = self.model(**inputs, length_config=length_config)
        logits = torch.stack((outputs.start_logits, outputs.end_logits), 1).float().cpu().numpy()
        return [{**window, "logits": logits[row]} for row, window in enumerate(windows)]

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


class SpanScores:
    """Probabilities of the answer spans of one window, over its context tokens and, for no answer, [CLS].

    Attributes:
        size (`int`): how many spans there are.
        null_score (`float`): p(start) p(end) of [CLS].
    """

    def __init__(self, output, max_answer_len, align_to_words):
        self.context, self.encoding = output["example"]["context"], output["encoding"]
        self.in_context, self.align_to_words = output["in_context"], align_to_words
        logits = output["logits"][:, np.concatenate(([0], self.in_context))]
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        self.null_score = float(probabilities[0, 0] * probabilities[1, 0])
        starts, ends = probabilities[:, 1:]
        # Row i of `scores` holds the spans that start at context token i; those past the last token do not exist.
        self.longest = min(max_answer_len, len(ends))
        reach = np.concatenate((ends, np.full(self.longest - 1, np.nan, ends.dtype)))
        scores = starts[:, None] * np.lib.stride_tricks.sliding_window_view(reach, self.longest)
        self.scores = np.nan_to_num(scores, nan=-1.0).ravel()
        self.size = int((self.scores >= 0).sum())

    def best(self, first, last):
        """Yields the answers from rank `first` to before rank `last`, best first; ties go to the earlier span."""
        last = min(last, self.size)
        if first >= last:
            return
        top = np.argpartition(-self.scores, last - 1)[:last]
        for flat in top[np.lexsort((top, -self.scores[top]))][first:]:
            row, further = divmod(int(flat), self.longest)
            start, end = self._characters(int(self.in_context[row]), int(self.in_context[row + further]))
            yield {"score": float(self.scores[flat]), "start": start, "end": end, "answer": self.context[start:end]}

    def _characters(self, first, last):
        """Characters of the context from token `first` to token `last`, widened to whole words if asked to."""
        if self.align_to_words:
            words = self.encoding.token_to_word(first), self.encoding.token_to_word(last)
            if None not in words:
                return self.encoding.word_to_chars(words[0], 1)[0], self.encoding.word_to_chars(words[1], 1)[1]
        return self.encoding.offsets[first][0], self.encoding.offsets[last][1]
