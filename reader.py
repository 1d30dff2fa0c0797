"""Answers questions out of texts without torch and transformers: with onnxruntime, tokenizers and numpy.

    from reader import Reader
    reader = Reader("FOLDER")
    reader("Where do I live?", "My name is Wolfgang and I live in Berlin.", length_config="fast")

or `python reader.py --question "Where do I live?" FILE`. This file can stand and be run anywhere; the code that it
shares with transformers' pipeline is that of the folder that it stands in.
"""

import argparse
import hashlib
import importlib
import json
import os
import reprlib
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
SIZES = "num_hidden_layers hidden_size intermediate_size type_vocab_size max_position_embeddings".split()


def sibling(name):
    """The module `name` of the folder that this file stands in. Its modules import each other as those of a package,
    which is no other folder's."""
    package = f"qualaminilm_{hashlib.sha256(str(HERE).encode()).hexdigest()[:16]}"
    if package not in sys.modules:
        module = types.ModuleType(package)
        module.__path__ = [str(HERE)]
        sys.modules[package] = module
    return importlib.import_module(f"{package}.{name}_qualaminilm")


length_configs, graph, reading = (sibling(name) for name in ("length_configs", "graph", "reading"))


class Reader(length_configs.LengthConfigs):
    """What transformers' pipeline of this repository answers, computed by the graph in ONNX Runtime.

    Args:
        folder (`str` or path): of a model with its graph, onnx/model_int8.onnx.
        length_config: how many tokens each layer hands on where a call does not say; see
            [`LengthConfigs.token_lengths`]. By default the model's own.
        threads (`int`): to compute with; by default one for each processor that this process may use.

    Raises:
        FileNotFoundError: a file is missing; of the graph it says which command writes it.
        ImportError: onnxruntime is not installed.
        ValueError: a file that cannot be read, a graph of other weights, or an illegal `length_config`.
    """

    def __init__(self, folder, length_config=None, threads=None):
        folder = Path(folder)
        config, tokenizer = read_object(folder / "config.json"), read_object(folder / "tokenizer_config.json")
        path = folder / graph.GRAPH_FILE
        if not path.is_file():
            is_int8 = config.get("int8_weights") or config.get("int8_storage")
            first = "" if is_int8 else "the weights are floats: python -m recipe.quantize stores them in int8, then "
            raise FileNotFoundError(f"{path} is missing: {first}python -m recipe.export --model {folder} writes it")
        self.threads = processors() if threads is None else threads
        length_configs.require("threads", self.threads, length_configs.is_number(self.threads, int), "an int")
        try:
            for name in SIZES:
                size = config[name]
                length_configs.require(name, size, length_configs.is_number(size, int) and size > 0, "an int above 0")
                setattr(self, name, size)
            self.significance, self.length_config = config["significance"], config["length_config"]
            self.is_roberta, self.pad_token_id = config["embedding_type"] == "roberta", config["pad_token_id"] or 0
        except KeyError as error:
            raise ValueError(f"{folder / 'config.json'} has no {error}: it is of no QuaLA-MiniLM") from None
        presets = folder / length_configs.PRESETS_FILE
        presets = length_configs.read_presets(presets, self.num_hidden_layers) if presets.is_file() else None
        self.length_presets = self.checked_presets(presets)
        if length_config is not None:
            self.length_config = length_config
        self.token_lengths()
        try:
            self.graph = graph.Graph(path, self.threads)
        except graph.Unusable as why:
            raise (ValueError if why.surprising else ImportError)(str(why)) from None
        stated = config.get("weights_sha256")
        if stated is not None and json.loads(self.graph.metadata.get("weights_sha256", "null")) != stated:
            raise ValueError(f"{path} was made from other weights than {folder / 'config.json'} states")
        threshold, calibration = config.get("no_answer_threshold"), config.get("answerable_calibration")
        length_configs.require_answerability(threshold, calibration)
        self.reading = reading.Reading(
            read_tokenizer(folder / "tokenizer.json"),
            max_seq_len=min(tokenizer.get("model_max_length", 384), 384),
            positions=self.max_position_embeddings - (self.pad_token_id + 1 if self.is_roberta else 0),
            no_answer_threshold=threshold,
            answerable_calibration=calibration,
        )
        self.reading.tokenizer.encode_special_tokens = bool(tokenizer.get("split_special_tokens", False))
        self.from_the_end = tokenizer.get("truncation_side") == "left"

    def __call__(
        self,
        question,
        context=None,
        *,
        top_k=None,
        doc_stride=None,
        max_answer_len=None,
        max_seq_len=None,
        max_question_len=None,
        handle_impossible_answer=None,
        no_answer_threshold=None,
        return_answerable=None,
        align_to_words=None,
        batch_size=None,
        length_config=None,
    ):
        """
        Args:
            question, context (`str`); or, as first argument, a dict of them; or an iterable of such dicts.
            The others: as in the pipeline; `None`, its default.

        Returns:
            as the pipeline: for one question a dict of score, start, end and answer, or where `top_k` is above 1 a list
            of them; a list of these for a list or tuple; an iterator over them for another iterable.

        Raises:
            ValueError, KeyError: what the pipeline raises, and in the same words.
        """
        reading.check_options(
            top_k=top_k,
            max_answer_len=max_answer_len,
            max_seq_len=max_seq_len,
            max_question_len=max_question_len,
            doc_stride=doc_stride,
            batch_size=batch_size,
            no_answer_threshold=no_answer_threshold,
            handle_impossible_answer=handle_impossible_answer,
            return_answerable=return_answerable,
            align_to_words=align_to_words,
        )
        lengths = self.token_lengths(length_config)
        if isinstance(question, str) or context is not None:
            question = {"question": question, "context": context}
        is_single, is_list = isinstance(question, Mapping), isinstance(question, (list, tuple))
        reading.check_asked(question)
        examples = checked([question] if is_single else question, numbered=not is_single)
        answers = self.reading.answers(
            all_checked(examples) if is_list else examples,
            lambda windows: self.logits(windows, lengths),
            windows=reading.given(
                doc_stride=doc_stride,
                max_question_len=max_question_len,
                max_seq_len=max_seq_len,
                from_the_end=self.from_the_end,
            ),
            best=reading.given(
                top_k=top_k,
                max_answer_len=max_answer_len,
                align_to_words=align_to_words,
                handle_impossible_answer=handle_impossible_answer,
                no_answer_threshold=no_answer_threshold,
                return_answerable=return_answerable,
            ),
            numbered=not is_single,
            at_once=not (is_single or is_list),
            batch_size=batch_size,
        )
        if not (is_single or is_list):
            return answers
        found = collected(answers)
        return found[0] if is_single else found

    def logits(self, windows, lengths):
        """The logits of each window, a `list` of float32 arrays, (2, 1 + context tokens); see [`Reading.answers`]."""
        inputs = reading.padded(windows, self.pad_token_id, self.type_vocab_size)
        if self.is_roberta:
            del inputs["token_type_ids"]
        try:
            logits = np.stack(self.graph(inputs, lengths, self.threads), 1)
        except graph.Unusable as why:  # in a process that has yet to read it
            raise ValueError(str(why)) from None
        # Copied, or each window would hold its whole batch's.
        return [logits[row][:, window.scored()] for row, window in enumerate(windows)]


def all_checked(examples):
    """The same, all of them looked at before the first is answered."""
    yield from list(examples)


def collected(answers):
    """A `list` of them; an error on the way has those before it as its `answers`."""
    found = []
    try:
        for answer in answers:
            found.append(answer)
    except Exception as error:
        error.answers = found
        raise
    return found


def checked(examples, numbered):
    """Yields the questions, once each was looked at."""
    for row, example in enumerate(examples):
        with reading.naming_row(row if numbered else None):
            if not isinstance(example, Mapping):
                raise ValueError(f"{reprlib.repr(example)} is no dict with the keys question and context")
            if not {"question", "context"} <= example.keys():
                raise KeyError("You need to provide a dictionary with keys {question:..., context:...}")
            reading.check_example(example)
        yield {name: example[name] for name in ("question", "context")}


def read_object(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    length_configs.require(str(path), content, isinstance(content, dict), "a JSON object")
    return content


def read_tokenizer(path):
    text = path.read_text(encoding="utf-8")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # of no kind of its own
        raise ValueError(f"{path} is no tokenizer: {error}") from None


def processors():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main():
    parser = argparse.ArgumentParser(description="Prints what a text answers to a question; exits with 1 if nothing.")
    parser.add_argument("file", nargs="?", help="the text, UTF-8 (standard input)")
    parser.add_argument("--question", required=True)
    parser.add_argument("--model", default=str(HERE), help="folder of the model (the one that this file stands in)")
    parser.add_argument("--length_config", help="a preset's name (the model's own)")
    arguments = parser.parse_args()
    try:
        text = Path(arguments.file).read_bytes() if arguments.file else sys.stdin.buffer.read()
        reader = Reader(arguments.model, arguments.length_config)
        answer = reader(arguments.question, text.decode(), handle_impossible_answer=True)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"reader.py: {error}") from error
    if not answer["answer"]:
        print("Not in this text.")
        sys.exit(1)
    print(" ".join(answer["answer"].split()))


if __name__ == "__main__":
    main()
