"""A model at one `length_config` as an ONNX or OpenVINO graph, which Optimum's own classes load:
`python -m recipe.export --model FOLDER --length_config fast --runtime onnx --output_dir DIR`.

The graph takes any batch and sequence. An int8 model's carries its scales in quantise and dequantise nodes, so that the
runtime multiplies in int8. It is written out node by node: how many tokens are kept depends on the input, and tracing
would freeze it.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import BertConfig, RobertaConfig

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.quantization_qualaminilm import QuantizedEmbedding, QuantizedLinear
from recipe.data import load_tokenizer
from recipe.evaluate import ROOT
from recipe.presets import parse_length_config
from recipe.results import whole_folder

OPSET = 17
LOWEST = np.float32(np.finfo(np.float32).min)


class Graph:
    """An ONNX graph that grows node by node; tensors are known by their names."""

    def __init__(self):
        self.nodes, self.initializers = [], []

    def __call__(self, operator, *inputs, outputs=1, **attributes):
        """Adds a node; arrays among `inputs` become constants. Returns its output, or a list of `outputs` of them."""
        names = [f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        inputs = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array):
        if isinstance(array, torch.Tensor):
            array = array.detach().numpy()
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

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


def build_graph(model, length_config=None):
    """The ONNX graph of `model` at `length_config`.

    Inputs: input_ids, attention_mask and, in BERT's family, token_type_ids, int64 (batch_size, sequence_length).
    Outputs: start_logits and end_logits, float32 (batch_size, sequence_length), the lowest number at padding.

    Raises:
        ValueError: an illegal `length_config`, or an activation that is neither gelu nor relu.
    """
    config = model.config
    lengths = config.token_lengths(length_config)
    if config.hidden_act not in ("gelu", "relu"):
        raise ValueError(f"hidden_act is {config.hidden_act!r}, expected 'gelu' or 'relu'")
    graph = Graph()
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (config.embedding_type == "bert")
    sequence = graph.dimension("input_ids", 1)
    real = graph("Not", graph("Equal", "attention_mask", ints(0)))
    n = graph("ReduceSum", graph("Cast", real, to=TensorProto.INT64), ints(1))
    hidden = embed(graph, model.bert.embeddings)

    # As in the encoder: tokens on their way stand in slots, dead slots at position `sequence`, which is cut off below.
    alive, positions, entered = real, None, 1000 if lengths.relative else None
    answers = []
    for layer, entry in zip(model.bert.encoder.layer, lengths.entries):
        keep = None
        if entry != entered:
            if positions is None:
                hidden, alive, positions = pack(graph, hidden, real, n, sequence)
            # What is dropped here is judged by what it was when it came in.
            answers.append((positions, linear(graph, model.qa_outputs, hidden)))
            keep, entered = kept(graph, lengths, entry, n), entry
        hidden, chosen, alive = add_layer(graph, layer, hidden, alive, keep)
        if chosen is not None:
            positions = graph("Where", alive, graph("GatherElements", positions, chosen, axis=1), sequence)
    logits = linear(graph, model.qa_outputs, hidden)
    if positions is not None:
        answers.append((positions, logits))
        shape = graph("Concat", graph.dimension("input_ids", 0), graph("Add", sequence, ints(1)), ints(2), axis=0)
        logits = graph("Expand", np.zeros((1, 1, 1), np.float32), shape)
        for positions, part in answers:
            index = graph("Expand", graph("Unsqueeze", positions, ints(-1)), graph("Shape", part))
            logits = graph("ScatterElements", logits, index, part, axis=1)
        logits = graph("Slice", logits, ints(0), sequence, ints(1))
    logits = graph("Where", graph("Unsqueeze", real, ints(-1)), logits, LOWEST)
    for name, each in zip(("start_logits", "end_logits"), graph("Split", logits, outputs=2, axis=-1)):
        graph.nodes.append(helper.make_node("Squeeze", [each, graph.constant(ints(-1))], [name]))

    axes = ["batch_size", "sequence_length"]
    written = helper.make_graph(
        graph.nodes,
        "qualaminilm",
        [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in ("start_logits", "end_logits")],
        graph.initializers,
    )
    whole = helper.make_model(written, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(whole, full_check=True)
    return whole


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


def embed(graph, module):
    words = lookup(graph, module.word_embeddings, "input_ids")
    if module.roberta:
        real = graph("Cast", graph("Not", graph("Equal", "input_ids", ints(module.padding_idx))), to=TensorProto.INT64)
        counted = graph("Mul", graph("CumSum", real, np.int64(1)), real)
        positions, types = graph("Add", counted, ints(module.padding_idx)), graph.constant(ints(0))
    else:
        length = graph("Squeeze", graph.dimension("input_ids", 1))
        positions, types = graph("Range", np.int64(0), length, np.int64(1)), "token_type_ids"
    states = graph("Add", words, lookup(graph, module.token_type_embeddings, types))
    states = graph("Add", states, lookup(graph, module.position_embeddings, positions))
    return layer_norm(graph, module.LayerNorm, states)


def kept(graph, lengths, entry, n):
    """How many tokens of each row a layer of this entry hands on, int64 (batch, 1): [`TokenLengths.kept`]."""
    most = ints(entry)
    if lengths.relative:
        share = graph("Div", graph("Add", graph("Mul", n, ints(entry)), ints(999)), ints(1000))
        most = graph("Max", share, ints(2))
    return graph("Min", n, most)


def widest(graph, counts):
    """The greatest of `counts` (batch, 1), at least 1, as int64 (1,)."""
    return graph("Max", graph("ReduceMax", counts, axes=[0, 1], keepdims=0), ints(1))


def first_slots(graph, width):
    """0, 1, ... below `width` (1,)."""
    return graph("Range", np.int64(0), graph("Squeeze", width), np.int64(1))


def take(graph, states, slots):
    return graph("GatherND", states, graph("Unsqueeze", slots, ints(-1)), batch_dims=1)


def pack(graph, hidden, real, n, sequence):
    """The real tokens in slots, in order; which slots are alive; and their positions."""
    index = first_slots(graph, sequence)
    rank = graph("Where", real, index, graph("Add", index, sequence))
    width = widest(graph, n)
    _, slots = graph("TopK", rank, width, outputs=2, axis=-1, largest=0, sorted=1)
    alive = graph("Less", first_slots(graph, width), n)
    return take(graph, hidden, slots), alive, graph("Where", alive, slots, sequence)


def select(graph, significance, alive, keep):
    """The most significant slots, ascending, and which of them are alive, both (batch, width)."""
    slots = graph.dimension(significance, 1)
    significance = graph("Where", alive, significance, LOWEST)
    is_first = graph("Equal", first_slots(graph, slots), ints(0))
    significance = graph("Where", is_first, -LOWEST, significance)
    width = widest(graph, keep)
    _, ranked = graph("TopK", significance, width, outputs=2, axis=-1, largest=1, sorted=1)
    handed_on = graph("Less", first_slots(graph, width), keep)
    _, order = graph("TopK", graph("Where", handed_on, ranked, slots), width, outputs=2, axis=-1, largest=0, sorted=1)
    return graph("GatherElements", ranked, order, axis=1), handed_on


def add_layer(graph, layer, hidden, alive, keep):
    """The states handed on, their slots (`None`: all) and which of them are alive; see [`QuaLAMiniLMLayer`]."""
    chosen, handed_on, residual = None, alive, hidden
    if keep is not None and layer.scorer is not None:
        chosen, handed_on = select(graph, score(graph, layer.scorer, hidden, alive), alive, keep)
        residual = take(graph, hidden, chosen)
    context, probabilities = attend(graph, layer.attention.self, residual, hidden, alive)
    if keep is not None and layer.scorer is None:
        received = graph("ReduceSum", probabilities, ints(1), keepdims=0)
        queries = graph("Cast", graph("Unsqueeze", alive, ints(-1)), to=TensorProto.FLOAT)
        received = graph("ReduceSum", graph("Mul", received, queries), ints(1), keepdims=0)
        chosen, handed_on = select(graph, received, alive, keep)
        context, residual = take(graph, context, chosen), take(graph, hidden, chosen)
    attended = add_and_norm(graph, layer.attention.output, context, residual)
    inner = activate(graph, layer.intermediate, linear(graph, layer.intermediate.dense, attended))
    return add_and_norm(graph, layer.output, inner, attended), chosen, handed_on


def add_and_norm(graph, module, states, residual):
    return layer_norm(graph, module.LayerNorm, graph("Add", linear(graph, module.dense, states), residual))


def activate(graph, module, states):
    return gelu(graph, states) if module.is_gelu else graph("Relu", states)


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
    heads = ints(0, 0, module.num_attention_heads, module.attention_head_size)
    query, key, value = (graph("Reshape", each, heads) for each in (query, key, value))
    query = graph("Mul", graph("Transpose", query, perm=[0, 2, 1, 3]), np.float32(module.attention_head_size**-0.5))
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


def export(model, tokenizer, length_config, runtime, folder):
    """Writes the graph, transformers' configuration and the tokenizer into `folder`, which must not exist.

    Args:
        runtime (`str`): `"onnx"` writes model.onnx, `"openvino"` openvino_model.xml and .bin.

    Raises:
        FileExistsError, ValueError: see [`whole_folder`] and [`build_graph`].
    """
    with whole_folder(folder) as unfinished:
        path = unfinished / "model.onnx"
        onnx.save(build_graph(model, length_config), path)
        if runtime == "openvino":
            import openvino

            openvino.save_model(openvino.convert_model(path), unfinished / "openvino_model.xml", compress_to_fp16=False)
            path.unlink()
        transformers_config(model.config).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder of the model (the shipped one)")
    parser.add_argument("--length_config", default="full", help="a preset's name, or JSON: [0.9, ...] (full)")
    parser.add_argument("--runtime", choices=("onnx", "openvino"), default="onnx", help="whose format (onnx)")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write, which must not exist")
    arguments = parser.parse_args()
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model, dtype=torch.float32).eval()
    length_config = parse_length_config(arguments.length_config)
    export(model, load_tokenizer(arguments.model), length_config, arguments.runtime, arguments.output_dir)
    print(f"Wrote {arguments.output_dir}, at length_config {length_config!r}")


if __name__ == "__main__":
    main()
