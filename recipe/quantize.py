"""Post-training static quantisation: `python -m recipe.quantize --model FOLDER --data FILE ... --output_dir DIR`.

Weights and embeddings become int8, activations 8 bit with scales that follow from what passes through the float model
on training questions. LayerNorms, scorers and span head stay floats.
"""

import argparse
import copy
import warnings
from pathlib import Path

import datasets
import torch
from torch.ao.quantization import HistogramObserver
from tqdm import tqdm

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.quantization_qualaminilm import INT8_STORAGE, QuantizedEmbedding, QuantizedLinear
from recipe.data import identities, load_tokenizer, read_questions, refuse_test_sets, training_features
from recipe.presets import without_scores


class Inputs:
    """What enters a linear layer: a histogram, and the mean of each feature."""

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao announces its own end
            self.histogram = HistogramObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
        self.summed, self.tokens = 0.0, 0

    def see(self, inputs):
        inputs = inputs.flatten(0, -2)
        self.histogram(inputs)
        self.summed = self.summed + inputs.sum(0)
        self.tokens += len(inputs)

    @property
    def mean(self):
        return self.summed / self.tokens

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


def observe(model, rows):
    """Runs `rows` (each the input_ids and token_type_ids of one window) through the float `model`, nothing dropped.

    Returns:
        name of a linear layer of the encoder -> its [`Inputs`].
    """
    seen, hooks = {}, []
    for name, module in model.bert.encoder.named_modules():
        if isinstance(module, torch.nn.Linear) and ".scorer." not in name:
            seen[name] = Inputs()
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].see(inputs[0])))
    with torch.inference_mode():
        for row in tqdm(rows, desc="Calibrating", unit="window"):
            model(**{name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids")}, length_config="full")
    for hook in hooks:
        hook.remove()
    return seen


def quantize(model, rows, clipping="mse", correct_bias=True):
    """The int8 model of a float one, whose presets it has without their scores.

    Args:
        model ([`QuaLAMiniLMForQuestionAnswering`]).
        rows: windows to calibrate on, dicts with input_ids and token_type_ids, one `list` of `int` each.
        clipping: see [`Inputs.scale_and_zero_point`].
        correct_bias (`bool`): take from each bias what rounding the weights adds to the mean output (Nagel et al.,
            arXiv:1906.04721, section 4.2).
    """
    seen = observe(model, rows)
    config = copy.deepcopy(model.config)
    config.int8_storage = INT8_STORAGE
    config.length_presets = without_scores(config, config.length_presets)
    quantized = QuaLAMiniLMForQuestionAnswering(config).eval()
    floats = dict(model.named_modules())
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedEmbedding):
            module.set_weight(floats[name].weight)
        elif isinstance(module, QuantizedLinear):
            module.set_weight(floats[name].weight)
            inputs = seen[name.removeprefix("bert.encoder.")]
            scale, zero_point = inputs.scale_and_zero_point(clipping)
            module.input_scale.fill_(scale)
            module.input_zero_point.fill_(zero_point)
            module.bias.copy_(floats[name].bias.detach())
            if correct_bias:
                module.bias += (floats[name].weight.detach() - module.dequantized_weight()) @ inputs.mean
    weights = model.state_dict()
    quantized.load_state_dict({name: weights[name] for name, _ in quantized.named_parameters()}, strict=False)
    return quantized


def calibration_rows(data, tokenizer, max_length=384, windows=256, seed=0):
    """Windows of at most `max_length` tokens, about `windows` of them, drawn by `seed` from the training split of the
    sources `data`: rows of [`training_features`].

    Raises:
        ValueError: one of the sources is a test set.
    """
    refuse_test_sets("--data", identities(data))
    questions = datasets.concatenate_datasets([read_questions(source, "train") for source in data])
    questions = questions.shuffle(seed=seed).select(range(min(len(questions), windows)))
    return training_features(questions, tokenizer, max_length, doc_stride=max_length // 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a float model")
    parser.add_argument("--data", nargs="+", required=True, help="SQuAD JSON files to calibrate on")
    parser.add_argument("--windows", type=int, default=256, help="windows drawn from the data's training split (256)")
    parser.add_argument("--max_length", type=int, default=384, help="tokens in a window (384)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--output_dir", required=True, help="folder to write the int8 model to")
    arguments = parser.parse_args()
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if model.config.int8_storage:
        raise ValueError(f"--model {arguments.model} is int8 already, expected a float model")
    tokenizer = load_tokenizer(arguments.model)
    rows = calibration_rows(arguments.data, tokenizer, arguments.max_length, arguments.windows, arguments.seed)
    quantized = quantize(model, rows)
    quantized.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    size = (Path(arguments.output_dir) / "model.safetensors").stat().st_size
    print(f"Wrote the int8 model to {arguments.output_dir}, {size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
