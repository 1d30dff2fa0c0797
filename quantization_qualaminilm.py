"""Int8 weights: how they are stored, and the layers over them.

A linear layer stores int8 weights, symmetric, with one scale an output feature, and takes 8-bit activations,
asymmetric, with one scale and zero point for the whole tensor (Jacob et al., arXiv:1712.05877), each feature divided by
its `smoothing` first, by which the weights were multiplied (SmoothQuant, Xiao et al., arXiv:2211.10438):

    output = (quantized - input_zero_point) @ weight.T * weight_scale * input_scale + bias
    quantized = clamp(round(input / (smoothing * input_scale)) + input_zero_point, 0, 255)

The float weights that it stands for are weight * weight_scale[:, None] / smoothing, an embedding's weight *
weight_scale[:, None].
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from transformers.activations import ACT2FN

from .dropping_qualaminilm import DroppingLayer, QuaLAMiniLMScorer, attend, on_tokens
from .kernels_qualaminilm import CACHED_SCORES, attention_dtype, cached_attention, make_kernel, neighbours, over_rows


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


class QuantizedLinear(Int8Weight):
    """`nn.Linear` over int8 weights: (..., in_features), float or uint8 as [`Kernel.quantize`] gives it, to
    (..., out_features).

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
        self._kernel = None

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

    def forward(self, hidden_states, dtype=torch.float32, following=None):
        """The layer's output in `dtype`; or, with the [`Kernel`] of a layer that is `following`, its GELU as the uint8
        that this one reads."""
        kernel = self.kernel()
        quantized = hidden_states if hidden_states.dtype == torch.uint8 else kernel.quantize(hidden_states)
        return kernel(quantized, dtype) if following is None else kernel.gelu_for(quantized, following)

    def kernel(self):
        """The [`Kernel`] that computes this layer.

        Raises:
            ValueError: it is on the meta device.
        """
        # Once: another thread may put another in its place.
        kernel = self._kernel
        if kernel is None or not kernel.is_of(self._buffers):
            kernel = make_kernel(self._buffers)
            if is_plain(self):  # else accelerate may lend the tensors for this call only
                self._kernel = kernel
        return kernel

    def __getstate__(self):
        return self.__dict__ | {"_kernel": None}


class Int8SelfAttention(nn.Module):
    """[`QuaLAMiniLMSelfAttention`] over int8 weights."""

    def __init__(self, config):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = QuantizedLinear(config.hidden_size, config.hidden_size)
        self.key = QuantizedLinear(config.hidden_size, config.hidden_size)
        self.value = QuantizedLinear(config.hidden_size, config.hidden_size)

    def forward(self, inputs, alive, queries, asking, with_map):
        dtype = attention_dtype(inputs.device)
        query = on_tokens(lambda states: self.query(states, dtype), asking, queries)
        key, value = on_tokens(lambda states: (self.key(states, dtype), self.value(states, dtype)), alive, inputs)
        fused = cached_attention if dtype == torch.bfloat16 else F.scaled_dot_product_attention
        return attend(query, key, value, alive, self.num_attention_heads, fused, nn.Identity() if with_map else None)


class Int8Residual(nn.Module):
    """[`QuaLAMiniLMResidual`] over int8 weights."""

    def __init__(self, config, in_features):
        super().__init__()
        self.dense = QuantizedLinear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dense(hidden_states).to(input_tensor.dtype) + input_tensor)


class Int8Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self = Int8SelfAttention(config)
        self.output = Int8Residual(config, config.hidden_size)


class Int8Intermediate(nn.Module):
    """[`QuaLAMiniLMIntermediate`] over int8 weights; to the [`Kernel`] that reads it, if given, it hands on uint8."""

    def __init__(self, config):
        super().__init__()
        self.dense = QuantizedLinear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]
        self.is_gelu = config.hidden_act == "gelu"

    def forward(self, hidden_states, following):
        if self.is_gelu and following is not None:
            return self.dense(hidden_states, following=following)
        return self.intermediate_act_fn(self.dense(hidden_states))


class Int8Scorer(QuaLAMiniLMScorer):
    """[`QuaLAMiniLMScorer`] over int8 weights."""

    def __init__(self, config):
        super().__init__(config, linear=QuantizedLinear)

    def forward(self, states, alive):
        return self.score(self.dense(states).to(self.out_proj.weight.dtype), alive)

    def greatest_match(self, matched, gated):
        return over_rows(super().greatest_match, CACHED_SCORES // 2, matched, gated)  # of four bytes


class Int8Layer(DroppingLayer):
    """[`QuaLAMiniLMLayer`] over int8 weights."""

    def __init__(self, config):
        super().__init__()
        self.attention = Int8Attention(config)
        self.intermediate = Int8Intermediate(config)
        self.output = Int8Residual(config, config.intermediate_size)
        self.scorer = Int8Scorer(config) if config.significance == "learned" else None

    def inputs_of(self, hidden_states):
        """`hidden_states` rounded once for all that read them, uint8; floats where somebody looks on or offloads.

        Raises:
            ValueError: these layers round their input differently.
        """
        attention = self.attention.self
        readers = [attention.query, attention.key, attention.value]
        if self.scorer is not None:
            readers.append(self.scorer.dense)
        if not all(map(is_plain, (attention, self.scorer, *readers))):
            return hidden_states
        kernels = [reader.kernel() for reader in readers]
        if any(kernel.grid != kernels[0].grid for kernel in kernels):
            raise ValueError(
                "layers that read one input round it differently: input_scale, input_zero_point or smoothing of query, "
                "key, value and scorer differ"
            )
        return kernels[0].quantize(hidden_states)

    def feed_forward(self, context, residual):
        attention_output = self.attention.output(context, residual)
        inner, output = self.intermediate, self.output
        is_plain_all = all(map(is_plain, (inner, inner.dense, output, output.dense)))
        following = output.dense.kernel() if is_plain_all else None
        return self.output(self.intermediate(attention_output, following), attention_output)


def is_plain(module):
    """Whether a call of `module` does no more than its own `forward`: nobody's hook is called with it, and nobody put a
    function in the place of `forward`, as accelerate does, which may lend it its tensors for the time of a call."""
    if module is None:
        return True
    if has_any_global_hook():
        return False
    own = getattr(module.forward, "__func__", None) is type(module).forward
    return own and not (module._forward_pre_hooks or module._forward_hooks)


class Int8Model:
    """What a [`PreTrainedModel`] of int8 weights, `config.int8_weights`, does differently."""

    def dequantize(self, dtype=None):
        """Puts float weights in the place of int8 ones: to train, to save, or to run on a GPU. Embeddings and layers
        are others then, without the hooks that these had.

        Args:
            dtype (`torch.dtype`): of all weights; float32 by default.

        Returns:
            this model.

        Raises:
            ValueError: its weights are floats already, as in transformers.
        """
        if not self.config.int8_weights:
            raise ValueError("the weights are floats: you need to first quantize your model in order to dequantize it")
        config = copy.deepcopy(self.config)
        config.int8_weights = False
        with torch.device("meta"):
            floats = type(self)(config)
        floats.load_state_dict(float_state(self), strict=False, assign=True)  # there may be modules of the caller's
        for name, module in list(self.named_modules()):
            if isinstance(module, (QuantizedEmbedding, Int8Layer)):
                twin = floats.get_submodule(name).train(self.training)
                for part, kept in list(module.named_modules()):
                    if isinstance(kept, (nn.LayerNorm, nn.Linear, nn.Conv1d)):  # floats already
                        twin.set_submodule(part, kept)
                self.set_submodule(name, twin)
        self.config.int8_weights = False
        return self.to(dtype or torch.float32)

    def _require_floats(self, fault):
        if self.config.int8_weights:
            raise ValueError(f"int8 {fault}: call dequantize() first")

    def train(self, mode=True):
        """As in [`torch.nn.Module`].

        Raises:
            ValueError: `mode` with int8 weights, which cannot learn.
        """
        if mode:
            self._require_floats("weights cannot be trained")
        return super().train(mode)

    def gradient_checkpointing_enable(self, *args, **kwargs):
        """As in [`PreTrainedModel`].

        Raises:
            ValueError: the weights are int8.
        """
        self._require_floats("weights cannot be trained")
        return super().gradient_checkpointing_enable(*args, **kwargs)

    def num_parameters(self, only_trainable=False, exclude_embeddings=False):
        """As in [`PreTrainedModel`]: int8 weights count as the floats that they stand for, of which none learns."""
        count = super().num_parameters(only_trainable, exclude_embeddings)
        if not self.config.int8_weights:
            return count
        if only_trainable:
            return 0
        stored = [module for module in self.modules() if isinstance(module, Int8Weight)]
        if exclude_embeddings:
            stored = [module for module in stored if not isinstance(module, QuantizedEmbedding)]
        return count + sum(module.num_parameters() for module in stored)

    def resize_token_embeddings(self, *args, **kwargs):
        """As in [`PreTrainedModel`].

        Raises:
            ValueError: the weights are int8.
        """
        self._require_floats("embeddings cannot be resized")
        return super().resize_token_embeddings(*args, **kwargs)


def float_state(model):
    """The state dict, floats alone, of the model that these int8 weights stand for."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Int8Weight):
            for of_storage in module._buffers:
                del state[f"{name}.{of_storage}"]
            state[f"{name}.weight"] = module.dequantized_weight()
            if isinstance(module, QuantizedLinear):
                state[f"{name}.bias"] = module.bias.clone()
    return state
