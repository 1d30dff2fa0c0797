"""Products of 8-bit integers, and all else that is tuned for a CPU.

A kernel computes one [`QuantizedLinear`]; products are summed exactly, by oneDNN where the processor can, else in
float32. A processor without VNNI adds the products of input features 2j and 2j + 1 in 16 bits, and saturates silently.
Weights whose magnitudes add up to at most `PAIR_LIMIT` there are exact all the same, since 255 * 128 < 2**15.
"""

import functools
import itertools
import math

import torch
from torch.nn import functional as F
from transformers.utils import logging

from .dropping_qualaminilm import add_tokens, round_up

logger = logging.get_logger(__name__)

PAIR_LIMIT = 128
# So many attention scores, of two bytes, at once: more leave the cache.
CACHED_SCORES = 1 << 21
# Between these a row's powers of 2 add up to something that bfloat16, which reaches from 2**-126 to 2**128, knows well.
# No power is greater than their sum, so that values up to 2**67 do not overflow; a power that was flushed to 0 is less
# than 2**-66 of the sum, and 2**50 such do not count beside its eight bits.
TOTALS = 2.0**-60, 2.0**60


def make_kernel(buffers):
    """The [`Kernel`] that computes a [`QuantizedLinear`] of these `buffers` here."""
    # Made in inference mode, its tensors would be refused outside.
    with torch.inference_mode(False), torch.no_grad():
        return (OneDNNKernel if runs_on_onednn(buffers["weight"]) else FloatKernel)(buffers)


class Kernel:
    """A [`QuantizedLinear`], ready for a processor.

    Args:
        buffers (`dict` of tensors): the layer's own.

    Raises:
        ValueError: they are on the meta device.
    """

    def __init__(self, buffers):
        if buffers["weight"].is_meta:
            raise ValueError("int8 weights are on the meta device, which holds no numbers: load them first")
        for name, buffer in buffers.items():
            if buffer.is_inference():  # its changes are not counted; a copy's are
                buffers[name] = buffer.clone()
        # Held, so that no other tensor can take the place of one that is gone.
        self.sources = [(buffer, buffer._version) for buffer in buffers.values()]
        weight, weight_scale, smoothing = (buffers[name] for name in ("weight", "weight_scale", "smoothing"))
        self.input_scale, self.input_zero_point = buffers["input_scale"].item(), buffers["input_zero_point"].item()
        self.grid = self.input_scale, self.input_zero_point, smoothing.cpu().numpy().tobytes()
        # What the zero point adds to the sums is known; oneDNN would add up the weights at each call to find it.
        of_zero_point = weight.sum(1, dtype=torch.float32) * self.input_zero_point * self.input_scale * weight_scale
        self.bias = buffers["bias"] - of_zero_point
        self.is_smooth = bool((smoothing != 1).any())
        self.factor = 1 / (smoothing * buffers["input_scale"])
        # Half is added so that truncation, which conversion does anyway, rounds.
        self.shift = torch.tensor(self.input_zero_point + 0.5, dtype=torch.float32, device=weight.device)
        self.pack(weight, weight_scale)

    def is_of(self, buffers):
        """Whether this kernel was made of what `buffers` hold now."""
        now = buffers.values()
        return all(each is then and each._version == version for each, (then, version) in zip(now, self.sources))

    def quantize(self, hidden_states):
        """float (..., in_features) to uint8 (..., in_features), with rows to spare behind it for [`rows_to_spare`]."""
        scaled = torch.addcmul(self.shift, hidden_states.float(), self.factor).clamp_(0, 255)
        scaled = scaled.to(torch.int16)  # not from float32 in one step, torch's slow way
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
        # In oneDNN's order, which makes the floats too the same, to the last bit where it has VNNI and no AMX.
        return product.mul_(self.input_scale).mul_(self.weight_scale).add_(self.bias).to(dtype)

    def gelu_for(self, quantized, following):
        if following.is_smooth:
            return super().gelu_for(quantized, following)
        scaled = F.gelu(self(quantized)).mul_(1 / following.input_scale).add_(following.input_zero_point)
        return scaled.round_().clamp_(0, 255).to(torch.uint8)  # as oneDNN rounds: of halves, to the even number


def over_rows(function, limit, query, key, *others):
    """`function` of `query` (batch, heads, queries, size), `key` (batch, heads, keys, size) and `others`, (batch, ...)
    or `None`, by so few rows at once that their products have at most `limit` numbers, if that can be."""
    batch, heads, queries, _ = query.shape
    rows = max(1, limit // (heads * queries * key.shape[2]))
    if query.device.type != "cpu" or batch <= rows:
        return function(query, key, *others)
    parts = (itertools.repeat(None) if each is None else each.split(rows) for each in (query, key, *others))
    return torch.cat([function(*part) for part in zip(*parts)])


def cached_attention(query, key, value, mask):
    """[`bfloat16_attention`], as many rows at once as the cache holds the scores of."""
    return over_rows(bfloat16_attention, CACHED_SCORES, query, key, value, mask)


def bfloat16_attention(query, key, value, mask):
    """What `scaled_dot_product_attention` computes, in fewer passes, on a CPU that multiplies bfloat16.

    Args:
        query, key, value (bfloat16 `(batch, heads, queries or keys, size)`).
        mask (bfloat16 `(batch, 1, 1, keys)` or `None`): added to the scores.

    Returns:
        bfloat16 `(batch, heads, queries, size)`.
    """
    if not query.numel():
        return query  # there is no least of nothing
    queries, size = query.shape[2:]
    keys = key.shape[2]
    # Copies: bmm is slow on heads that lie side by side, as they come.
    scores = add_tokens(query * (size**-0.5 / math.log(2))) @ add_tokens(key).transpose(-1, -2)
    if mask is not None:
        scores[..., :keys].add_(mask)
    # Powers of 2, in place, and no maximum taken off: each would be one more pass over the largest tensor of all.
    powers = scores.exp2_()
    total = powers[..., :queries, :keys].sum(-1, keepdim=True)
    least, greatest = total.aminmax()
    if TOTALS[0] <= least.item() and greatest.item() <= TOTALS[1]:
        return (powers @ add_tokens(value))[..., :queries, :].div_(total)
    query, key, value, mask = (each if each is None else each.float() for each in (query, key, value, mask))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).bfloat16()


def rounded_up(tokens):
    """As [`round_up`]; beyond 512 multiples so large that there are few of them, less than a sixteenth added."""
    return round_up(tokens, max(16, 1 << max(0, tokens.bit_length() - 5)))


def rows_to_spare(quantized):
    """`quantized` (uint8 (..., columns)) as [`rounded_up`] rows, (rows, columns), to be read only. The last are
    whatever stands in memory there; what is made of them is to be cut off."""
    tokens, columns = quantized.shape[:-1].numel(), quantized.shape[-1]
    rows = rounded_up(tokens)
    behind = quantized.untyped_storage().nbytes() - quantized.storage_offset()
    if quantized.is_contiguous() and behind >= rows * columns:  # made by `quantize` or by a product
        return quantized.as_strided((rows, columns), (columns, 1))
    return F.pad(quantized.reshape(tokens, columns), (0, 0, 0, rows - tokens))


def neighbours(weight):
    """`weight` (rows, columns) as pairs of columns: (rows, pairs, 2)."""
    return F.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))


def runs_on_onednn(weight):
    """Whether oneDNN sums products of `weight` (int8 (rows, columns)) exactly on this machine."""
    if weight.device.type != "cpu":
        return False
    if onednn_is_exact(2 * 127):
        return True
    if neighbours(weight.int().abs()).sum(-1).max().item() <= PAIR_LIMIT and onednn_is_exact(PAIR_LIMIT):
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
        buffers = {
            "weight": torch.cat((weight, -weight)).repeat(3, 32),
            "weight_scale": torch.ones(18, dtype=torch.float32),
            "bias": torch.zeros(18, dtype=torch.float32),
            "smoothing": torch.ones(64, dtype=torch.float32),
            "input_scale": torch.ones((), dtype=torch.float32),
            "input_zero_point": torch.zeros((), dtype=torch.uint8),
        }
        quantized = torch.full((4, 64), 255, dtype=torch.uint8)
        return torch.equal(OneDNNKernel(buffers)(quantized), FloatKernel(buffers)(quantized))


@functools.cache
def warn_of_float_kernel():
    """Once in a process."""
    logger.warning(
        "This processor or this build of torch has no exact 8-bit matrix products of these weights: they are "
        "multiplied in float32. It takes longer; answers are nearly always the same."
    )


@functools.cache
def keep_freed_memory():
    """Lets glibc's malloc keep up to 64 MB of what it is given back: twice the largest block that was freed so far, if
    that is no larger than 32 MB. Where that is a layer's, it returns memory to the system after each layer, and takes
    it again at the next. This block is never written to, and so takes no memory."""
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
