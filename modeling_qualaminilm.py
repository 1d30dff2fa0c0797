"""BERT and RoBERTa encoders for extractive question answering that drop tokens as they rise through the layers.

QuaLA-MiniLM, Guskin et al., arXiv:2210.17114; drop and restore, Length-Adaptive Transformer, Kim and Cho,
arXiv:2010.07003. Module and weight names are those of transformers' `BertForQuestionAnswering`.

Inside the encoder the tokens that are still on their way stand in *slots*: a (batch, slots, hidden) tensor, each row's
tokens in ascending order of position, rows with fewer tokens ending in dead slots.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Optional

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_qualaminilm import QuaLAMiniLMConfig, check_weights, require
from .engine_qualaminilm import ENGINES, find_engine
from .graph_qualaminilm import Graph  # noqa: F401  transformers 4.57 copies a local file's own imports alone
from .quantization_qualaminilm import (
    Int8Weight,
    QuantizedEmbedding,
    QuantizedLinear,
    attention_dtype,
    fusible,
    is_plain,
)

# On a CPU a batch of more takes longer than its parts do: what a layer makes of it does not stay in the cache.
CACHED_TOKENS = 16 * 384
# So many attention scores, of two bytes, at once: more leave the cache.
CACHED_SCORES = 1 << 21
# Between these a row's powers of 2 add up to something that bfloat16, which reaches from 2**-126 to 2**128, knows well.
# No power is greater than their sum, so that values up to 2**67 do not overflow; a power that was flushed to 0 is less
# than 2**-66 of the sum, and 2**50 such do not count beside its eight bits.
TOTALS = 2.0**-60, 2.0**60


@dataclass
class QuaLAMiniLMModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, sequence, hidden)`): every token, restored.
        hidden_states (tuple, on request): the embeddings and each layer's output, restored to
            `(batch, sequence, hidden)`.
        attentions (tuple, on request): one `(batch, heads, queries, keys)` a layer. Keys are the slots that enter the
            layer; queries too, or with `"learned"` significance the slots that leave it.
        kept_tokens (tuple, on request): one `torch.LongTensor` of shape `(batch, k)` a layer, the positions of the
            tokens handed on, ascending, padded with -1.
    """

    last_hidden_state: Optional[torch.FloatTensor] = None
    hidden_states: Optional[tuple] = None
    attentions: Optional[tuple] = None
    kept_tokens: Optional[tuple] = None


@dataclass
class QuaLAMiniLMQuestionAnsweringOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, with labels): mean of the start and end cross-entropies.
        start_logits, end_logits (`torch.FloatTensor` of shape `(batch, sequence)`): at padding, the dtype's minimum.
        hidden_states, attentions, kept_tokens: see [`QuaLAMiniLMModelOutput`].
    """

    loss: Optional[torch.FloatTensor] = None
    start_logits: Optional[torch.FloatTensor] = None
    end_logits: Optional[torch.FloatTensor] = None
    hidden_states: Optional[tuple] = None
    attentions: Optional[tuple] = None
    kept_tokens: Optional[tuple] = None


def embedding(config, num_embeddings, padding_idx=None):
    """Embeddings in the kind of numbers that the configuration stores."""
    kind = QuantizedEmbedding if config.int8_storage else nn.Embedding
    return kind(num_embeddings, config.hidden_size, padding_idx=padding_idx)


def linear(config, in_features, out_features):
    """A linear layer in the kind of numbers that the configuration stores."""
    return (QuantizedLinear if config.int8_storage else nn.Linear)(in_features, out_features)


class FirstLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that takes any floats, as int8 embeddings or a caller give them, and gives the model's."""

    def forward(self, embeddings):
        return super().forward(embeddings.to(self.weight.dtype))


class QuaLAMiniLMEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.roberta = config.embedding_type == "roberta"
        self.padding_idx = config.pad_token_id
        self.first_position = config.first_position
        self.word_embeddings = embedding(config, config.vocab_size, padding_idx=config.pad_token_id)
        self.position_embeddings = embedding(config, config.max_position_embeddings)
        self.token_type_embeddings = embedding(config, config.type_vocab_size)
        self.LayerNorm = FirstLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids, position_ids, inputs_embeds):
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        shape = tokens.shape[:2]
        if position_ids is None:
            position_ids = self._position_ids(input_ids, shape, tokens.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros(shape, dtype=torch.long, device=tokens.device)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))

    def _position_ids(self, input_ids, shape, device):
        """int64 (batch, sequence); (1, sequence) where all rows have the same."""
        first = self.first_position
        room = self.position_embeddings.num_embeddings - first
        if shape[1] > room:
            raise ValueError(f"the input is {shape[1]} tokens long, the model has positions for {room}")
        if self.roberta and input_ids is not None:
            real = input_ids.ne(self.padding_idx).long()
            return real.cumsum(1) * real + self.padding_idx
        return torch.arange(first, first + shape[1], device=device)[None]


class QuaLAMiniLMSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.query = linear(config, config.hidden_size, config.hidden_size)
        self.key = linear(config, config.hidden_size, config.hidden_size)
        self.value = linear(config, config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, query_states, hidden_states, asking, alive, with_map):
        """Attention of `query_states` (batch, queries, hidden), those that are `asking` (bool (batch, queries); `None`:
        all), over `hidden_states` (batch, keys, hidden), those that are `alive`: what `attend` returns."""
        # In training on dead slots too: oneDNN builds kernels for each new number of tokens.
        asking, held = (None, None) if self.training else (asking, alive)
        query = over_tokens(self.query, asking, query_states)
        key, value = (over_tokens(layer, held, hidden_states) for layer in (self.key, self.value))
        return self.attend(query, key, value, alive, with_map)

    def attend(self, query, key, value, alive, with_map):
        """Attention of queries (batch, queries, hidden) over keys and values (batch, keys, hidden), as projected, those
        that are `alive` (bool (batch, keys); `None`: all).

        Returns the context (batch, queries, hidden) and, if `with_map`, the probabilities before dropout
        (batch, heads, queries, keys), else `None`.
        """
        query, key, value = (
            projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for projected in (query, key, value)
        )
        mask = None
        if alive is not None:
            # Not -inf, which makes a row of nothing but padding NaN.
            mask = query.new_zeros(alive.shape).masked_fill_(~alive, torch.finfo(query.dtype).min)[:, None, None]
        if with_map:
            # Autocast would carry the maps, the largest tensors of all, through float32.
            with torch.autocast(query.device.type, enabled=False):
                scores = query * self.attention_head_size**-0.5 @ key.transpose(-1, -2)
                if mask is not None:
                    scores = scores + mask
                probabilities = scores.softmax(-1)
                context = self.dropout(probabilities) @ value
        elif isinstance(self.query, QuantizedLinear) and query.dtype == torch.bfloat16:
            probabilities = None
            context = over_rows(bfloat16_attention, CACHED_SCORES, query, key, value, mask)
        else:
            probabilities = None
            context = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=self.dropout.p if self.training else 0.0
            )
        return context.transpose(1, 2).flatten(2), probabilities

    def project_int8(self, hidden_states, alive, *others):
        """Queries, keys and values of all of `hidden_states` (batch, slots, hidden), and what the linear layers
        `others` make of it, in one 8-bit product."""
        layers = self.query, self.key, self.value, *others
        kernel = self.query.kernel(*layers[1:])
        dtype = attention_dtype(hidden_states.device)
        projected = over_tokens(lambda states: kernel(kernel.quantize(states), dtype), alive, hidden_states)
        return projected.split([layer.out_features for layer in layers], -1)


def split_rows(rows, *tensors):
    """`tensors` (batch, ...), not all of them `None`, by `rows` rows: a list of tuples, each with `None` for `None`."""
    return list(zip(*(itertools.repeat(None) if each is None else each.split(rows) for each in tensors)))


def over_rows(function, limit, query, key, *others):
    """`function` of `query` (batch, heads, queries, size), `key` (batch, heads, keys, size) and `others`, (batch, ...)
    or `None`, by so few rows at once that their products have at most `limit` numbers, if that can be."""
    batch, heads, queries, _ = query.shape
    rows = max(1, limit // (heads * queries * key.shape[2]))
    if query.device.type != "cpu" or torch.is_grad_enabled() or batch <= rows:
        return function(query, key, *others)
    return torch.cat([function(*part) for part in split_rows(rows, query, key, *others)])


def bfloat16_attention(query, key, value, mask):
    """What `scaled_dot_product_attention` computes, on a CPU that multiplies bfloat16, in half of its time.

    Args:
        query, key, value (bfloat16 `(batch, heads, queries or keys, size)`).
        mask (bfloat16 `(batch, 1, 1, keys)` or `None`): added to the scores.

    Returns:
        bfloat16 `(batch, heads, queries, size)`.
    """
    queries, size = query.shape[2:]
    keys = key.shape[2]
    # Heads side by side, as they come, take bmm a third longer than the copies.
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


def add_tokens(states):
    """`states` (..., tokens, size) with zeros for more tokens, up to a multiple of 16, contiguous: for each number of
    tokens that it meets oneDNN builds a kernel, and takes longer for it than for a layer."""
    missing = -states.shape[-2] % 16
    return F.pad(states, (0, 0, 0, missing)) if missing else states.contiguous()


def over_tokens(function, alive, *states):
    """`function` of the slots that hold a token, as if there were no others; elsewhere 0.

    Args:
        function: `(tokens, size)`, once or more, to `(tokens, other size)`.
        alive (bool `(batch, slots)`): which slots hold a token; `None`: all, and they are not rearranged.
        states (`(batch, slots, size)`).
    """
    if alive is None:
        return function(*states)
    index = alive.flatten().nonzero().squeeze(1)
    result = function(*(each.flatten(0, 1)[index] for each in states))
    everywhere = result.new_zeros(alive.numel(), result.shape[-1])
    return everywhere.index_copy(0, index, result).unflatten(0, alive.shape)


class QuaLAMiniLMResidual(nn.Module):
    """Projection, dropout, residual connection and LayerNorm: BERT's `BertSelfOutput` and `BertOutput`."""

    def __init__(self, config, in_features):
        super().__init__()
        self.dense = linear(config, in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, input_tensor):
        projected = self.dense(hidden_states)
        if fusible(self.dense):  # floats may be held by autograd, or by somebody's hook
            return self.LayerNorm(projected.to(input_tensor.dtype).add_(input_tensor))
        return self.LayerNorm(self.dropout(projected) + input_tensor)


class QuaLAMiniLMAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self = QuaLAMiniLMSelfAttention(config)
        self.output = QuaLAMiniLMResidual(config, config.hidden_size)


class QuaLAMiniLMIntermediate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = linear(config, config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]
        self.is_gelu = config.hidden_act == "gelu"

    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states))


class Neighbourhood(nn.Conv1d):
    """`nn.Conv1d` in two dimensions, where oneDNN takes a fifth of the time."""

    def forward(self, channels_first):
        if self.groups <= 16:  # of so few channels, token by token, in bfloat16, oneDNN's kernel may never return
            channels_first = channels_first.contiguous()
        weight, padding = self.weight[:, :, None], (0, *self.padding)
        return F.conv2d(channels_first[:, :, None], weight, self.bias, padding=padding, groups=self.groups).squeeze(2)


class QuaLAMiniLMScorer(nn.Module):
    """Significance of each token from what enters a layer: (batch, slots, hidden) to (batch, slots).

    A token matters by what it is, by how well it matches the question, and by both in its neighbourhood: of the answer
    the lower layers know no more than that it stands near words that the question uses. A match is the greatest cosine
    to any token, each weighed by a gate that learns to open for the question's (ColBERT's late interaction, Khattab
    and Zaharia, arXiv:2004.12832); there are `HEADS` of them. About a fiftieth of the layer's own work.
    """

    HEADS, HEAD_SIZE = 4, 8
    REACH = 16  # tokens to either side that make a neighbourhood

    def __init__(self, config):
        super().__init__()
        features = max(1, config.hidden_size // 12)
        self.sizes = features, self.HEADS * self.HEAD_SIZE, self.HEADS
        self.dense = linear(config, config.hidden_size, sum(self.sizes))
        self.act_fn = nn.GELU()
        channels = features + self.HEADS
        self.neighbourhood = Neighbourhood(channels, channels, 2 * self.REACH + 1, padding=self.REACH, groups=channels)
        self.out_proj = nn.Linear(2 * channels, 1, bias=False)  # a bias would rank nothing

    def forward(self, hidden_states, alive):
        """`alive` (bool `(batch, slots)` or `None`: all): slots that hold a token; the others tell it nothing."""
        projected = self.dense(hidden_states)
        if isinstance(self.dense, QuantizedLinear):  # which gives float32 whatever it takes
            projected = projected.to(hidden_states.dtype)
        return self.score(projected, alive)

    def score(self, projected, alive):
        """`forward` from what `dense` makes of the hidden states."""
        features, matched, gate = projected.split(self.sizes, -1)
        matched = matched.unflatten(-1, (self.HEADS, self.HEAD_SIZE)).transpose(1, 2)
        norm = torch.linalg.vector_norm(matched, dim=-1).clamp(min=1e-12)
        gate = gate.sigmoid()
        if alive is not None:
            gate = gate * alive[..., None]
        # Cosines, one norm divided out before the products and the other after: a number a token each.
        gated = matched * (gate.transpose(1, 2) / norm)[..., None]
        # Half as many, since these are float32.
        match = (over_rows(greatest_match, CACHED_SCORES // 2, matched, gated) / norm).transpose(1, 2)
        own = torch.cat((self.act_fn(features), match), -1)
        if alive is not None:
            own = own * alive[..., None]
        around = self.look_around(own)
        return self.out_proj(torch.cat((own, around), -1)).squeeze(-1)

    def look_around(self, own):
        """What the neighbourhood of each slot holds, (batch, slots, channels)."""
        around = self.neighbourhood(add_tokens(own).transpose(1, 2))
        return self.act_fn(around).transpose(1, 2)[:, : own.shape[1]]


def greatest_match(matched, gated):
    """The greatest product of each token's vector in `matched` with any in `gated`, both (batch, heads, tokens, size):
    (batch, heads, tokens)."""
    return (matched @ gated.transpose(-1, -2)).amax(-1)


class QuaLAMiniLMLayer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.attention = QuaLAMiniLMAttention(config)
        self.intermediate = QuaLAMiniLMIntermediate(config)
        self.output = QuaLAMiniLMResidual(config, config.intermediate_size)
        self.scorer = QuaLAMiniLMScorer(config) if config.significance == "learned" else None

    def forward(self, hidden_states, alive, keep, with_map):
        """One layer, which hands on the most significant tokens.

        Args:
            hidden_states (`(batch, slots, hidden)`): the tokens that enter.
            alive (bool, `(batch, slots)`): slots that hold a token; `None`: all do.
            keep (list of `int`, one a row): how many tokens to hand on; `None`: all of them.
            with_map (`bool`): return the attention map though significance does not need it.

        Returns:
            tuple: hidden states handed on `(batch, k, hidden)`; their slots (int64 `(batch, k)`), `None` if all were
            handed on; which of these are alive (bool `(batch, k)`), `None` if all; and the attention map or `None`.
        """
        slots, handed_on, residual = None, alive, hidden_states
        by_score, by_attention = keep is not None and self.scorer is not None, keep is not None and self.scorer is None
        attention, needs_map = self.attention.self, with_map or by_attention
        beside = (self.scorer.dense,) if by_score else ()
        passed_by = (attention, self.scorer) if by_score else (attention,)
        if fusible(attention.query, attention.key, attention.value, *beside) and all(map(is_plain, passed_by)):
            # Queries of tokens that are dropped cost less than a product of their own for the others.
            query, key, value, *projected = attention.project_int8(hidden_states, alive, *beside)
            if by_score:
                scores = self.scorer.score(projected[0].to(hidden_states.dtype), alive)
                slots, handed_on = select_slots(scores, alive, keep)
                query, residual = take_slots(query, slots), take_slots(hidden_states, slots)
            context, attention_map = attention.attend(query, key, value, alive, needs_map)
        else:
            if by_score:
                scores = self.scorer(hidden_states, alive)
                slots, handed_on = select_slots(scores, alive, keep, self.training)
                residual = take_slots(hidden_states, slots)
            context, attention_map = attention(residual, hidden_states, handed_on, alive, needs_map)
        if by_attention:
            slots, handed_on = select_slots(received_attention(attention_map, alive), alive, keep, self.training)
            context, residual = take_slots(context, slots), take_slots(hidden_states, slots)
        layer_output = over_tokens(self.feed_forward, None if self.training else handed_on, context, residual)
        return layer_output, slots, handed_on, attention_map if with_map else None

    def feed_forward(self, context, residual):
        """What comes after attention, token by token."""
        attention_output = self.attention.output(context, residual)
        inner, following = self.intermediate, self.output.dense
        if inner.is_gelu and fusible(inner.dense, following) and is_plain(inner):
            kernel = inner.dense.kernel()
            activated = kernel.gelu_for(kernel.quantize(attention_output), following.kernel())
        else:
            activated = inner(attention_output)
        return self.output(activated, attention_output)


def received_attention(probabilities, alive):
    """Attention that each slot receives, summed over heads and over the queries that hold a token.

    Args:
        probabilities (`(batch, heads, slots, slots)`), alive (bool `(batch, slots)` or `None`).

    Returns:
        float32 `(batch, slots)`: significance of LAT, arXiv:2010.07003, section 3.1.
    """
    over_heads = probabilities.sum(1, dtype=torch.float32)
    if alive is not None:
        over_heads = over_heads * alive[..., None]
    return over_heads.sum(1)


def select_slots(significance, alive, keep, training=False):
    """The `keep` most significant slots of each row, its first token among them; ties go to the earlier slot.

    Args:
        significance (`(batch, slots)`), alive (bool `(batch, slots)` or `None`), keep (list of `int`, one a row),
        training (`bool`): add dead slots up to a multiple of 32.

    Returns:
        slots (int64 `(batch, width)`, ascending; width is `max(keep)`, in training rounded up) and, where some slots
        are dead, which are alive (bool, same shape), else `None`.
    """
    slots = significance.shape[1]
    if alive is None:
        significance = F.pad(significance[:, 1:], (1, 0), value=math.inf)
    else:
        first = alive.byte().argmax(1, keepdim=True)
        significance = significance.masked_fill(~alive, -math.inf).scatter(1, first, math.inf)
    width = max(1, *keep)  # a batch of nothing but padding still needs a slot to run on
    if training:
        # oneDNN builds a kernel for each new width, and its bf16 products are twice as fast on multiples of 32.
        width = min(slots, width + -width % 32)
    ranked = significance.argsort(dim=-1, descending=True, stable=True)[:, :width]
    if min(keep) == width:
        return ranked.sort(-1).values, None
    kept = torch.arange(width, device=ranked.device) < torch.tensor(keep, device=ranked.device)[:, None]
    # Dead slots sort last, then point at any slot that exists.
    return ranked.masked_fill(~kept, slots).sort(-1).values.clamp(max=slots - 1), kept


def take_slots(states, slots):
    """`states` (batch, slots, hidden) at `slots` (int64 (batch, k)): (batch, k, hidden)."""
    batch, width = states.shape[:2]
    if batch > 1:
        slots = slots + torch.arange(0, batch * width, width, device=slots.device)[:, None]
    return F.embedding(slots, states.reshape(batch * width, -1))  # copies whole rows, as gather does not


class QuaLAMiniLMEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList([QuaLAMiniLMLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states, real, lengths, head, with_maps, output_hidden_states, output_kept_tokens):
        batch, length = hidden_states.shape[:2]
        # A head of few columns makes restoring cheap, but does not tell the hidden states themselves.
        read = unchanged if output_hidden_states else head
        if real is not None:
            real = real.to(hidden_states.device)
        counts = [length] * batch if real is None else real.sum(-1).tolist()
        n, alive = counts, real
        # Position of each slot's token; `None` as long as slot i holds token i. Dead slots stand at `length`.
        positions = None
        left = LeftBehind(batch, length, hidden_states.device)
        all_hidden_states, attentions, kept_tokens = (hidden_states,), (), ()
        for i, layer in enumerate(self.layer):
            keep = [lengths.kept(i, row) for row in n]
            drops = keep != counts
            if drops and positions is None and real is not None and bool((real[:, 1:] > real[:, :-1]).any()):
                # Neighbours are those that are real: padding between them would keep them apart.
                left.add(read(hidden_states))
                hidden_states, positions, alive = pack(hidden_states, real)
                left.went_on(positions)
            entering = hidden_states
            hidden_states, slots, handed_on, attention_map = layer(entering, alive, keep if drops else None, with_maps)
            if drops:
                # What is dropped here is restored with this layer's input.
                left.add(read(entering))
                positions = slots if positions is None else positions.to(slots.device).gather(1, slots)
                if handed_on is not None:
                    positions = positions.masked_fill(~handed_on, length)
                left.went_on(positions)
                counts, alive = keep, handed_on
            if output_hidden_states:
                all_hidden_states += (left.restore(hidden_states),)
            if with_maps:
                attentions += (attention_map,)
            if output_kept_tokens:
                kept_tokens += (kept_positions(positions, alive, hidden_states, counts, length),)
        return QuaLAMiniLMModelOutput(
            last_hidden_state=head(all_hidden_states[-1])
            if output_hidden_states
            else left.restore(read(hidden_states)),
            hidden_states=all_hidden_states if output_hidden_states else None,
            attentions=attentions if with_maps else None,
            kept_tokens=kept_tokens if output_kept_tokens else None,
        )


def unchanged(states):
    return states


class LeftBehind:
    """What was read of tokens where they were dropped, and where each token's last reading stands among the others.

    Where layers lie on several devices it comes along: on one device `to` costs nothing.
    """

    def __init__(self, batch, length, device):
        self.states, self.width = [], 0
        # A column more, for dead slots; they stand at position `length`.
        self.index = torch.arange(length + 1, device=device).expand(batch, -1)

    def add(self, states):
        """`states` (batch, slots, columns), in which some tokens stay behind."""
        self.states.append(states)
        self.width += states.shape[1]

    def went_on(self, positions):
        """The others stand at `positions` (int64 (batch, k)) and are in the slots that come after those added."""
        slots = torch.arange(self.width, self.width + positions.shape[1], device=positions.device)
        self.index = self.index.to(positions.device).scatter(1, positions, slots.expand_as(positions))

    def restore(self, states):
        """All tokens, (batch, length, columns), those in the last slots with `states` (batch, k, columns)."""
        if not self.states:
            return states
        device = states.device
        return take_slots(
            torch.cat([each.to(device) for each in (*self.states, states)], 1), self.index[:, :-1].to(device)
        )


def join(parts):
    """[`QuaLAMiniLMModelOutput`] of parts of a batch as one, kept tokens padded with -1; of one part any output."""
    if len(parts) == 1:
        return parts[0]
    kept_tokens = None
    if parts[0].kept_tokens is not None:
        kept_tokens = tuple(map(stack_kept, zip(*(part.kept_tokens for part in parts))))
    last_hidden_state = torch.cat([part.last_hidden_state for part in parts])
    return QuaLAMiniLMModelOutput(last_hidden_state=last_hidden_state, kept_tokens=kept_tokens)


def stack_kept(parts):
    """Kept tokens of several parts of a batch, (rows, k) each, as one tensor, padded with -1."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1]), value=-1) for part in parts])


def pack(hidden_states, real):
    """The real tokens of `hidden_states` (batch, sequence, hidden) in slots, their positions (`sequence` where a slot
    is dead) and which slots are alive, both (batch, sequence)."""
    positions = real.logical_not().byte().argsort(dim=1, stable=True)
    alive = real.gather(1, positions)
    return take_slots(hidden_states, positions), positions.masked_fill(~alive, real.shape[1]), alive


def kept_positions(positions, alive, hidden_states, counts, length):
    """Positions of the tokens that stand in the slots, ascending, padded with -1: int64 (batch, max(counts))."""
    if positions is None:
        positions = torch.arange(length, device=hidden_states.device).expand(hidden_states.shape[0], -1)
    if alive is None:
        return positions
    ascending = positions.masked_fill(~alive.to(positions.device), length).sort(-1).values[:, : max(counts)]
    return ascending.masked_fill(ascending == length, -1)


class QuaLAMiniLMPreTrainedModel(PreTrainedModel):
    config_class = QuaLAMiniLMConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    engine = None  # a `GraphEngine`: what answers calls for logits alone where torch does not
    _no_split_modules = ["QuaLAMiniLMEmbeddings", "QuaLAMiniLMLayer"]

    def _init_weights(self, module):
        if isinstance(module, nn.Conv1d):
            # The mean of the neighbourhood: a kernel of small random numbers would find it slowly.
            nn.init.constant_(module.weight, 1 / module.kernel_size[0])
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in [`PreTrainedModel`].

        Raises:
            ValueError: a file of weights that cannot be read, or is not the one that `weights_sha256` in `config.json`
                states.
        """
        where = {name: kwargs[name] for name in ("cache_dir", "revision", "subfolder") if kwargs.get(name)}
        # After the load, when the files have come from wherever they are; and what is wrong with one says more than its
        # effects.
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except Exception as error:
            check_weights(pretrained_model_name_or_path, **where)
            if isinstance(error, SafetensorError):
                message = f"the weights of {pretrained_model_name_or_path} cannot be read: {error}"
                raise ValueError(message) from error
            raise
        check_weights(pretrained_model_name_or_path, **where)
        return loaded

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        """As in [`PreTrainedModel`]; also writes what belongs beside the weights.

        Raises:
            FileNotFoundError: see [`QuaLAMiniLMConfig.code`].
        """
        self.config.code()
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            self._complete(save_directory)

    def _complete(self, folder):
        """Writes what belongs beside the weights in `folder`: their checksums, and the graph that was made of them."""
        self.config.write_checksums(folder)
        if self.engine is not None:
            self.engine.save(folder)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """As in transformers, whose `save_pretrained` asks for it before ours has completed the folder."""
        self._complete(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def dequantize(self, dtype=None):
        """Puts float weights in the place of int8 ones: to train, to save, or to run on a GPU.

        Args:
            dtype (`torch.dtype`): of all weights; float32 by default.

        Returns:
            this model.

        Raises:
            ValueError: its weights are floats already, as in transformers.
        """
        if not self.config.int8_storage:
            raise ValueError("the weights are floats: you need to first quantize your model in order to dequantize it")
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, (QuantizedEmbedding, QuantizedLinear)):
                    setattr(parent, name, child.dequantize())
        self.config.int8_storage = None
        return self.to(dtype or torch.float32)

    def train(self, mode=True):
        """As in [`torch.nn.Module`].

        Raises:
            ValueError: `mode` with int8 weights, which cannot learn.
        """
        if mode and self.config.int8_storage:
            raise ValueError("int8 weights cannot be trained: call dequantize() first")
        return super().train(mode)

    def num_parameters(self, only_trainable=False, exclude_embeddings=False):
        """As in [`PreTrainedModel`]: int8 weights count as the floats that they stand for, of which none learns."""
        count = super().num_parameters(only_trainable, exclude_embeddings)
        if not self.config.int8_storage:
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
        if self.config.int8_storage:
            raise ValueError("int8 embeddings cannot be resized: call dequantize() first")
        return super().resize_token_embeddings(*args, **kwargs)

    @property
    def length_presets(self):
        """Names of the presets that `length_config` accepts, a `list` of `str`."""
        return list(self.config.length_presets)


class QuaLAMiniLMModel(QuaLAMiniLMPreTrainedModel):
    """The encoder, without a head.

    Raises:
        ValueError: the configuration's `length_config` is not legal, or its `hidden_act` is unknown.
    """

    def __init__(self, config):
        super().__init__(config)
        config.token_lengths()
        require("hidden_act", config.hidden_act, config.hidden_act in ACT2FN, f"one of {', '.join(ACT2FN)}")
        self.embeddings = QuaLAMiniLMEmbeddings(config)
        self.encoder = QuaLAMiniLMEncoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.LongTensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        length_config=None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        output_kept_tokens: bool = False,
        head=unchanged,
    ):
        """
        Args:
            input_ids (int64 `(batch, sequence)`) or inputs_embeds (`(batch, sequence, hidden)`): exactly one of them.
            attention_mask (`(batch, sequence)`): a token is real where it is not 0; without one all are.
            token_type_ids, position_ids (int64 `(batch, sequence)`): as in BERT.
            length_config: see [`QuaLAMiniLMConfig.token_lengths`]; the configuration's own by default.
            output_attentions, output_hidden_states, output_kept_tokens, return_dict (`bool`): what to return.
            head (a callable): `(..., hidden)` to `(..., columns)`, token by token; what it makes of the last hidden
                state is returned in that state's place.

        Returns:
            [`QuaLAMiniLMModelOutput`], or a tuple of what is not `None` in it.

        Raises:
            ValueError: an illegal `length_config`, an `attention_mask` of another shape, an input longer than the
                positions, or both or neither of `input_ids` and `inputs_embeds`.
        """
        lengths = self.config.token_lengths(length_config)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        batch, length = tokens.shape[:2]
        real = real_tokens(attention_mask, (batch, length))
        # "eager" asks for maps computed step by step, as in transformers: on CPU the faster way to train.
        with_maps = output_attentions or self.config._attn_implementation == "eager"
        whole = tokens.device.type != "cpu" or torch.is_grad_enabled() or with_maps or output_hidden_states
        rows = max(1, batch if whole else CACHED_TOKENS // max(1, length))
        inputs = (
            # One row may stand for all.
            each if each is None else each.expand(batch, length, *each.shape[2:])
            for each in (real, input_ids, token_type_ids, position_ids, inputs_embeds)
        )
        parts = split_rows(rows, *inputs)
        # Inductor wants packed int8 weights to be constants of its graph, which they are not.
        encode = self.encode_uncompiled if self.config.int8_storage and torch.compiler.is_compiling() else self.encode
        outputs = encode(parts, lengths, head, with_maps, output_hidden_states, output_kept_tokens)
        return outputs if output_attentions else replace(outputs, attentions=None)

    def encode(self, parts, *options):
        """`forward` of a batch in `parts`: which tokens are real, and what the embeddings take."""
        outputs = []
        for real, *inputs in parts:
            if len(parts) > 1 and real is not None and real.all():
                real = None
            outputs.append(self.encoder(self.embeddings(*inputs), real, *options))
        return join(outputs)

    @torch.compiler.disable
    def encode_uncompiled(self, *inputs):
        return self.encode(*inputs)


def real_tokens(attention_mask, shape):
    """Where `attention_mask` is not 0, as bool (batch, sequence); `None` if everywhere."""
    if attention_mask is None:
        return None
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(shape)}")
    real = attention_mask != 0
    return None if real.all() else real


class QuaLAMiniLMForQuestionAnswering(QuaLAMiniLMPreTrainedModel):
    """The encoder with a span head, which sees every token, dropped ones as they were restored."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, engine="auto", **kwargs):
        """As in [`PreTrainedModel`].

        Args:
            engine (`str`): what runs int8 weights on a CPU. `"auto"`, ONNX Runtime where it is installed and the graph
                made of these weights stands beside them, in a call for logits alone, without gradients, hooks and
                changes to the loaded model; torch otherwise. `"torch"`. `"onnxruntime"`, as `"auto"`, but that it must
                be possible.

        Raises:
            ValueError: see above, or `engine` is none of these, or is `"onnxruntime"` and there is no such graph.
        """
        require("engine", engine, engine in ENGINES, f"one of {ENGINES}")
        names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        where = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.engine = find_engine(engine, model, pretrained_model_name_or_path, **where)
        return loaded

    def __init__(self, config):
        super().__init__(config)
        self.bert = QuaLAMiniLMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.LongTensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        start_positions: Optional[torch.LongTensor] = None,
        end_positions: Optional[torch.LongTensor] = None,
        length_config=None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        output_kept_tokens: bool = False,
    ):
        """
        Args:
            start_positions, end_positions (int64 `(batch,)`): tokens the answer starts and ends at; positions on
                padding or beyond the sequence are ignored.

        The other arguments, what is raised and what is returned: see [`QuaLAMiniLMModel.forward`] and
        [`QuaLAMiniLMQuestionAnsweringOutput`].
        """
        if self.engine is not None and not torch.compiler.is_compiling():
            others = position_ids, inputs_embeds, start_positions, end_positions
            others += output_attentions, output_hidden_states, output_kept_tokens
            logits = self.engine(self, input_ids, attention_mask, token_type_ids, length_config, others)
            if logits is not None:
                return QuaLAMiniLMQuestionAnsweringOutput(start_logits=logits[0], end_logits=logits[1])
        outputs = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            length_config,
            output_attentions,
            output_hidden_states,
            output_kept_tokens,
            return_dict=True,
            # Not the module itself, which accelerate's hooks would move along with the other arguments.
            head=lambda states: self.qa_outputs(states),
        )
        logits = outputs.last_hidden_state
        real = real_tokens(attention_mask, logits.shape[:2])
        if real is not None:
            real = real.to(logits.device)
            logits = logits.masked_fill(~real[..., None], torch.finfo(logits.dtype).min)
        start_logits, end_logits = (each.contiguous() for each in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (span_loss(start_logits, start_positions, real) + span_loss(end_logits, end_positions, real)) / 2
        return QuaLAMiniLMQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            kept_tokens=outputs.kept_tokens,
        )


def span_loss(logits, positions, real):
    """Mean cross-entropy of `logits` (batch, sequence) at `positions` (batch,), those that stand on a real token."""
    length = logits.shape[1]
    positions = positions.to(logits.device).view(-1).clamp(0, length)
    if real is not None:
        on_real = F.pad(real, (0, 1)).gather(1, positions[:, None]).squeeze(1)
        positions = positions.masked_fill(~on_real, length)
    return F.cross_entropy(logits, positions, ignore_index=length)
