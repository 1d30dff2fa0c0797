"""What an int8 model may compute, whatever the order in which floats are added up.

Between two roundings to a layer's 8-bit grid an activation passes through some float32 operations, which every kernel,
runtime and processor orders in its own way. One that stands close to the middle between two steps of the grid may end
on either, and what follows from a step is no rounding error: a logit moves by 1e-3, or another token is dropped.
"""

import copy

import torch

from qualaminilm.quantization_qualaminilm import QuantizedLinear

# Steps from the middle within which an activation may go either way. It is at most 255 steps, and each float32
# operation is off by at most 2**-24 of its result: 16 of them, one after the other, by 255 * 16 * 2**-24.
NEAR = 2.5e-4


class SteppedTwin:
    """An int8 model in float64, each linear layer's input rounded to its grid by what the model stores."""

    def __init__(self, quantized):
        self.goes_up = {}  # activation that may go either way, in steps -> whether it goes up
        self.model = copy.deepcopy(quantized).dequantize(torch.float64)
        for name, module in quantized.named_modules():
            if isinstance(module, QuantizedLinear):
                self.model.get_submodule(name).register_forward_pre_hook(self.rounding(module))

    def rounding(self, module):
        step = module.smoothing.double() * module.input_scale.double()
        zero_point = module.input_zero_point.double()

        def round_inputs(_, inputs):
            steps = inputs[0] / step + zero_point
            up = steps - steps.floor() >= 0.5
            near = ((steps - steps.floor() - 0.5).abs() < NEAR) & (steps > -1) & (steps < 256)
            # Layers that read one input see the same numbers, which go the same way.
            up[near] = torch.tensor([self.goes_up.setdefault(each, False) for each in steps[near].tolist()]).bool()
            return ((steps.floor() + up).clamp(0, 255) - zero_point) * step

        return round_inputs

    def possible_logits(self, inputs, length_config):
        """Start and end logits of one row without padding, float64 (2, sequence): a list, one for each way in which the
        activations near the middle of two steps can go."""
        found, unseen = [], [{}]
        while unseen:
            settled = unseen.pop()
            self.goes_up = dict(settled)
            with torch.inference_mode():
                outputs = self.model(**inputs, length_config=length_config)
            found.append(torch.cat((outputs.start_logits, outputs.end_logits)))
            assert len(found) < 1000, "too many activations are near the middle: take shorter rows"
            for value in [each for each in self.goes_up if each not in settled]:
                unseen.append(settled | {value: True})
                settled = settled | {value: False}
        return found


def assert_possible(quantized, inputs, length_config, *of_paths):
    """Each row's logits must be among those that rounding allows.

    Args:
        quantized: an int8 model.
        inputs: what it takes, padded on the right.
        of_paths: start and end logits, (batch, sequence) each, of every path that computes this model.
    """
    twin = SteppedTwin(quantized)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}
        possible = twin.possible_logits(alone, length_config)
        for path, logits in enumerate(of_paths):
            found = torch.stack([torch.as_tensor(each[row, :length]).double() for each in logits])
            error = min((found - each).abs().max().item() for each in possible)
            assert error < 1e-5, f"row {row} of path {path} is {error} away from any of {len(possible)} outcomes"
