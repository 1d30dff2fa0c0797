"""Post-training static quantisation: `python -m recipe.quantize --model FOLDER --windows FOLDER --output_dir DIR`.

Weights and embeddings become int8, activations 8 bit with scales that follow from what passes through the float model
on training questions. LayerNorms, span head and all of a scorer but its first layer stay floats. The ONNX graph of the
int8 model is written beside its weights: search and evaluation run it, as users do, where onnxruntime is installed.
"""

import argparse
import copy
import warnings
from collections import defaultdict
from pathlib import Path

import datasets
import torch
from torch.ao.quantization import HistogramObserver
from torch.nn import functional as F
from tqdm import tqdm

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.quantization_qualaminilm import QuantizedEmbedding, QuantizedLinear
from recipe.data import load_tokenizer, read_questions
from recipe.export import export_beside_weights
from recipe.presets import without_scores
from recipe.test_sets import refuse_test_sets
from recipe.windows import TRAIN, windows

ROWS = 256  # to calibrate on


class Features:
    """What enters a linear layer, feature by feature: mean and greatest magnitude, each (in_features,)."""

    def __init__(self):
        self.summed, self.tokens, self.largest = 0.0, 0, torch.zeros(1)

    def see(self, inputs):
        self.summed = self.summed + inputs.sum(0)
        self.tokens += len(inputs)
        self.largest = torch.maximum(self.largest, inputs.abs().amax(0))

    @property
    def mean(self):
        return self.summed / self.tokens


class Values:
    """What enters a linear layer, all features in one histogram."""

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao announces its own end
            self.histogram = HistogramObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)

    def see(self, inputs):
        self.histogram(inputs)

    def scale_and_zero_point(self, clipping):
        """The uint8 grid for these inputs.

        Args:
            clipping (`str` or `float`): `"minmax"`, none; `"mse"`, what leaves the least squared error; or the share of
                values to cut at either end.
        """
        observer = self.histogram
        if clipping == "mse":
            scale, zero_point = observer.calculate_qparams()
            return scale.item(), zero_point.item()
        low, high = observer.min_val.item(), observer.max_val.item()
        if clipping != "minmax":
            shares = observer.histogram.cumsum(0) / observer.histogram.sum()
            width = (high - low) / len(shares)
            high = low + width * (int((shares < 1 - clipping).sum()) + 1)
            low = low + width * int((shares < clipping).sum())
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, torch.finfo(torch.float32).tiny)
        return scale, round(-low / scale)


class GreatestScores:
    """How much of the greatest score of each query of an attention layer follows from the query alone.

    A vector that is taken from every key takes a number from all scores of a query, which changes no softmax. Where
    that number is about the greatest of them, those that count are near 0: bfloat16, which keeps 8 digits, then tells
    them apart, and their powers do not overflow.
    """

    def __init__(self, attention):
        self.attention = attention
        self.squares, self.products = 0.0, 0.0

    def see(self, inputs):
        """`inputs` (tokens, hidden): of one window."""
        query, key = (
            F.linear(inputs, layer.weight, layer.bias).unflatten(-1, (self.attention.num_attention_heads, -1))
            for layer in (self.attention.query, self.attention.key)
        )
        query, key = query.transpose(0, 1).double(), key.transpose(0, 1).double()
        greatest = (query @ key.mT).amax(-1, keepdim=True)
        self.squares = self.squares + query.mT @ query
        self.products = self.products + query.mT @ greatest

    @property
    def shift(self):
        """What to take from every key, (hidden,): by least squares, each query's product with it is its greatest
        score."""
        return (torch.linalg.pinv(self.squares, rtol=1e-6, hermitian=True) @ self.products).flatten().float()


def observe(model, rows, see):
    """Runs `rows` (each the input_ids and token_type_ids of one window) through the float `model`, nothing dropped.

    Args:
        see: called with the name and the inputs, `(tokens, in_features)`, of each linear layer of the encoder.
    """
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0].flatten(0, -2)))
        for name, module in model.bert.encoder.named_modules(prefix="bert.encoder")
        if isinstance(module, torch.nn.Linear) and ".scorer." not in name
    ]
    with torch.inference_mode():
        for row in tqdm(rows, desc="Calibrating", unit="window"):
            model(**{name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids")}, length_config="full")
    for hook in hooks:
        hook.remove()


def smoothings(model, features, migration):
    """What each linear layer's input is divided by, and its weight multiplied, feature by feature: SmoothQuant's scale
    migration (Xiao et al., arXiv:2211.10438, equation 4). A few features of a LayerNorm's output are many times larger
    than the others, which 8 bits for all of them then hardly tell apart.

    Layers that read one input share it. What follows the activation has none: its input is quantised inside a product.

    Args:
        features: name of a linear layer -> [`Features`].
        migration (`float`): how much of the activations' range goes to the weights, 0 to 1; SmoothQuant's alpha.

    Returns:
        name of a linear layer -> (in_features,).
    """
    found = {}
    for i, layer in enumerate(model.bert.encoder.layer):
        attention = layer.attention
        for modules in (
            {f"attention.self.{name}": getattr(attention.self, name) for name in ("query", "key", "value")},
            {"attention.output.dense": attention.output.dense},
            {"intermediate.dense": layer.intermediate.dense},
        ):
            names = [f"bert.encoder.layer.{i}.{name}" for name in modules]
            weight = torch.cat([module.weight.detach() for module in modules.values()]).abs().amax(0)
            inputs = features[names[0]].largest
            ratio = inputs.clamp(min=1e-5) ** migration / weight.clamp(min=1e-5) ** (1 - migration)
            found |= dict.fromkeys(names, ratio)
    return found


def quantize(model, rows, clipping="mse", migration=0.8, correct_bias=True):
    """The int8 model of a float one, whose presets it has without their scores.

    Args:
        model ([`QuaLAMiniLMForQuestionAnswering`]).
        rows: windows to calibrate on, dicts with input_ids and token_type_ids, one `list` of `int` each.
        clipping: see [`Values.scale_and_zero_point`].
        migration: see [`smoothings`]; `None`: nothing is smoothed.
        correct_bias (`bool`): take from each bias what rounding the weights adds to the mean output (Nagel et al.,
            arXiv:1906.04721, section 4.2).
    """
    features, values = defaultdict(Features), defaultdict(Values)
    greatest_scores = {
        f"bert.encoder.layer.{i}.attention.self.key": GreatestScores(layer.attention.self)
        for i, layer in enumerate(model.bert.encoder.layer)
    }

    def see(name, inputs):
        features[name].see(inputs)
        if name in greatest_scores:
            greatest_scores[name].see(inputs)

    observe(model, rows, see)
    smoothing = {} if migration is None else smoothings(model, features, migration)
    observe(model, rows, lambda name, inputs: values[name].see(inputs / smoothing.get(name, 1.0)))
    for i in range(model.config.num_hidden_layers):
        # A scorer reads what the queries do, with which it is multiplied.
        for known in (features, values, smoothing):
            query = f"bert.encoder.layer.{i}.attention.self.query"
            if query in known:
                known[f"bert.encoder.layer.{i}.scorer.dense"] = known[query]
    config = copy.deepcopy(model.config)
    config.int8_weights = True
    config.length_presets = without_scores(config, config.length_presets)
    quantized = QuaLAMiniLMForQuestionAnswering(config).eval()
    floats = dict(model.named_modules())
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedEmbedding):
            module.set_weight(floats[name].weight)
        elif isinstance(module, QuantizedLinear):
            module.smoothing.copy_(smoothing.get(name, module.smoothing))
            module.set_weight(floats[name].weight)
            scale, zero_point = values[name].scale_and_zero_point(clipping)
            module.input_scale.fill_(scale)
            module.input_zero_point.fill_(zero_point)
            module.bias.copy_(floats[name].bias.detach())
            if correct_bias:
                module.bias += (floats[name].weight.detach() - module.dequantized_weight()) @ features[name].mean
            if name in greatest_scores:
                module.bias -= greatest_scores[name].shift
    weights = model.state_dict()
    quantized.load_state_dict({name: weights[name] for name, _ in quantized.named_parameters()}, strict=False)
    return quantized


def calibration_rows(table, config, seed=0):
    """`ROWS` windows drawn by `seed` from a table of [`recipe.windows.windows`], all if it has fewer: dicts with
    input_ids and token_type_ids, one `list` of `int` each."""
    rows = []
    for row in table.shuffle(seed=seed).select(range(min(len(table), ROWS))):
        types = [int(i >= row["question_length"] and config.type_vocab_size > 1) for i in range(row["length"])]
        rows.append({"input_ids": row["input_ids"], "token_type_ids": types})
    return rows


def calibration_windows(sources, tokenizer, max_length, seed=0):
    """Windows of `ROWS` questions, drawn by `seed` from the training split of SQuAD JSON files: a table.

    Raises:
        ValueError: one of the files is a test set.
    """
    refuse_test_sets("--calibration", sources)
    questions = datasets.concatenate_datasets([read_questions(source, "train") for source in sources])
    questions = questions.shuffle(seed=seed).select(range(min(len(questions), ROWS)))
    return windows(questions, tokenizer, max_length)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a float model")
    parser.add_argument("--windows", type=Path, required=True, help="folder that recipe.windows wrote, to calibrate on")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of windows (%(default)s)")
    parser.add_argument("--output_dir", required=True, help="folder to write the int8 model to")
    arguments = parser.parse_args()
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if model.config.int8_weights:
        raise ValueError(f"--model {arguments.model} is int8 already, expected a float model")
    rows = calibration_rows(datasets.load_from_disk(arguments.windows / TRAIN), model.config, arguments.seed)
    quantize(model, rows).save_pretrained(arguments.output_dir)
    load_tokenizer(arguments.model).save_pretrained(arguments.output_dir)
    graph = export_beside_weights(arguments.output_dir)
    size = (Path(arguments.output_dir) / "model.safetensors").stat().st_size
    print(f"Wrote the int8 model to {arguments.output_dir}, {size / 1e6:.2f} MB of weights, and {graph}")


if __name__ == "__main__":
    main()
