"""Int8 weights and the CPU kernels behind them.

A linear layer stores int8 weights, symmetric, with one scale an output feature, and takes 8-bit activations,
asymmetric, with one scale and zero point for the whole tensor (Jacob et al., arXiv:1712.05877), each feature divided by
its `smoothing` first, by which the weights were multiplied (SmoothQuant, Xiao et al., arXiv:2211.10438):

    output = (quantized - input_zero_point) @ weight.T * weight_scale * input_scale + bias
    quantized = clamp(round(input / (smoothing * input_scale)) + input_zero_point, 0, 255)

Products of 8-bit integers are summed exactly, by oneDNN where the processor can, else in float32. A processor without
VNNI adds the products of input features 2j and 2j + 1 in 16 bits, and saturates silently. Weights whose magnitudes add
up to at most `PAIR_LIMIT` there are exact all the same, since 255 * 128 < 2**15; [`QuantizedLinear.set_weight`] makes
such weights.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

logger = logging.get_logger(__name__)

PAIR_LIMIT = 128

# What config.json says of the stored tensors, for readers that are not this code.
INT8_STORAGE = {
    "linear": "float weight = weight * weight_scale[:, None] / smoothing; "
    "input = (uint8 - input_zero_point) * input_scale * smoothing",
    "embedding": "float weight = weight * weight_scale[:, None]",
}


class Int8Weight(nn.Module):
    """`weight` (int8, (rows, columns)) with one float32 `weight_scale` a row. Scales stay float32 whatever the module
    is cast to: the integers mean nothing without them."""

    def __init__(self, rows, columns):
        super().__init__()
        self.register_buffer("weight", torch.zeros(rows, columns, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(rows, dtype=torch.float32))

    def dequantized_weight(self):
        """float32 (rows, columns)."""
        return self.weight * self.weight_scale[:, None]

    def set_weight(self, weight):
        """Rounds `weight` (float, (rows, columns)) to this module's integers."""
        weight = weight.detach().float()
        self.weight_scale.copy_((self.magnitude(weight) / 127).clamp(min=torch.finfo(torch.float32).tiny))
        self.weight.copy_((weight / self.weight_scale[:, None]).round())

    def num_parameters(self):
        """How many floats the stored tensors stand for (`int`)."""
        return self.weight.numel()

    @staticmethod
    def magnitude(weight):
        """What becomes 127 of each row of `weight`: (rows,)."""
        return weight.abs().amax(1)

    def _apply(self, fn, recurse=True):
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class QuantizedEmbedding(Int8Weight):
    """`nn.Embedding` over int8 rows: int64 (...) to float (..., columns)."""

    def __init__(self, num_embeddings, embedding_dim, padding_idx=None):
        super().__init__(num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, input_ids):
        return F.embedding(input_ids, self.weight) * F.embedding(input_ids, self.weight_scale[:, None])

    def dequantize(self):
        """The `nn.Embedding` of the same rows."""
        return nn.Embedding.from_pretrained(self.dequantized_weight(), freeze=False, padding_idx=self.padding_idx)


class QuantizedLinear(Int8Weight):
    """`nn.Linear` over int8 weights: (..., in_features), float or uint8 as [`Kernel.quantize`] gives it, to
    float32 (..., out_features).

    What the processor's kernel needs beside the stored tensors is made at the first call, again where they changed
    since (all but through `.data`, of which torch keeps no count), and kept out of copies and pickles.
    """

    def __init__(self, in_features, out_features):
        super().__init__(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32))
        self.register_buffer("smoothing", torch.ones(in_features, dtype=torch.float32))
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.uint8))
        self._kernels = {}  # by the number of layers beside this one

    def dequantized_weight(self):
        """float32 (out_features, in_features)."""
        return super().dequantized_weight() / self.smoothing

    def set_weight(self, weight):
        """Rounds `weight`, float (out_features, in_features), to this module's integers, given its `smoothing`."""
        super().set_weight(weight * self.smoothing)

    def num_parameters(self):
        return super().num_parameters() + self.bias.numel()

    @property
    def is_smooth(self):
        """Whether any feature of the input is divided by anything."""
        return bool((self.smoothing != 1).any())

    @staticmethod
    def magnitude(weight):
        # Each of the two rounds up by half at most: together they keep to 128, the PAIR_LIMIT.
        return neighbours(weight.abs()).sum(-1).amax(1)

    def forward(self, hidden_states):
        kernel = self.kernel()
        return kernel(hidden_states if hidden_states.dtype == torch.uint8 else kernel.quantize(hidden_states))

    def kernel(self, *others):
        """A [`Kernel`] that computes this layer, and `others` beside it, in one product.

        Raises:
            ValueError: these layers quantise their input differently, or are on the meta device.
        """
        linears = [self, *others]
        # Once: another thread may put another in its place.
        kernel = self._kernels.get(len(others))
        if kernel is None or not kernel.is_of(linears):
            # Made in inference mode, its tensors would be refused outside.
            with torch.inference_mode(False), torch.no_grad():
                kernel = (OneDNNKernel if runs_on_onednn(linears) else FloatKernel)(linears)
            if has_own_forward(self):  # else accelerate may lend the tensors for this call only
                self._kernels[len(others)] = kernel
        return kernel

    def dequantize(self):
        """The `nn.Linear` of the same weights."""
        linear = nn.Linear(self.in_features, self.out_features, device=self.weight.device)
        linear.weight.data = self.dequantized_weight()
        linear.bias.data = self.bias.clone()
        return linear

    def __getstate__(self):
        return self.__dict__ | {"_kernels": {}}


class Kernel:
    """[`QuantizedLinear`] layers that read one input, side by side, ready for a processor."""

    def __init__(self, linears):
        for linear in linears:
            if linear.weight.is_meta:
                raise ValueError("int8 weights are on the meta device, which holds no numbers: load them first")
            for name, buffer in linear._buffers.items():
                if buffer.is_inference():  # its changes are not counted; a copy's are
                    linear._buffers[name] = buffer.clone()
        # Held, so that no other tensor can take the place of one that is gone.
        self.sources = [(buffer, buffer._version) for linear in linears for buffer in linear._buffers.values()]
        first = linears[0]
        for name in ("input_scale", "input_zero_point", "smoothing"):
            if not all(torch.equal(getattr(first, name), getattr(linear, name)) for linear in linears):
                raise ValueError(f"layers that read one input quantise it alike, but theirs differ in {name}")
        self.input_scale, self.input_zero_point = first.input_scale.item(), first.input_zero_point.item()
        weight = torch.cat([linear.weight for linear in linears])
        weight_scale = torch.cat([linear.weight_scale for linear in linears])
        # What the zero point adds to the sums is known; oneDNN would add up the weights at each call to find it.
        of_zero_point = weight.sum(1, dtype=torch.float32) * self.input_zero_point * self.input_scale * weight_scale
        self.bias = torch.cat([linear.bias for linear in linears]) - of_zero_point
        self.is_smooth = first.is_smooth
        self.factor = 1 / (first.smoothing * first.input_scale)
        # Half is added so that truncation, which conversion does anyway, rounds.
        self.shift = torch.tensor(self.input_zero_point + 0.5, dtype=torch.float32, device=first.weight.device)
        self.pack(weight, weight_scale)

    def is_of(self, linears):
        """Whether this kernel was made of what `linears` hold now."""
        held = (buffer for linear in linears for buffer in linear._buffers.values())
        return all(now is then and now._version == version for now, (then, version) in zip(held, self.sources))

    def quantize(self, hidden_states):
        """float (..., in_features) to uint8 (..., in_features), with rows to spare behind it for [`rows_to_spare`]."""
        scaled = torch.addcmul(self.shift, hidden_states.float(), self.factor).clamp_(0, 255)
        scaled = scaled.to(torch.int16)  # from float32 in one step takes torch twice as long
        tokens, columns = scaled.shape[:-1].numel(), scaled.shape[-1]
        quantized = scaled.new_empty(rounded_up(tokens) * columns, dtype=torch.uint8)
        return quantized[: tokens * columns].view(scaled.shape).copy_(scaled)

    def gelu_for(self, quantized, following):
        """GELU of the product, as uint8 for the kernel `following`."""
        return following.quantize(F.gelu(self(quantized)))


class OneDNNKernel(Kernel):
    """Products of oneDNN, with what follows them fused in."""

    def pack(self, weight, weight_scale):
        keep_freed_memory()
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.weight_scale = weight_scale
        self.weight_zero_point = torch.zeros_like(weight_scale, dtype=torch.int32)

    def __call__(self, quantized, dtype=torch.float32):
        """uint8 (..., in_features) to `dtype` (..., out_features)."""
        return self._product(quantized, 1.0, 0, dtype, "none")

    def gelu_for(self, quantized, following):
        if following.is_smooth:  # the product has but one scale for its output
            return super().gelu_for(quantized, following)
        return self._product(quantized, following.input_scale, following.input_zero_point, torch.uint8, "gelu")

    def _product(self, quantized, output_scale, output_zero_point, dtype, post_op):
        product = torch.ops.onednn.qlinear_pointwise(
            rows_to_spare(quantized),
            self.input_scale,
            0,
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            output_scale,
            output_zero_point,
            dtype,
            post_op,
            [],
            "none",
        )
        shape = quantized.shape[:-1]
        return product[: shape.numel()].view(*shape, product.shape[-1])


class FloatKernel(Kernel):
    """The same integers multiplied in float32, on any device; sums of products are exact up to 2**24."""

    def pack(self, weight, weight_scale):
        self.weight = weight.float()
        self.weight_scale = weight_scale

    def __call__(self, quantized, dtype=torch.float32):
        with torch.autocast(quantized.device.type, enabled=False):  # which would round the integers
            product = F.linear(quantized.float(), self.weight)
        # In oneDNN's order, which makes the floats too the same, to the last bit where it has AVX-512.
        return product.mul_(self.input_scale).mul_(self.weight_scale).add_(self.bias).to(dtype)

    def gelu_for(self, quantized, following):
        if following.is_smooth:
            return super().gelu_for(quantized, following)
        scaled = F.gelu(self(quantized)).mul_(1 / following.input_scale).add_(following.input_zero_point)
        return scaled.round_().clamp_(0, 255).to(torch.uint8)  # as oneDNN rounds: of halves, to the even number


def has_own_forward(module):
    """Whether nobody put a function in the place of the module's `forward`, as accelerate does."""
    return getattr(module.forward, "__func__", None) is type(module).forward


def is_plain(module):
    """Whether a call of `module` does no more than its own `forward`: no hook is to be called with it."""
    return has_own_forward(module) and not (module._forward_pre_hooks or module._forward_hooks)


def fusible(*layers):
    """Whether kernels may read these layers' tensors without a call of each: int8 layers, all of them plain."""
    return all(isinstance(layer, QuantizedLinear) and is_plain(layer) for layer in layers)


def rounded_up(tokens):
    """One of few numbers, at least `tokens`: oneDNN builds a kernel for each number of rows that it meets, and takes
    longer for it than for a layer. Up to 512 they are multiples of 16; beyond, less than a sixteenth is added."""
    return tokens + -tokens % max(16, 1 << max(0, tokens.bit_length() - 5))


def rows_to_spare(quantized):
    """`quantized` (uint8 (..., columns)) as [`rounded_up`] rows, (rows, columns), to be read only. The last are
    whatever stands in memory there; what is made of them is to be cut off."""
    tokens, columns = quantized.shape[:-1].numel(), quantized.shape[-1]
    rows = rounded_up(tokens)
    room = quantized.untyped_storage().nbytes() - quantized.storage_offset()
    if quantized.is_contiguous() and room >= rows * columns:  # made by `quantize` or by a product
        return quantized.as_strided((rows, columns), (columns, 1))
    return F.pad(quantized.reshape(tokens, columns), (0, 0, 0, rows - tokens))


def neighbours(weight):
    """`weight` (rows, columns) as pairs of columns: (rows, pairs, 2)."""
    return F.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))


def runs_on_onednn(linears):
    """Whether oneDNN sums the products of these layers' weights exactly on this machine."""
    if linears[0].weight.device.type != "cpu":
        return False
    if onednn_is_exact(2 * 127):
        return True
    largest = max(neighbours(linear.weight.int().abs()).sum(-1).max().item() for linear in linears)
    if largest <= PAIR_LIMIT and onednn_is_exact(PAIR_LIMIT):
        return True
    warn_of_float_kernel()
    return False


def onednn_is_exact(pair):
    """Whether oneDNN sums products exactly here where two neighbouring weights' magnitudes add up to `pair` at most."""
    try:
        return sums_exactly(pair)
    except (AttributeError, RuntimeError):
        return False


@functools.cache  # which remembers no exception: it may come of what the caller runs under
def sums_exactly(pair):
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        weight = torch.tensor([[127, pair - 127], [pair - 127, 127], [pair // 2, pair // 2]], dtype=torch.int8)
        linear = QuantizedLinear(64, 18)
        linear.weight.copy_(torch.cat((weight, -weight)).repeat(3, 32))
        quantized = torch.full((4, 64), 255, dtype=torch.uint8)
        return torch.equal(OneDNNKernel([linear])(quantized), FloatKernel([linear])(quantized))


@functools.cache
def warn_of_float_kernel():
    logger.warning(
        "This processor or this build of torch has no exact 8-bit matrix products of these weights: they are "
        "multiplied in float32. It takes longer; answers are nearly always the same."
    )


@functools.cache
def keep_freed_memory():
    """Lets glibc's malloc keep up to 64 MB of what it is given back: twice the largest block that was freed so far, if
    that is no larger than 32 MB. Where that is a layer's, it returns memory to the system after each layer, and to take
    it again costs a large batch a tenth of its time. This block is never written to, and so takes no memory."""
    torch.empty((1 << 25) - (1 << 16), dtype=torch.uint8, device="cpu")


def attention_dtype(device):
    """What queries, keys and values are handed on in on `device`: bfloat16 on a CPU that multiplies it, float32
    elsewhere."""
    return torch.bfloat16 if device.type == "cpu" and cpu_multiplies_bfloat16() else torch.float32


@functools.cache
def cpu_multiplies_bfloat16():
    """Whether the processor multiplies bfloat16 itself; emulated it is slower than float32. Only x86's ways count."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    # Before torch 2.11. What has AMX tiles multiplies bfloat16 in them.
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in asked)
