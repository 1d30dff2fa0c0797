"""BERT and RoBERTa encoders for extractive question answering that drop tokens as they rise through the layers.

QuaLA-MiniLM, Guskin et al., arXiv:2210.17114. Module and weight names are those of transformers'
`BertForQuestionAnswering`; how tokens are dropped and restored, and what slots and stages are, stands in
dropping_qualaminilm.py, the layers over int8 weights in quantization_qualaminilm.py.
"""

from dataclasses import dataclass
from functools import partial
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

from .configuration_qualaminilm import QuaLAMiniLMConfig, require
from .dropping_qualaminilm import (
    DroppingLayer,
    QuaLAMiniLMScorer,
    Stage,
    attend,
    has_gaps,
    kept_positions,
    on_tokens,
    pack,
    real_tokens,
    restore,
)
from .engine_qualaminilm import ENGINES, find_engine
from .files_qualaminilm import check_weights
from .graph_qualaminilm import Graph  # noqa: F401  transformers 4.57 copies a local file's own imports alone
from .kernels_qualaminilm import make_kernel  # noqa: F401  as above
from .quantization_qualaminilm import Int8Layer, Int8Model, QuantizedEmbedding


@dataclass
class QuaLAMiniLMModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, sequence, hidden)`): every token, restored.
        readout (`torch.FloatTensor` of shape `(batch, sequence, columns)`, in its place): what `read` makes of it.
        hidden_states (tuple, on request): the embeddings and each layer's output, restored to
            `(batch, sequence, hidden)`.
        attentions (tuple, on request): one `(batch, heads, queries, keys)` a layer. Keys are the slots that enter the
            layer; queries too, or with `"learned"` significance the slots that leave it.
        kept_tokens (tuple, on request): one `torch.LongTensor` of shape `(batch, k)` a layer, the positions of the
            tokens handed on, ascending, padded with -1.
    """

    last_hidden_state: Optional[torch.FloatTensor] = None
    readout: Optional[torch.FloatTensor] = None
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


class QuaLAMiniLMEmbeddings(nn.Module):
    """BERT's or RoBERTa's: words, positions and token types, added up, `(batch, sequence, hidden)`."""

    def __init__(self, config):
        super().__init__()
        self.roberta = config.embedding_type == "roberta"
        self.padding_idx = config.pad_token_id
        self.first_position = config.first_position
        kind, size = QuantizedEmbedding if config.int8_weights else nn.Embedding, config.hidden_size
        self.word_embeddings = kind(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = kind(config.max_position_embeddings, size)
        self.token_type_embeddings = kind(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
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
        # One row may stand for all, and is looked up once; any other number is refused.
        others = self.token_type_embeddings(token_type_ids), self.position_embeddings(position_ids)
        types, positions = (each.expand_as(inputs_embeds) for each in others)
        embeddings = inputs_embeds + types + positions
        # Int8 rows make float32 of any model's dtype, and a caller's embeddings are of the caller's.
        return self.dropout(self.LayerNorm(embeddings.to(self.LayerNorm.weight.dtype)))

    def _position_ids(self, input_ids, shape, device):
        """int64 (batch, sequence); (1, sequence) where all rows have the same."""
        first = self.first_position
        longest = self.position_embeddings.num_embeddings - first
        if shape[1] > longest:
            raise ValueError(f"the input is {shape[1]} tokens long, the model has positions for {longest}")
        if self.roberta and input_ids is not None:
            real = input_ids.ne(self.padding_idx).long()
            return real.cumsum(1) * real + self.padding_idx
        return torch.arange(first, first + shape[1], device=device)[None]


class QuaLAMiniLMSelfAttention(nn.Module):
    """BERT's, of the tokens that are handed on over all that enter."""

    def __init__(self, config):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden_states, alive, queries, asking, with_map):
        """See [`DroppingLayer`]."""
        # In training on dead slots too: oneDNN builds kernels for each new number of tokens.
        held, asking = (None, None) if self.training else (alive, asking)
        query = on_tokens(self.query, asking, queries)
        key, value = on_tokens(lambda states: (self.key(states), self.value(states)), held, hidden_states)
        fused = partial(F.scaled_dot_product_attention, dropout_p=self.dropout.p if self.training else 0.0)
        map_dropout = self.dropout if with_map else None
        return attend(query, key, value, alive, self.num_attention_heads, fused, map_dropout)


class QuaLAMiniLMResidual(nn.Module):
    """Projection, dropout, residual connection and LayerNorm: BERT's `BertSelfOutput` and `BertOutput`."""

    def __init__(self, config, in_features):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class QuaLAMiniLMAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self = QuaLAMiniLMSelfAttention(config)
        self.output = QuaLAMiniLMResidual(config, config.hidden_size)


class QuaLAMiniLMIntermediate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states))


class QuaLAMiniLMLayer(DroppingLayer, GradientCheckpointingLayer):
    """BERT's, which hands on some of its tokens: see [`DroppingLayer`]."""

    def __init__(self, config):
        super().__init__()
        self.attention = QuaLAMiniLMAttention(config)
        self.intermediate = QuaLAMiniLMIntermediate(config)
        self.output = QuaLAMiniLMResidual(config, config.intermediate_size)
        self.scorer = QuaLAMiniLMScorer(config) if config.significance == "learned" else None

    def inputs_of(self, hidden_states):
        return hidden_states

    def feed_forward(self, context, residual):
        attention_output = self.attention.output(context, residual)
        return self.output(self.intermediate(attention_output), attention_output)


class QuaLAMiniLMEncoder(nn.Module):
    """The layers, one after another, and what each has left behind."""

    def __init__(self, config):
        super().__init__()
        kind = Int8Layer if config.int8_weights else QuaLAMiniLMLayer
        self.layer = nn.ModuleList([kind(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states, real, lengths, with_maps, output_hidden_states, output_kept_tokens):
        """
        Args:
            hidden_states (`(batch, sequence, hidden)`): the embeddings.
            real (bool `(batch, sequence)`): which tokens are real; `None`: all.
            lengths ([`TokenLengths`]): how many tokens each layer hands on.

        Returns:
            tuple: the stages, to be restored; hidden_states, attentions and kept_tokens of [`QuaLAMiniLMModelOutput`].
        """
        batch, length = hidden_states.shape[:2]
        if real is not None:
            real = real.to(hidden_states.device)
        n = counts = [length] * batch if real is None else real.sum(-1).tolist()
        stages, alive = [Stage(hidden_states, None)], real
        all_hidden_states, attentions, kept_tokens = (hidden_states,), (), ()
        for i, layer in enumerate(self.layer):
            keep = [lengths.kept(i, row) for row in n]
            drops = keep != counts
            if drops and stages[-1].positions is None and real is not None and has_gaps(real):
                packed, alive = pack(hidden_states, real)
                stages.append(packed)
            entering, positions = stages[-1]
            hidden_states, slots, alive, attention_map = layer(entering, alive, keep if drops else None, with_maps)
            if drops:
                positions = slots if positions is None else positions.to(slots.device).gather(1, slots)
                if alive is not None:
                    positions = positions.masked_fill(~alive, length)
                counts = keep
            else:
                stages.pop()  # nobody stays behind with these states
            stages.append(Stage(hidden_states, positions))
            if output_hidden_states:
                all_hidden_states += (restore(stages, length),)
            if with_maps:
                attentions += (attention_map,)
            if output_kept_tokens:
                kept_tokens += (kept_positions(stages[-1], alive, max(counts, default=0), length),)
        return (
            stages,
            all_hidden_states if output_hidden_states else None,
            attentions if with_maps else None,
            kept_tokens if output_kept_tokens else None,
        )


class QuaLAMiniLMPreTrainedModel(Int8Model, PreTrainedModel):
    """What the encoder has in common with the model that has a head: checked loads, and saving of all that belongs."""

    config_class = QuaLAMiniLMConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    engine = None  # a `GraphEngine`: what answers calls for logits alone where torch does not
    _no_split_modules = ["QuaLAMiniLMEmbeddings", "QuaLAMiniLMLayer", "Int8Layer"]

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
        read=None,
    ):
        """
        Args:
            input_ids (int64 `(batch, sequence)`) or inputs_embeds (`(batch, sequence, hidden)`): exactly one of them.
            attention_mask (`(batch, sequence)`): a token is real where it is not 0; without one all are.
            token_type_ids, position_ids (int64 `(batch, sequence)`): as in BERT.
            length_config: see [`QuaLAMiniLMConfig.token_lengths`]; the configuration's own by default.
            output_attentions, output_hidden_states, output_kept_tokens, return_dict (`bool`): what to return.
            read (a callable): `(..., hidden)` to `(..., columns)`, by token: of few columns less is to be restored.

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
        # Inductor wants packed int8 weights to be constants of its graph, which they are not.
        is_uncompiled = self.config.int8_weights and torch.compiler.is_compiling()
        encode = self._encode_uncompiled if is_uncompiled else self._encode
        inputs = input_ids, token_type_ids, position_ids, inputs_embeds
        options = real, lengths, with_maps, output_hidden_states, output_kept_tokens
        stages, hidden_states, attentions, kept_tokens = encode(inputs, options)
        restored = restore(stages, length, read)
        return QuaLAMiniLMModelOutput(
            last_hidden_state=restored if read is None else None,
            readout=None if read is None else restored,
            hidden_states=hidden_states,
            attentions=attentions if output_attentions else None,
            kept_tokens=kept_tokens,
        )

    def _encode(self, inputs, options):
        """The encoder's stages, and what else it returns, of the embeddings' `inputs`."""
        return self.encoder(self.embeddings(*inputs), *options)

    @torch.compiler.disable
    def _encode_uncompiled(self, *args):
        return self._encode(*args)


class QuaLAMiniLMForQuestionAnswering(QuaLAMiniLMPreTrainedModel):
    """The encoder with a span head, which sees every token, dropped ones as they were restored."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, engine="auto", **kwargs):
        """As in [`PreTrainedModel`].

        Args:
            engine (`str`): what runs int8 weights on a CPU. `"auto"`, ONNX Runtime where it is installed and the graph
                made of these weights stands beside them, in a call for logits alone, without gradients, hooks and
                changes to the loaded model; torch otherwise, and in batches where the processor multiplies bfloat16.
                `"torch"`. `"onnxruntime"`, as `"auto"`, in batches too, and it must be possible.

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
        asked = output_attentions, output_hidden_states, output_kept_tokens
        if self.engine is not None and not torch.compiler.is_compiling():
            others = position_ids, inputs_embeds, start_positions, end_positions, *asked
            logits = self.engine(self, input_ids, attention_mask, token_type_ids, length_config, others)
            if logits is not None:
                return QuaLAMiniLMQuestionAnsweringOutput(start_logits=logits[0], end_logits=logits[1])
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, length_config
        # Not the module itself, which accelerate's hooks would move along with the other arguments.
        outputs = self.bert(*inputs, *asked, lambda states: self.qa_outputs(states), return_dict=True)
        logits = outputs.readout
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
