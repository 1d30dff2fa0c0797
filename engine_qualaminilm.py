"""The exported graph in ONNX Runtime, which answers in the place of the int8 layers that it was made from.

On a CPU it is faster than torch where one question is asked, on a busy machine by a factor, and it has kernels for
processors that torch's int8 products do not know. Where it cannot stand for the model, the model runs in torch.
"""

import json
import math
import operator
import os
import shutil
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from transformers.utils import logging

from .files_qualaminilm import holds_weights, stored_file, whole_file
from .graph_qualaminilm import GRAPH_FILE, Graph, Unusable, import_onnxruntime
from .kernels_qualaminilm import cpu_multiplies_bfloat16

logger = logging.get_logger(__name__)

ENGINES = ("auto", "torch", "onnxruntime")
# Where the processor multiplies bfloat16, torch's attention does too and ONNX Runtime's does not: a call of more tokens
# than the longest window has is torch's there (results/benchmark.json: batches of 8 and 32).
MOST_TOKENS = 512


def find_engine(engine, model, repository, **where):
    """The [`GraphEngine`] of a model that was just loaded; `None`: it runs in torch.

    Args:
        engine (`str`): one of `ENGINES`.
        repository (`str`, path or `None`): what the model was loaded from. `where` are `cached_file`'s arguments.

    Raises:
        ValueError: `engine` is `"onnxruntime"`, and the graph cannot be used; it says why.
    """
    if engine == "torch":
        return None
    try:
        most_tokens = MOST_TOKENS if engine == "auto" and cpu_multiplies_bfloat16() else math.inf
        return GraphEngine(model, find_graph(model, repository, where), most_tokens)
    except Unusable as why:
        if engine == "onnxruntime":
            raise ValueError(f"engine is 'onnxruntime', but {why}") from None
        if why.surprising:
            logger.warning_once(f"{why}; the model runs in torch")
        return None


def find_graph(model, repository, where):
    """Path of the graph beside the weights of a repository, which is asked for it only if it could be used."""
    if not model.config.int8_weights:
        raise Unusable("the weights are floats: its graph is made of int8 weights")
    import_onnxruntime()
    path = None
    if repository is not None:
        commit = getattr(model.config, "_commit_hash", None)
        try:
            path = stored_file(repository, GRAPH_FILE, **(where | ({"revision": commit} if commit else {})))
        except OSError:  # no network, and it was never asked for
            path = None
    if path is None:
        raise Unusable(
            f"{repository} has no {GRAPH_FILE}, or none that can be had now; python -m recipe.export --model FOLDER "
            f"writes it"
        )
    return Path(path)


class GraphEngine:
    """A graph on a CPU, while the model is the one that it was made from.

    Args:
        model ([`QuaLAMiniLMForQuestionAnswering`]): as it was loaded, on a CPU.
        path (`Path`): of the graph, in a folder beside the weights.
        most_tokens (`int` or infinite): padding included, that a call may have.

    Raises:
        Unusable: the graph was made from other weights, or the model has not those of the files.
    """

    def __init__(self, model, path, most_tokens):
        self.most_tokens = most_tokens
        self.graph = Graph(path, torch.get_num_threads())
        folder = path.parent.parent
        try:
            weights = json.loads(self.graph.metadata.get("weights_sha256", ""))
        except ValueError:
            weights = None
        if not holds_weights(folder, weights):
            raise Unusable(f"{path} was made from other weights than those beside it", surprising=True)
        if self.graph.metadata.get("architecture_sha256") != model.config.sha256_of_architecture():
            raise Unusable(
                f"{path} is of another architecture than the model, or was written by an earlier version of this code; "
                f"python -m recipe.export writes it anew"
            )
        self.modules = [*model.modules()]
        self.registries = [of for each in self.modules for of in (each._modules, each._parameters, each._buffers)]
        self.held = [*chain.from_iterable(map(dict.values, self.registries))]
        self.tensors = [each for each in self.held if isinstance(each, torch.Tensor)]
        self.parameters = [*model.parameters()]
        if not is_loaded_from(model, [folder / name for name in weights]):
            raise Unusable(f"the model's weights are not, to the last bit, those of {folder}")
        self.state = self._first_state()  # `None`: the graph stands for the model no more

    def __call__(self, model, input_ids, attention_mask, token_type_ids, length_config, others):
        """start_logits and end_logits of `model`, float32 (batch, sequence), as its `forward` returns them; `None`: it
        has to compute them itself, or to say what is wrong. `others` are what else `forward` was given."""
        if any(not (each is None or each is False) for each in others) or not self._stands_for(model):
            return None
        inputs = graph_inputs(model, input_ids, attention_mask, token_type_ids)
        if inputs is None or inputs["input_ids"].size > self.most_tokens:
            return None
        lengths = model.config.token_lengths(length_config)
        try:
            logits = self.graph(inputs, lengths, torch.get_num_threads())
        except Unusable as why:
            logger.warning_once(f"{why}; the model runs in torch")
            self.state = None
            return None
        return [torch.from_numpy(each) for each in logits]

    def _stands_for(self, model):
        """Whether a call of `model` now computes what it did when it was loaded, by its own code, and nobody asks what
        happens within."""
        if self.state is None or model is not self.modules[0]:
            return False
        if torch.jit.is_tracing() or torch.is_autocast_enabled("cpu") or has_any_global_hook():
            return False
        if model.config.output_attentions or model.config.output_hidden_states:
            return False
        if any(
            each.training or each._forward_hooks or each._forward_pre_hooks or "forward" in each.__dict__
            for each in self.modules
        ):
            return False
        if torch.is_grad_enabled() and any(each.requires_grad for each in self.parameters):
            return False
        return self._is_intact()

    def _is_intact(self):
        now = [*chain.from_iterable(map(dict.values, self.registries))]
        return len(now) == len(self.held) and all(map(operator.is_, now, self.held)) and self._state() == self.state

    def _first_state(self):
        """`None` where torch keeps no count, as of tensors made in inference mode."""
        return None if any(each.is_inference() for each in self.tensors) else self._state()

    def _state(self):
        """What tells later whether the tensors hold other numbers, as far as torch keeps count of it."""
        # Moving or casting a module puts another tensor in a buffer's place, but other numbers into a parameter.
        kinds = [(each.dtype, each.device) for each in self.parameters]
        return [each._version for each in self.tensors], kinds

    def save(self, folder):
        """Copies the graph beside the weights that were saved in `folder`, if they are those that it was made from."""
        path = Path(folder, GRAPH_FILE)
        beside = holds_weights(folder, json.loads(self.graph.metadata["weights_sha256"]))
        if beside and os.path.isfile(self.graph.path) and not (path.exists() and path.samefile(self.graph.path)):
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as copy, open(self.graph.path, "rb") as graph:
                shutil.copyfileobj(graph, copy)

    def __getstate__(self):
        return self.__dict__ | {"state": self.state is not None and self._is_intact()}

    def __setstate__(self, state):
        self.__dict__.update(state)
        # The copy's own; what was changed before stays changed.
        self.state = self._first_state() if self.state else None


def is_loaded_from(model, files):
    """Whether the model's tensors are those of the safetensors `files`, on a CPU, floats as float32."""
    held = model.state_dict()
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  it is no dict
                tensor = held.pop(name, None)
                if tensor is None or tensor.device.type != "cpu":
                    return False
                if tensor.is_floating_point() and tensor.dtype != torch.float32:
                    return False
                if not torch.equal(tensor, stored.get_tensor(name).to(tensor.dtype)):
                    return False
    return not held


def graph_inputs(model, input_ids, attention_mask, token_type_ids):
    """What the graph takes, int64 arrays (batch, sequence) by name; `None` where the model would raise, or nothing is
    to be computed."""
    given = [each for each in (input_ids, attention_mask, token_type_ids) if each is not None]
    if any(type(each) is not torch.Tensor or each.device.type != "cpu" for each in given):
        return None
    if input_ids is None or input_ids.ndim != 2 or not input_ids.numel():
        return None
    shape, length = input_ids.shape, input_ids.shape[1]
    embeddings = model.bert.embeddings
    if length > embeddings.position_embeddings.num_embeddings - embeddings.first_position:
        return None
    if attention_mask is None:
        attention_mask = torch.ones(shape, dtype=torch.int64, device="cpu")
    if token_type_ids is None:
        token_type_ids = torch.zeros(shape, dtype=torch.int64, device="cpu")
    if attention_mask.shape != shape or token_type_ids.shape not in (shape, (1, length)):
        return None
    # RoBERTa's graph knows one type alone.
    types = 1 if embeddings.roberta else embeddings.token_type_embeddings.num_embeddings
    for ids, number in ((input_ids, embeddings.word_embeddings.num_embeddings), (token_type_ids, types)):
        if ids.dtype not in (torch.int64, torch.int32):
            return None
        least, greatest = ids.aminmax()
        if least < 0 or greatest >= number:
            return None
    inputs = {"input_ids": input_ids.long(), "attention_mask": (attention_mask != 0).long()}
    if not embeddings.roberta:
        inputs["token_type_ids"] = token_type_ids.long().expand(shape)
    return {name: tensor.numpy() for name, tensor in inputs.items()}
