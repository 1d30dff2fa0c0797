"""Which tokens a layer hands on, and how those come back that it did not: the idea of QuaLA-MiniLM, by itself.

Drop and restore is the Length-Adaptive Transformer's (Kim and Cho, arXiv:2010.07003), for extractive question answering
QuaLA-MiniLM's (Guskin et al., arXiv:2210.17114). A layer chooses its most significant tokens and computes them alone;
what it drops keeps the state that it entered with, and in the end every token is read where it last stood.

Inside the encoder the tokens that are on their way stand in *slots*, rows with fewer of them ending in dead slots:

    states     (batch, slots, hidden)      each row's tokens, in ascending order of position
    alive      bool (batch, slots)         which slots hold a token; `None`: all
    positions  int64 (batch, slots)        where each stood in the input, a dead one at the input's length; `None`: slot
                                           i holds token i
    keep       list of int, one a row      how many tokens to hand on; `None`: all
"""

import math
from typing import NamedTuple, Optional

import torch
from torch import nn
from torch.nn import functional as F


class DroppingLayer(nn.Module):
    """A transformer layer that hands on the most significant of its tokens.

    A kind of it has

    - `scorer`: a [`QuaLAMiniLMScorer`], or `None` where the attention that a token receives makes it significant;
    - `inputs_of(states)`: what attention and the scorer take of hidden states;
    - `attention.self(inputs, alive, queries, asking, with_map)`: attention of the inputs of `queries`, those that
      are `asking`, over `inputs`, those that are `alive`: (batch, queries, hidden); and the map (batch, heads, queries,
      slots), `None` unless `with_map`;
    - `feed_forward(context, residual)`: all that comes after attention, token by token.
    """

    def forward(self, hidden_states, alive, keep, with_map):
        """
        Args:
            hidden_states, alive, keep: see above.
            with_map (`bool`): return the attention map though significance does not need it.

        Returns:
            tuple: the states handed on `(batch, k, hidden)`; the slots that they were taken from (int64 `(batch, k)`),
            `None` if all were handed on; which are alive (bool `(batch, k)` or `None`); the map or `None`.
        """
        by_score, by_attention = keep is not None and self.scorer is not None, keep is not None and self.scorer is None
        inputs, slots, handed_on = self.inputs_of(hidden_states), None, alive
        queries, residual = inputs, hidden_states
        if by_score:
            # Before attention: dropped tokens serve as keys and values once more, and ask no more.
            slots, handed_on = choose(self.scorer(inputs, alive), alive, keep, self.training)
            residual = take(hidden_states, slots)
            queries = self.inputs_of(residual)
        context, attention_map = self.attention.self(inputs, alive, queries, handed_on, with_map or by_attention)
        if by_attention:
            slots, handed_on = choose(received_attention(attention_map, alive), alive, keep, self.training)
            context, residual = take(context, slots), take(hidden_states, slots)
        # In training dead slots too: oneDNN builds kernels for each new number of tokens.
        computed = None if self.training else handed_on
        output = on_tokens(self.feed_forward, computed, context, residual)
        return output, slots, handed_on, attention_map if with_map else None


class QuaLAMiniLMScorer(nn.Module):
    """Learned significance of each token, from what enters a layer.

    A token matters by what it is, by how well it matches the question, and by both in its neighbourhood: of the answer
    the lower layers know no more than that it stands near words that the question uses. A match is the greatest cosine
    to any token, each weighed by a gate that learns to open for the question's (ColBERT's late interaction, Khattab
    and Zaharia, arXiv:2004.12832); there are `HEADS` of them. About a fiftieth of the layer's own work.

    Args:
        config ([`QuaLAMiniLMConfig`]).
        linear (a class): of the layer that projects the states.
    """

    HEADS, HEAD_SIZE = 4, 8
    REACH = 16  # tokens to either side that make a neighbourhood

    def __init__(self, config, linear=nn.Linear):
        super().__init__()
        features = max(1, config.hidden_size // 12)
        self.sizes = features, self.HEADS * self.HEAD_SIZE, self.HEADS
        self.dense = linear(config.hidden_size, sum(self.sizes))
        self.act_fn = nn.GELU()
        channels = features + self.HEADS
        self.neighbourhood = Neighbourhood(channels, channels, 2 * self.REACH + 1, padding=self.REACH, groups=channels)
        self.out_proj = nn.Linear(2 * channels, 1, bias=False)  # a bias would rank nothing

    def forward(self, states, alive):
        """Significance (batch, slots) of `states`; dead slots tell it nothing."""
        return self.score(self.dense(states), alive)

    def score(self, projected, alive):
        """Significance (batch, slots) of states as `dense` projects them, (batch, slots, sum of `sizes`)."""
        features, matched, gate = projected.split(self.sizes, -1)
        matched = matched.unflatten(-1, (self.HEADS, self.HEAD_SIZE)).transpose(1, 2)
        norm = torch.linalg.vector_norm(matched, dim=-1).clamp(min=1e-12)
        gate = gate.sigmoid()
        if alive is not None:
            gate = gate * alive[..., None]
        # Cosines, one norm divided out before the products and the other after: a number a token each.
        gated = matched * (gate.transpose(1, 2) / norm)[..., None]
        match = (self.greatest_match(matched, gated) / norm).transpose(1, 2)
        own = torch.cat((self.act_fn(features), match), -1)
        if alive is not None:
            own = own * alive[..., None]
        around = self.act_fn(self.neighbourhood(own))[:, : own.shape[1]]
        return self.out_proj(torch.cat((own, around), -1)).squeeze(-1)

    def greatest_match(self, matched, gated):
        """The greatest product of each slot's vector in `matched` with any in `gated`, both (batch, heads, slots,
        size): (batch, heads, slots)."""
        return (matched @ gated.transpose(-1, -2)).amax(-1)


class Neighbourhood(nn.Conv1d):
    """`nn.Conv1d` over the slots of (batch, slots, channels): to as many slots or more, as [`round_up`] asks."""

    def forward(self, states):
        return super().forward(add_tokens(states).transpose(1, 2)).transpose(1, 2)


def attend(query, key, value, alive, heads, fused, map_dropout=None):
    """Attention of `query` (batch, queries, hidden) over `key` and `value` (batch, slots, hidden), as projected, at the
    slots that are `alive`.

    Args:
        heads (`int`): how many, side by side in `hidden`.
        fused (a callable): `scaled_dot_product_attention` or its like, of query, key, value `(batch, heads, tokens,
            size)` and a mask `(batch, 1, 1, slots)` to add to the scores, or `None`.
        map_dropout (a callable): of the probabilities, which are computed one by one then, and returned.

    Returns:
        the context `(batch, queries, hidden)`, and with `map_dropout` the probabilities before it, `(batch, heads,
        queries, slots)`, else `None`.
    """
    query, key, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    mask, probabilities = None, None
    if alive is not None:
        # Not -inf, which makes a row of nothing but padding NaN.
        mask = query.new_zeros(alive.shape).masked_fill_(~alive, torch.finfo(query.dtype).min)[:, None, None]
    if map_dropout is None:
        context = fused(query, key, value, mask)
    else:
        # Autocast would carry the maps, the largest tensors of all, through float32.
        with torch.autocast(query.device.type, enabled=False):
            scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
            if mask is not None:
                scores = scores + mask
            probabilities = scores.softmax(-1)
            context = map_dropout(probabilities) @ value
    return context.transpose(1, 2).flatten(2), probabilities


def received_attention(probabilities, alive):
    """Attention that each slot receives, summed over heads and over the queries that hold a token: float32
    (batch, slots), the significance of LAT, arXiv:2010.07003, section 3.1.

    Args:
        probabilities (`(batch, heads, slots, slots)`): of each query over the keys.
    """
    over_heads = probabilities.sum(1, dtype=torch.float32)
    if alive is not None:
        over_heads = over_heads * alive[..., None]
    return over_heads.sum(1)


def choose(significance, alive, keep, training=False):
    """The `keep` most significant slots of each row, its first token among them; ties go to the earlier slot.

    Args:
        significance (`(batch, slots)`).
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
        width = min(slots, round_up(width, 32))  # which oneDNN's bfloat16 products are made for
    ranked = significance.argsort(dim=-1, descending=True, stable=True)[:, :width]
    if min(keep) == width:
        return ranked.sort(-1).values, None
    kept = torch.arange(width, device=ranked.device) < torch.tensor(keep, device=ranked.device)[:, None]
    # Dead slots sort last, then point at any slot that exists.
    return ranked.masked_fill(~kept, slots).sort(-1).values.clamp(max=slots - 1), kept


def take(states, slots):
    """`states` (batch, slots, columns) at `slots` (int64 (batch, k)): (batch, k, columns)."""
    batch, width = states.shape[:2]
    if batch > 1:
        slots = slots + torch.arange(0, batch * width, width, device=slots.device)[:, None]
    return F.embedding(slots, states.reshape(batch * width, -1))  # copies whole rows, as gather does not


def on_tokens(function, alive, *states):
    """`function` of the slots that hold a token, as if there were no others; elsewhere 0.

    Args:
        function: of `(tokens, size)`, once or more, to one or a tuple of `(tokens, other size)`.
        alive: see above; where it is `None` the states are not rearranged.
        states (`(batch, slots, size)`).
    """
    if alive is None:
        return function(*states)
    index = alive.flatten().nonzero().squeeze(1)

    def everywhere(result):
        zeros = result.new_zeros(alive.numel(), result.shape[-1])
        return zeros.index_copy(0, index, result).unflatten(0, alive.shape)

    results = function(*(each.flatten(0, 1)[index] for each in states))
    return tuple(map(everywhere, results)) if isinstance(results, tuple) else everywhere(results)


class Stage(NamedTuple):
    """States on their way, and their positions."""

    states: torch.Tensor
    positions: Optional[torch.Tensor]


def has_gaps(real):
    """Whether in any row padding comes before a real token."""
    return bool((real[:, 1:] > real[:, :-1]).any())


def pack(states, real):
    """The real tokens of `states` (batch, sequence, hidden) side by side, so that a token's neighbours are those that
    are real: a [`Stage`], and which of its slots are alive."""
    positions = real.logical_not().byte().argsort(dim=1, stable=True)
    alive = real.gather(1, positions)
    return Stage(take(states, positions), positions.masked_fill(~alive, real.shape[1])), alive


def restore(stages, length, read=None):
    """Every token of the input where it last stood: (batch, length, columns).

    Args:
        stages (list of [`Stage`]): the input's, and each that other tokens went on to.
        length (`int`): the input's.
        read (a callable): `(..., hidden)` to `(..., columns)`, token by token; by default the states themselves. Of
            few columns less is to be copied.
    """
    states = [stage.states if read is None else read(stage.states) for stage in stages]
    if len(states) == 1:
        return states[0]
    # Where layers lie on several devices the last one's is the place; on one device `to` costs nothing.
    device, offset = states[-1].device, 0
    # A column more, for dead slots.
    where = torch.arange(length + 1, device=device).expand(states[0].shape[0], -1)
    for stage in stages:
        slots = torch.arange(offset, offset + stage.states.shape[1], device=device)
        if stage.positions is not None:
            where = where.scatter(1, stage.positions.to(device), slots.expand(stage.positions.shape))
        offset += len(slots)
    return take(torch.cat([each.to(device) for each in states], 1), where[:, :-1])


def kept_positions(stage, alive, count, length):
    """Positions of a stage's tokens, at most `count` a row, ascending, padded with -1: int64 (batch, count)."""
    states, positions = stage
    if positions is None:
        positions = torch.arange(length, device=states.device).expand(states.shape[0], -1)
    if alive is None:
        return positions
    ascending = positions.masked_fill(~alive.to(positions.device), length).sort(-1).values[:, :count]
    return ascending.masked_fill(ascending == length, -1)


def real_tokens(attention_mask, shape):
    """Where `attention_mask` is not 0, as bool (batch, sequence) of this `shape`; `None` if everywhere.

    Raises:
        ValueError: the mask has another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(shape)}")
    real = attention_mask != 0
    return None if real.all() else real


def round_up(number, multiple=16):
    """The least multiple not below `number`: oneDNN builds a kernel for each number of tokens that it meets, which
    takes its time."""
    return number + -number % multiple


def add_tokens(states):
    """`states` (..., tokens, size) with zeros for more tokens, as [`round_up`] asks, contiguous."""
    missing = round_up(states.shape[-2]) - states.shape[-2]
    return F.pad(states, (0, 0, 0, missing)) if missing else states.contiguous()
