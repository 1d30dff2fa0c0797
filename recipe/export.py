"""A model as a graph for other runtimes than torch.

`python -m recipe.export` writes onnx/model_int8.onnx beside the weights, which takes a `length_config` as an input.
`--length_config fast --runtime openvino --output_dir DIR` writes a folder that Optimum's own classes load, here for
OpenVINO; without a `length_config` the ONNX graph in it is the same as above. `--runtime transformers.js` writes what
transformers.js loads.

A graph takes any batch and sequence. An int8 model's carries its scales in quantise and dequantise nodes, so that the
runtime multiplies in int8. It is written out node by node: how many tokens are kept depends on the input, and tracing
would freeze it.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import BertConfig, RobertaConfig
from transformers.activations import GELUActivation

from qualaminilm.files_qualaminilm import weights_sha256, whole_file
from qualaminilm.graph_qualaminilm import GRAPH_FILE, MOST
from qualaminilm.kernels_qualaminilm import PAIR_LIMIT, neighbours
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.quantization_qualaminilm import QuantizedEmbedding, QuantizedLinear
from recipe import ROOT
from recipe.data import load_tokenizer
from recipe.presets import parse_length_config
from recipe.results import whole_folder

OPSET = 17
LOWEST = np.float32(np.finfo(np.float32).min)
LENGTH_CONFIG = "length_config"


class Graph:
    """An ONNX graph that grows node by node; tensors are known by their names. Names within a branch, which sees the
    tensors around it, begin with its `prefix`."""

    def __init__(self, prefix=""):
        self.prefix, self.nodes, self.initializers = prefix, [], []

    def __call__(self, operator, *inputs, outputs=1, **attributes):
        """Adds a node; arrays among `inputs` become constants. Returns its output, or a list of `outputs` of them."""
        names = [f"{self.prefix}{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        inputs = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array):
        if isinstance(array, torch.Tensor):
            array = array.detach().numpy()
        name = f"{self.prefix}constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def choose(self, condition, then, otherwise, kinds):
        """What the function `then`, of a graph of its own, makes where `condition` (bool ()) holds, and `otherwise`
        where not: a list of outputs of the element types `kinds`."""
        branches = {}
        for name, function in (("then_branch", then), ("else_branch", otherwise)):
            branch = Graph(f"{self.prefix}{name}_{len(self.nodes)}_")
            outputs = [helper.make_tensor_value_info(*each, None) for each in zip(function(branch), kinds)]
            branches[name] = helper.make_graph(branch.nodes, name, [], outputs, branch.initializers)
        return self("If", condition, outputs=len(kinds), **branches)

    def dimension(self, tensor, axis):
        """Size of `tensor` along `axis`, int64 (1,)."""
        return self("Shape", tensor, start=axis, end=axis + 1)


def ints(*values):
    return np.array(values, dtype=np.int64)


def transformers_config(config):
    """transformers' own configuration of our `config`'s sizes, a [`BertConfig`] or [`RobertaConfig`]."""
    fields = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
        "max_position_embeddings type_vocab_size layer_norm_eps pad_token_id"
    ).split()
    kind = RobertaConfig if config.embedding_type == "roberta" else BertConfig
    architecture = f"{kind.__name__.removesuffix('Config')}ForQuestionAnswering"
    return kind(**{name: getattr(config, name) for name in fields}, architectures=[architecture])


def build_graph(model, length_config=None, weights_sha256=None):
    """The ONNX graph of `model`, at one `length_config` or, without one, at any.

    Inputs: input_ids, attention_mask and, in BERT's family, token_type_ids, int64 (batch_size, sequence_length); and
    without a `length_config`, it, float32 (num_hidden_layers,), shares or counts. The last may be left out: nothing is
    dropped then. What is none of [`LengthConfigs.token_lengths`]'s is not refused, a graph cannot do that.
    Outputs: start_logits and end_logits, float32 (batch_size, sequence_length), the lowest number at padding.

    Args:
        weights_sha256 (`dict` of `str`): SHA-256 of the files that the weights stand in, kept in the graph's metadata
            beside that of the architecture.

    Raises:
        ValueError: an illegal `length_config`, an activation that is neither gelu nor relu, or int8 weights whose
            products a processor without VNNI does not add up exactly.
    """
    config = model.config
    lengths = None if length_config is None else config.token_lengths(length_config)
    if config.hidden_act not in ("gelu", "relu"):
        raise ValueError(f"hidden_act is {config.hidden_act!r}, expected 'gelu' or 'relu'")
    graph = Graph()
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (config.embedding_type == "bert")
    sequence = graph.dimension("input_ids", 1)
    real = graph("Not", graph("Equal", "attention_mask", ints(0)))
    n = graph("ReduceSum", graph("Cast", real, to=TensorProto.INT64), ints(1))
    budgets = any_budgets(graph, n, config) if lengths is None else fixed_budgets(graph, n, lengths)
    # As in the encoder: tokens on their way stand in slots, dead slots at position `sequence`, which is cut off below.
    slots, alive = pack(graph, real, n, sequence)
    positions = graph("Where", alive, slots, sequence)
    hidden = embed(graph, model.bert.embeddings, slots)
    shape = graph("Concat", graph.dimension("input_ids", 0), graph("Add", sequence, ints(1)), ints(2), axis=0)
    logits = graph("Expand", np.zeros((1, 1, 1), np.float32), shape)
    for layer, budget in zip(model.bert.encoder.layer, budgets):
        way = Way(hidden, alive, positions, logits)
        hidden, (_, alive, positions, logits) = add_layer(graph, layer, model.qa_outputs, way, sequence, budget)
    logits = answer(graph, model.qa_outputs, Way(hidden, alive, positions, logits))
    logits = graph("Slice", logits, ints(0), sequence, ints(1))
    logits = graph("Where", graph("Unsqueeze", real, ints(-1)), logits, LOWEST)
    for name, each in zip(("start_logits", "end_logits"), graph("Split", logits, outputs=2, axis=-1)):
        graph.nodes.append(helper.make_node("Squeeze", [each, graph.constant(ints(-1))], [name]))

    axes = ["batch_size", "sequence_length"]
    taken = [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in inputs]
    if lengths is None:
        layers = config.num_hidden_layers
        taken.append(helper.make_tensor_value_info(LENGTH_CONFIG, TensorProto.FLOAT, [layers]))
        graph.initializers.append(numpy_helper.from_array(np.ones(layers, np.float32), LENGTH_CONFIG))
    written = helper.make_graph(
        graph.nodes,
        "qualaminilm",
        taken,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in ("start_logits", "end_logits")],
        graph.initializers,
    )
    whole = helper.make_model(written, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    if weights_sha256 is not None:
        helper.set_model_props(
            whole,
            {"weights_sha256": json.dumps(weights_sha256), "architecture_sha256": config.sha256_of_architecture()},
        )
    onnx.checker.check_model(whole, full_check=True)
    return whole


class Budget(NamedTuple):
    """How many tokens of each row a layer hands on: `keep`, int64 (batch, 1), at most `width`, int64 (1,), and at least
    1. `drops`, a bool (), says whether any is dropped; `None`: that is known."""

    keep: str
    width: str
    drops: Optional[str]


def fixed_budgets(graph, n, lengths):
    """A [`Budget`] a layer, `None` where it hands on all: [`TokenLengths.kept`]."""
    entered, budgets = 1000 if lengths.relative else None, []
    for entry in lengths.entries:
        if entry == entered:
            budgets.append(None)
            continue
        keep = graph("Max", shares(graph, n, ints(entry)), ints(2)) if lengths.relative else ints(entry)
        keep, entered = graph("Min", n, keep), entry
        budgets.append(Budget(keep, graph("Max", graph("ReduceMax", keep, axes=[0, 1], keepdims=0), ints(1)), None))
    return budgets


def any_budgets(graph, n, config):
    """As `fixed_budgets`, of what stands in the input `length_config`."""
    entries = graph("Clip", LENGTH_CONFIG, np.float32(0), np.float32(MOST))
    thousandths = graph("Cast", graph("Round", graph("Mul", entries, np.float32(1000))), to=TensorProto.INT64)
    counts = graph("Cast", entries, to=TensorProto.INT64)
    counts = graph("Where", graph("LessOrEqual", entries, np.float32(1)), shares(graph, n, thousandths), counts)
    keep = graph("Min", n, graph("Max", counts, ints(2)))  # (batch, layers)
    entering = graph("Concat", n, graph("Slice", keep, ints(0), ints(-1), ints(1)), axis=1)
    dropped = graph("ReduceMax", graph("Sub", entering, keep), axes=[0], keepdims=0)
    drops = graph("Greater", dropped, ints(0))
    widths = graph("Max", graph("ReduceMax", keep, axes=[0], keepdims=0), ints(1))
    return [
        Budget(
            graph("Gather", keep, ints(i), axis=1),
            graph("Gather", widths, ints(i)),
            graph("Gather", drops, np.int64(i)),
        )
        for i in range(config.num_hidden_layers)
    ]


def shares(graph, n, thousandths):
    """So many thousandths of `n` (batch, 1), rounded up."""
    return graph("Div", graph("Add", graph("Mul", n, thousandths), ints(999)), ints(1000))


class Way(NamedTuple):
    """What is on its way through the layers.

    Attributes:
        hidden: (batch, slots, hidden).
        alive, positions: which slots hold a token, and where it stood in the input; (batch, slots).
        logits: of the tokens that were dropped, where they stood, (batch, sequence + 1, 2).
    """

    hidden: str
    alive: str
    positions: str
    logits: str


def answer(graph, head, way):
    """The logits with those of all tokens that are on their way."""
    part = linear(graph, head, way.hidden)
    index = graph("Expand", graph("Unsqueeze", way.positions, ints(-1)), graph("Shape", part))
    return graph("ScatterElements", way.logits, index, part, axis=1)


def linear(graph, module, states):
    return linears(graph, [module], states)[0]


def linears(graph, modules, states):
    """What each of the linear layers `modules`, which read the same input, makes of it."""
    if isinstance(modules[0], QuantizedLinear):
        grid = modules[0].input_scale, modules[0].input_zero_point
        smoothed = graph("Mul", states, 1 / modules[0].smoothing) if modules[0].is_smooth else states
        states = graph("DequantizeLinear", graph("QuantizeLinear", smoothed, *grid), *grid)
    results = []
    for module in modules:
        weight = module.weight.detach().T
        if isinstance(module, QuantizedLinear):
            if neighbours(module.weight.int().abs()).sum(-1).max() > PAIR_LIMIT:
                raise ValueError(
                    f"the magnitudes of neighbouring int8 weights add up to more than {PAIR_LIMIT}: without VNNI their "
                    f"products would saturate without a word. Store the model's floats in int8 anew"
                )
            zero_point = torch.zeros_like(module.weight_scale, dtype=torch.int8)
            weight = graph("DequantizeLinear", weight, module.weight_scale, zero_point, axis=1)
        results.append(graph("Add", graph("MatMul", states, weight), module.bias))
    return results


def lookup(graph, module, ids):
    if not isinstance(module, QuantizedEmbedding):
        return graph("Gather", module.weight, ids)
    rows = graph("Cast", graph("Gather", module.weight, ids), to=TensorProto.FLOAT)
    return graph("Mul", rows, graph("Unsqueeze", graph("Gather", module.weight_scale, ids), ints(-1)))


def layer_norm(graph, module, states):
    return graph("LayerNormalization", states, module.weight, module.bias, axis=-1, epsilon=module.eps)


def embed(graph, module, slots):
    """The embeddings of the tokens at the positions `slots` (batch, slots)."""

    def taken(tensor):
        return graph("GatherElements", tensor, slots, axis=1)

    words = lookup(graph, module.word_embeddings, taken("input_ids"))
    if module.roberta:
        real = graph("Cast", graph("Not", graph("Equal", "input_ids", ints(module.padding_idx))), to=TensorProto.INT64)
        counted = graph("Mul", graph("CumSum", real, np.int64(1)), real)
        positions, types = taken(graph("Add", counted, ints(module.padding_idx))), graph.constant(ints(0))
    else:
        positions, types = slots, taken("token_type_ids")
    states = graph("Add", words, lookup(graph, module.token_type_embeddings, types))
    states = graph("Add", states, lookup(graph, module.position_embeddings, positions))
    return layer_norm(graph, module.LayerNorm, states)


def first_slots(graph, width):
    """0, 1, ... below `width` (1,)."""
    return graph("Range", np.int64(0), graph("Squeeze", width), np.int64(1))


def take(graph, states, slots):
    return graph("GatherND", states, graph("Unsqueeze", slots, ints(-1)), batch_dims=1)


def pack(graph, real, n, sequence):
    """Positions of the real tokens, ascending, as slots, and which of these are alive, both (batch, greatest n)."""
    index = first_slots(graph, sequence)
    rank = graph("Where", real, index, graph("Add", index, sequence))
    width = graph("Max", graph("ReduceMax", n, axes=[0, 1], keepdims=0), ints(1))
    _, slots = graph("TopK", rank, width, outputs=2, axis=-1, largest=0, sorted=1)
    return slots, graph("Less", first_slots(graph, width), n)


def select(graph, significance, alive, budget):
    """The most significant slots, ascending, and which of them are alive, both (batch, width)."""
    slots = graph.dimension(significance, 1)
    significance = graph("Where", alive, significance, LOWEST)
    is_first = graph("Equal", first_slots(graph, slots), ints(0))
    significance = graph("Where", is_first, -LOWEST, significance)
    _, ranked = graph("TopK", significance, budget.width, outputs=2, axis=-1, largest=1, sorted=1)
    handed_on = graph("Less", first_slots(graph, budget.width), budget.keep)
    ascending = graph("Where", handed_on, ranked, slots)
    _, order = graph("TopK", ascending, budget.width, outputs=2, axis=-1, largest=0, sorted=1)
    return graph("GatherElements", ranked, order, axis=1), handed_on


def add_layer(graph, layer, head, way, sequence, budget):
    """The layer's output and what is on its way there; see [`QuaLAMiniLMLayer`]."""
    if layer.scorer is not None:

        def significance(graph):
            return score(graph, layer.scorer, way.hidden, way.alive)

        (), handed_on = drop(graph, head, significance, way, (), sequence, budget)
        context, _ = attend(graph, layer.attention.self, handed_on.hidden, way.hidden, way.alive)
    else:
        context, probabilities = attend(graph, layer.attention.self, way.hidden, way.hidden, way.alive)

        def significance(graph):
            received = graph("ReduceSum", probabilities, ints(1), keepdims=0)
            queries = graph("Cast", graph("Unsqueeze", way.alive, ints(-1)), to=TensorProto.FLOAT)
            return graph("ReduceSum", graph("Mul", received, queries), ints(1), keepdims=0)

        (context,), handed_on = drop(graph, head, significance, way, (context,), sequence, budget)
    attended = add_and_norm(graph, layer.attention.output, context, handed_on.hidden)
    inner = activate(graph, layer.intermediate, linear(graph, layer.intermediate.dense, attended))
    return add_and_norm(graph, layer.output, inner, attended), handed_on


def drop(graph, head, significance, way, others, sequence, budget):
    """`others`, like [`Way`]'s hidden states, and the way itself where the layer hands on what is most significant.

    Args:
        significance (a function): of a graph, in which it computes what the slots are chosen by.
    """

    def dropping(graph):
        chosen, alive = select(graph, significance(graph), way.alive, budget)
        positions = graph("Where", alive, graph("GatherElements", way.positions, chosen, axis=1), sequence)
        states = [take(graph, each, chosen) for each in (*others, way.hidden)]
        # What is dropped here is judged by what it was when it came in.
        return *states, alive, positions, answer(graph, head, way)

    everything = (*others, *way)
    if budget is not None and budget.drops is None:
        everything = dropping(graph)
    elif budget is not None:
        kinds = [TensorProto.FLOAT] * (len(others) + 1) + [TensorProto.BOOL, TensorProto.INT64, TensorProto.FLOAT]

        def keeping(graph):
            return [graph("Identity", each) for each in everything]

        everything = graph.choose(budget.drops, dropping, keeping, kinds)
    return tuple(everything[: len(others)]), Way(*everything[len(others) :])


def add_and_norm(graph, module, states, residual):
    return layer_norm(graph, module.LayerNorm, graph("Add", linear(graph, module.dense, states), residual))


def activate(graph, module, states):
    return gelu(graph, states) if isinstance(module.intermediate_act_fn, GELUActivation) else graph("Relu", states)


def gelu(graph, states):
    erf = graph("Erf", graph("Div", states, np.float32(math.sqrt(2))))
    return graph("Mul", graph("Mul", states, graph("Add", erf, np.float32(1))), np.float32(0.5))


def attend(graph, module, query_states, hidden, alive):
    """The context and the attention map; see [`QuaLAMiniLMSelfAttention`]."""
    if query_states == hidden:
        query, key, value = linears(graph, [module.query, module.key, module.value], hidden)
    else:
        query = linear(graph, module.query, query_states)
        key, value = linears(graph, [module.key, module.value], hidden)
    head_size = module.query.out_features // module.num_attention_heads
    heads = ints(0, 0, module.num_attention_heads, head_size)
    query, key, value = (graph("Reshape", each, heads) for each in (query, key, value))
    query = graph("Mul", graph("Transpose", query, perm=[0, 2, 1, 3]), np.float32(head_size**-0.5))
    scores = graph("MatMul", query, graph("Transpose", key, perm=[0, 2, 3, 1]))
    mask = graph("Where", graph("Unsqueeze", alive, ints(1, 2)), np.float32(0), LOWEST)
    probabilities = graph("Softmax", graph("Add", scores, mask), axis=-1)
    context = graph("MatMul", probabilities, graph("Transpose", value, perm=[0, 2, 1, 3]))
    return graph("Reshape", graph("Transpose", context, perm=[0, 2, 1, 3]), ints(0, 0, -1)), probabilities


def score(graph, module, hidden, alive):
    """See [`QuaLAMiniLMScorer`]."""
    alive = graph("Cast", graph("Unsqueeze", alive, ints(-1)), to=TensorProto.FLOAT)
    sizes = ints(*module.sizes)
    features, matched, gate = graph("Split", linear(graph, module.dense, hidden), sizes, outputs=3, axis=-1)
    matched = graph("Reshape", matched, ints(0, 0, module.HEADS, module.HEAD_SIZE))
    matched = graph("Transpose", matched, perm=[0, 2, 1, 3])
    norm = graph("Max", graph("ReduceL2", matched, axes=[-1]), np.float32(1e-12))
    matched = graph("Div", matched, norm)
    gate = graph("Transpose", graph("Mul", graph("Sigmoid", gate), alive), perm=[0, 2, 1])
    gated = graph("Mul", matched, graph("Unsqueeze", gate, ints(-1)))
    cosines = graph("MatMul", matched, graph("Transpose", gated, perm=[0, 1, 3, 2]))
    match = graph("Transpose", graph("ReduceMax", cosines, axes=[-1], keepdims=0), perm=[0, 2, 1])
    own = graph("Mul", graph("Concat", gelu(graph, features), match, axis=-1), alive)
    around = graph(
        "Conv",
        graph("Transpose", own, perm=[0, 2, 1]),
        module.neighbourhood.weight,
        module.neighbourhood.bias,
        group=module.neighbourhood.groups,
        kernel_shape=[2 * module.REACH + 1],
        pads=[module.REACH] * 2,
    )
    around = gelu(graph, graph("Transpose", around, perm=[0, 2, 1]))
    both = graph("MatMul", graph("Concat", own, around, axis=-1), module.out_proj.weight.T)
    return graph("Squeeze", both, ints(-1))


def export(model, tokenizer, length_config, runtime, folder, weights_sha256=None):
    """Writes the graph, transformers' configuration and the tokenizer into `folder`, which must not exist.

    Args:
        runtime (`str`): `"onnx"` writes model.onnx, `"openvino"` openvino_model.xml and .bin, and `"transformers.js"`
            onnx/model_quantized.onnx, at `"full"` by default, since it feeds no `length_config`.
        length_config, weights_sha256: see [`build_graph`].

    Raises:
        FileExistsError, ValueError: see [`whole_folder`] and [`build_graph`]; or OpenVINO without a `length_config`.
    """
    if runtime == "openvino" and length_config is None:
        raise ValueError("length_config is missing: OpenVINO would take full for it, and no other. Name one")
    if runtime == "transformers.js" and length_config is None:
        length_config = "full"
    config = transformers_config(model.config)
    with whole_folder(folder) as unfinished:
        path = unfinished / "model.onnx"
        if runtime == "transformers.js":
            setattr(config, "transformers.js_config", {"dtype": "q8"})  # which file it takes, where nobody says
            path = unfinished / "onnx" / "model_quantized.onnx"
            path.parent.mkdir()
        onnx.save(build_graph(model, length_config, weights_sha256), path)
        if runtime == "openvino":
            import openvino

            openvino.save_model(openvino.convert_model(path), unfinished / "openvino_model.xml", compress_to_fp16=False)
            path.unlink()
        config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def export_beside_weights(folder):
    """Writes the one graph of a folder's int8 weights beside them, and returns its path.

    Raises:
        ValueError: its weights are floats, or see [`build_graph`].
    """
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(folder)
    if not model.config.int8_weights:
        raise ValueError(f"the weights of {folder} are floats: store them in int8 first, or name an output_dir")
    path = Path(folder) / GRAPH_FILE
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as file:
        onnx.save(build_graph(model, weights_sha256=weights_sha256(folder)), file)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder of the model (the shipped one)")
    parser.add_argument("--length_config", help="a preset's name, or JSON: [0.9, ...] (an input of the graph)")
    parser.add_argument(
        "--runtime", choices=("onnx", "openvino", "transformers.js"), default="onnx", help="whose format (onnx)"
    )
    parser.add_argument("--output_dir", type=Path, help=f"folder to write, which must not exist ({GRAPH_FILE})")
    arguments = parser.parse_args()
    if arguments.output_dir is None:
        if arguments.length_config is not None or arguments.runtime != "onnx":
            parser.error(f"{GRAPH_FILE} is ONNX and takes any length_config: name an --output_dir for another graph")
        print(f"Wrote {export_beside_weights(arguments.model)}")
        return
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model, dtype=torch.float32).eval()
    length_config = arguments.length_config and parse_length_config(arguments.length_config)
    checksums = weights_sha256(arguments.model)
    export(
        model,
        load_tokenizer(arguments.model),
        length_config,
        arguments.runtime,
        arguments.output_dir,
        checksums,
    )
    print(f"Wrote {arguments.output_dir}")


if __name__ == "__main__":
    main()
