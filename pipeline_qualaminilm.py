"""`pipeline("question-answering")` for transformers 4.57, and for 5, where the task was removed.

How texts are read and answered stands in reading_qualaminilm.py; here are the forms of call that 4.57 has, and torch.
"""

import difflib
import inspect
import reprlib
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

from .reading_qualaminilm import (
    BATCH_TOKENS,
    Reading,
    check_asked,
    check_example,
    check_options,
    given,
    naming_row,
    padded,
)
from .spans_qualaminilm import whole_string  # noqa: F401  transformers 4.57 copies a local file's own imports alone

# Arguments that other versions of transformers take, or that its `pipeline()` reads and hands on all the same.
OF_TRANSFORMERS = ("framework", "modelcard", "local_files_only")
AT_CALLS = ("question", "context", "show_progress_bar")  # beside the pipeline's `PARAMETERS`
FASTER_DEVICES = 16  # times as many tokens a batch, by default, on what is no CPU


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
        handle_impossible_answer (`bool`, defaults to `False`): answer "" where the text does not answer, that is, where
            the best answer has less evidence than `no_answer_threshold`. Of `top_k` answers above 1, "" is the first if
            it wins, else the last.
        no_answer_threshold (`float`): in log units; by default that of config.json, where it was chosen on validation
            questions, else 0: an answer has to be as probable as none.
        return_answerable (`bool`, defaults to `False`): add `answerable` to each answer: how sure the model is that
            the text answers at all, in [0, 1]; a function of the best answer's evidence, calibrated in config.json.
        align_to_words (`bool`, defaults to `True`): widen answers to whole words, and to whole strings as
            [`whole_string`] says.
        padding (`bool` or `str`, defaults to `"do_not_pad"`): as in tokenizers.
        batch_size (`int`): windows that pass through the model together, in their order; rows of a stream wait for each
            other. By default as many as make a few thousand tokens: those of a text, and in a list those of like
            length. A row of a stream is then answered before the next one is read.
        length_config: tokens each layer keeps; see `QuaLAMiniLMConfig.token_lengths`.
        show_progress_bar (`bool`, defaults to `False`, at each call): draw how many characters of the contexts have
            been read, with tqdm.

    A context is tokenised once for all questions that follow each other about it. A long one is read in windows, and
    beside its text and tokens, only their logits are held, a few kB a window.

    Across windows, answers are compared by evidence: p(start) p(end), over p(start) p(end) of no answer, [CLS], in the
    same window; times a weight, the product over the question's tokens that the window holds of
    (windows + 1) / (windows that hold it + 1/2), divided by the greatest of such products. What several windows or
    places answer alike counts once, where it has most. With e its evidence, w its window's weight and
    Z = 1 + the sum over windows of w (1/p(no answer) - 1), an answer's score is w e/Z: of a text of one window, its
    probability. That of "" is the best answer's if its e were exp(`no_answer_threshold`), 1 at most.

    Returns:
        for each question a dict with `score` (`float`, in [0, 1]), `start`, `end` (`int`, characters of the context)
        and `answer` (`str`, `context[start:end]`); where `top_k` is above 1, a list of at most as many. That for one
        question, given as two texts or a dict of them; a list of these for lists and tuples, of whatever length; an
        iterator over them for any other iterable, which is read as far as its answers are asked for.

    Raises:
        ValueError: an empty or blank question or context, one that is `None` or no text, logits of the model that are
            not finite, or an argument that is unknown or out of range, naming it.
        KeyError: a dict without `question` or `context`.

        Of several questions, the message names the one at fault by its number: "row 0: " is the first. In a list all
        are looked at before the model runs. What only the tokenizer or the model can tell, that a question leaves
        no room for its context for instance, is found when its turn comes. Every exception that ends a list has the
        answers to the questions before, in order, as its attribute `answers` (what the model itself raises: to those
        that it had answered); a stream gives them first, then raises.

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
        - Windows are compared by evidence, and by the question's words in them. 4.57 compares probabilities, which each
          window has of itself, and adds up those of one text. Of a text of one window, scores are the same.
        - `handle_impossible_answer`: of several windows 4.57 takes the least probability of no answer. Of `top_k`
          answers "" stands where its score does, or is left out.
        - By default windows share batches; in 4.57 they pass one by one.
        - `max_question_len` holds, and is unset by default; 4.57 ignores it with a fast tokenizer.
        - Where 128 shared tokens do not fit in a window beside a long question, by default fewer are shared.
    """

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
        "no_answer_threshold",
        "return_answerable",
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
        check_options(batch_size=self._batch_size)
        config = self.model.config
        self.reading = Reading(
            self.tokenizer.backend_tokenizer,
            max_seq_len=min(self.tokenizer.model_max_length, 384),
            positions=config.max_position_embeddings - config.first_position,
            no_answer_threshold=config.no_answer_threshold,
            answerable_calibration=config.answerable_calibration,
        )
        # Whether "[SEP]" in a text is text.
        split = bool(getattr(self.tokenizer, "split_special_tokens", False))
        self.reading.tokenizer.encode_special_tokens = split

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
        no_answer_threshold=None,
        return_answerable=None,
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
        check_options(
            top_k=top_k,
            max_answer_len=max_answer_len,
            max_seq_len=max_seq_len,
            max_question_len=max_question_len,
            doc_stride=doc_stride,
            padding=padding,
            no_answer_threshold=no_answer_threshold,
            handle_impossible_answer=handle_impossible_answer,
            return_answerable=return_answerable,
            align_to_words=align_to_words,
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
            "no_answer_threshold": no_answer_threshold,
            "return_answerable": return_answerable,
            "align_to_words": align_to_words,
        }
        return given(**preprocess), given(length_config=length_config), given(**postprocess)

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
        check_options(batch_size=batch_size)
        batch_size = batch_size or self._batch_size
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
            return self._answers(examples, not is_single, batch_size, show_progress_bar, *parameters)
        answers = []
        try:
            for answer in self._answers(list(examples), not is_single, batch_size, show_progress_bar, *parameters):
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
        check_asked(data)
        return iter(data), False

    def _examples(self, items, is_single):
        """Yields the questions that `items` ask, one by one, as checked dicts."""
        row = 0
        for item in items:
            with naming_row(None if is_single else row):
                samples = self._samples(item)
            for sample in samples:
                with naming_row(None if is_single else row):
                    check_example(sample)
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

    def _answers(self, examples, numbered, batch_size, show_progress_bar, preprocess, forward, postprocess):
        """Yields each example's answers, in order."""
        is_stream = not isinstance(examples, list)
        characters = None if is_stream else sum(len(example["context"]) for example in examples)
        bar = logging.tqdm(
            total=characters, desc="Answering", unit="character", unit_scale=True, disable=not show_progress_bar
        )
        with bar:
            yield from self.reading.answers(
                examples,
                lambda windows: self.forward(windows, **forward),
                windows=preprocess | {"from_the_end": self.tokenizer.truncation_side == "left"},
                best=postprocess,
                numbered=numbered,
                at_once=is_stream,
                batch_size=batch_size,
                batch_tokens=BATCH_TOKENS * (1 if self.device.type == "cpu" else FASTER_DEVICES),
                progress=bar.update,
            )

    def preprocess(self, example, **parameters):
        """The windows of an example, a `list` of [`Window`]: see [`Reading.windows`]."""
        tokens = self.reading.tokens(example["context"])
        from_the_end = self.tokenizer.truncation_side == "left"
        return self.reading.windows(example["question"], tokens, from_the_end=from_the_end, **parameters)

    def _forward(self, windows, length_config=None):
        """The logits of each [`Window`], a `list` of float32 arrays, (2, 1 + context tokens)."""
        # Always all three: some versions of transformers say of BERT's tokenizer that it gives no token types.
        inputs = padded(windows, self.tokenizer.pad_token_id, self.model.config.type_vocab_size)
        inputs = {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}
        outputs = self.model(**inputs, length_config=length_config)
        logits = torch.stack((outputs.start_logits, outputs.end_logits), 1).float().cpu().numpy()
        # Copied, or each window would hold its whole batch's.
        return [logits[row][:, window.scored()] for row, window in enumerate(windows)]

    def postprocess(self, context, windows, logits, **parameters):
        """The best answers of a context's windows: see [`Reading.best`]."""
        return self.reading.best(context, windows, logits, **parameters)


def is_list(value):
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def is_squad_example(item):
    """Whether it is 4.57's `SquadExample`."""
    return hasattr(item, "question_text") and hasattr(item, "context_text")
