"""Sizes of a QuaLA-MiniLM, its presets, and what a legal `length_config` is."""

import copy
import json
import os
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

from transformers import PretrainedConfig
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

PRESETS_FILE = "length_configs.json"
CODE_FILES = tuple(f"{room}_qualaminilm.py" for room in ("configuration", "modeling", "quantization", "pipeline"))
AUTO_MAP = {
    "AutoConfig": "configuration_qualaminilm.QuaLAMiniLMConfig",
    "AutoModel": "modeling_qualaminilm.QuaLAMiniLMModel",
    "AutoModelForQuestionAnswering": "modeling_qualaminilm.QuaLAMiniLMForQuestionAnswering",
}
CUSTOM_PIPELINES = {
    "question-answering": {
        "impl": "pipeline_qualaminilm.QuestionAnsweringPipeline",
        "pt": ["AutoModelForQuestionAnswering"],
        "type": "text",
    }
}
ACCEPTED = (
    "a preset's name, one int >= 2 a layer, one float in (0, 1] a layer, or {'max_macs': share in (0, 1]}; "
    "entries are non-increasing"
)


@dataclass(frozen=True)
class TokenLengths:
    """How many tokens each layer hands on: a `length_config` read and checked.

    Attributes:
        entries (`tuple[int, ...]`): one a layer, tokens or thousandths of a row's real tokens.
        relative (`bool`): whether the entries are thousandths.
    """

    entries: tuple
    relative: bool

    def kept(self, layer, n):
        """Tokens that layer `layer` hands on of a row that entered the model with `n` real tokens (both `int`)."""
        entry = self.entries[layer]
        return min(n, max(2, (entry * n + 999) // 1000) if self.relative else entry)


class QuaLAMiniLMConfig(PretrainedConfig):
    """Configuration of [`QuaLAMiniLMModel`]: BERT's, and how tokens are dropped.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act,
        hidden_dropout_prob, attention_probs_dropout_prob, max_position_embeddings, type_vocab_size,
        initializer_range, layer_norm_eps, pad_token_id:
            as in [`BertConfig`]; the defaults are those of MiniLM-L6-H384-uncased.
        embedding_type (`str`): `"bert"` numbers positions from 0; `"roberta"` numbers real tokens from
            `pad_token_id + 1`, padding being at `pad_token_id`.
        significance (`str`): what decides which tokens a layer drops. `"attention"`, the attention they receive
            (Length-Adaptive Transformer, arXiv:2010.07003), or `"learned"`, a small scorer on the layer's input.
        length_config: how many tokens each layer hands on when a call does not say; see
            [`QuaLAMiniLMConfig.token_lengths`].
        length_presets (`dict`): name -> preset, as in the `presets` of `length_configs.json`. `"full"`, which drops
            nothing, is always among them. Kept in `length_configs.json`, never in `config.json`.
        int8_storage (`dict` of `str`): how int8 weights are stored, in words; `None`: the weights are floats.

    Raises:
        ValueError: a field that is none of the accepted values, naming it.
    """

    model_type = "qualaminilm"

    def __init__(
        self,
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        max_position_embeddings=512,
        type_vocab_size=2,
        initializer_range=0.02,
        layer_norm_eps=1e-12,
        pad_token_id=0,
        embedding_type="bert",
        significance="learned",
        length_config="full",
        length_presets=None,
        int8_storage=None,
        **kwargs,
    ):
        for name, value, accepted in (
            ("embedding_type", embedding_type, ("bert", "roberta")),
            ("significance", significance, ("attention", "learned")),
        ):
            if value not in accepted:
                raise ValueError(f"{name} is {value!r}, expected one of {accepted}")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_attention_heads})"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.embedding_type = embedding_type
        self.significance = significance
        self.length_config = length_config
        self.int8_storage = int8_storage
        full = [1.0] * num_hidden_layers
        self.length_presets = {"full": {"length_config": full}, **(length_presets or {})}
        if self.length_presets["full"]["length_config"] != full:
            raise ValueError(f"preset 'full' is {self.length_presets['full']['length_config']!r}, expected {full}")
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        self.auto_map = dict(AUTO_MAP)
        self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)

    @classmethod
    def from_transformers(cls, config, **kwargs):
        """The configuration that computes what a [`BertConfig`] or [`RobertaConfig`] does; `kwargs` go on top.

        Its significance is `"attention"`: such a checkpoint has no scorers.

        Raises:
            ValueError: another model type, or positions that are not absolute.
        """
        if config.model_type not in ("bert", "roberta"):
            raise ValueError(f"config.model_type is {config.model_type!r}, expected 'bert' or 'roberta'")
        positions = getattr(config, "position_embedding_type", None) or "absolute"
        if positions != "absolute":
            raise ValueError(f"config.position_embedding_type is {positions!r}, expected 'absolute'")
        names = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
            "hidden_dropout_prob attention_probs_dropout_prob max_position_embeddings type_vocab_size "
            "initializer_range layer_norm_eps pad_token_id"
        ).split()
        fields = {name: getattr(config, name) for name in names}
        return cls(**(fields | {"embedding_type": config.model_type, "significance": "attention"} | kwargs))

    @property
    def first_position(self):
        """The position embedding of a row's first token (`int`)."""
        return self.pad_token_id + 1 if self.embedding_type == "roberta" else 0

    def token_lengths(self, length_config=None):
        """Reads a `length_config`.

        Args:
            length_config: a preset's name; one int >= 2 a layer (layer i keeps min(n, c_i) of a row's n real tokens);
                one float in (0, 1] a layer, read to three decimals, p/1000 (layer i keeps
                min(n, max(2, (p*n + 999) // 1000))); `{"max_macs": s}`, the preset of the best validation F1 (of the
                most MACs, where not all were measured) among those whose MACs share is at most s;
                or `None`, this configuration's own. Entries are non-increasing.

        Returns:
            [`TokenLengths`]

        Raises:
            ValueError: anything else, naming the entry at fault and what would be accepted.
        """
        if length_config is None:
            length_config = "full" if self.length_config is None else self.length_config
        if isinstance(length_config, str):
            if length_config == "full":
                return TokenLengths((1000,) * self.num_hidden_layers, relative=True)
            if length_config not in self.length_presets:
                raise ValueError(
                    f"length_config is {length_config!r}, which is no preset; the presets are "
                    f"{', '.join(map(repr, self.length_presets))}. Accepted: {ACCEPTED}"
                )
            return self._read_entries(self.length_presets[length_config]["length_config"], f"preset {length_config!r}")
        if isinstance(length_config, dict):
            return self._within_max_macs(length_config)
        return self._read_entries(length_config, "length_config")

    def _read_entries(self, entries, name):
        if not isinstance(entries, (list, tuple)):
            raise ValueError(f"{name} is {entries!r}, a {type(entries).__name__}. Accepted: {ACCEPTED}")
        if len(entries) != self.num_hidden_layers:
            raise ValueError(
                f"{name} has {len(entries)} entries, the model has {self.num_hidden_layers} layers. "
                f"Accepted: {ACCEPTED}"
            )
        relative = not isinstance(entries[0], Integral)
        read = []
        for i, entry in enumerate(entries):
            if isinstance(entry, bool) or not isinstance(entry, Real):
                fault = f"a {type(entry).__name__}"
            elif isinstance(entry, Integral) == relative:
                fault = f"{'an int' if relative else 'a float'} among {'floats' if relative else 'ints'}"
            elif relative and not (0 < entry <= 1 and round(entry * 1000)):
                fault = "not in (0, 1] when read to three decimals"
            elif not relative and entry < 2:
                fault = "less than 2"
            else:
                read.append(round(entry * 1000) if relative else int(entry))
                if i == 0 or read[i] <= read[i - 1]:
                    continue
                fault = f"more than the entry before it, {entries[i - 1]!r}"
            raise ValueError(f"entry {i} of {name} is {entry!r}, {fault}. Accepted: {ACCEPTED}")
        return TokenLengths(tuple(read), relative)

    def _within_max_macs(self, wanted):
        share = wanted.get("max_macs")
        if list(wanted) != ["max_macs"] or isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(f"length_config is {wanted!r}. Accepted: {ACCEPTED}")
        shares = {name: self.macs_share(name) for name in self.length_presets}
        within = [name for name in shares if shares[name] <= share]
        if not within:
            cheapest = min(shares, key=shares.get)
            raise ValueError(
                f"length_config is {wanted!r}, but the cheapest preset, {cheapest!r}, has a MACs share of "
                f"{shares[cheapest]:.3f}"
            )

        f1 = {name: (self.length_presets[name].get("validation") or {}).get("f1") for name in within}
        best = max(within, key=shares.get if None in f1.values() else f1.get)
        return self.token_lengths(best)

    def macs(self, length_config=None, n=384):
        """Multiply-accumulates of the layers for one row of `n` real tokens, by formula (`int`).

        Embeddings, scorers and head are not counted. With `"attention"` significance a layer that n_in tokens enter and
        n_out leave costs 4 n_in d^2 + 2 n_in^2 d + 2 n_out d d_ff; with `"learned"`,
        2 n_in d^2 + 2 n_out d^2 + 2 n_in n_out d + 2 n_out d d_ff.
        """
        lengths = self.token_lengths(length_config)
        d, d_ff = self.hidden_size, self.intermediate_size
        total, n_in = 0, n
        for layer in range(self.num_hidden_layers):
            n_out = lengths.kept(layer, n)
            queries = n_in if self.significance == "attention" else n_out
            total += 2 * n_in * d * d + 2 * queries * d * d + 2 * n_in * queries * d + 2 * n_out * d * d_ff
            n_in = n_out
        return total

    def macs_share(self, length_config=None, n=384):
        """MACs of `length_config` as a share of `"full"`'s, for one row of `n` real tokens (`float`)."""
        return self.macs(length_config, n) / self.macs("full", n)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        where = {
            name: kwargs[name]
            for name in ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            if kwargs.get(name) is not None
        }
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if os.path.isfile(pretrained_model_name_or_path):
            beside = Path(pretrained_model_name_or_path).with_name(PRESETS_FILE)
            path = beside if beside.is_file() else None
        else:
            path = cached_file(
                pretrained_model_name_or_path, PRESETS_FILE, _raise_exceptions_for_missing_entries=False, **where
            )
        if path is not None:
            config_dict["length_presets"] = _read_presets(path, config_dict.get("num_hidden_layers"))
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if kwargs.get("length_config", ...) is None:
            del kwargs["length_config"]  # None inherits
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self):
        """As in [`PretrainedConfig`]; `dtype` is always float32, so that both transformers lines load alike."""
        fields = super().to_dict()
        fields.pop("length_presets", None)
        # transformers puts classes and other repositories' names into the last two when it loads a folder.
        return fields | {"dtype": "float32", "auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}

    def save_pretrained(self, save_directory, **kwargs):
        """As in [`PretrainedConfig`]; also writes `length_configs.json` and the model's code, so that the folder is
        a complete repository."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        self.save_presets(folder)
        for name in CODE_FILES:
            source = self._code_file(name)
            if source is not None and source.resolve() != (folder / name).resolve():
                write_beside_then_rename(folder / name, source.read_text(encoding="utf-8"))

    def save_presets(self, folder):
        """Writes `length_presets` into the folder, as `length_configs.json`."""
        content = {"num_hidden_layers": self.num_hidden_layers, "presets": self.length_presets}
        write_beside_then_rename(Path(folder) / PRESETS_FILE, json.dumps(content, indent=2) + "\n")

    def _code_file(self, name):
        """Path of a code file: beside this one, or, where transformers copied only what it ran, in the repository that
        this configuration was loaded from; `None` where neither has it."""
        beside = Path(__file__).with_name(name)
        if beside.is_file():
            return beside
        if not self._name_or_path:
            return None
        try:
            return Path(cached_file(self._name_or_path, name, revision=getattr(self, "_commit_hash", None)))
        except (OSError, ValueError) as error:
            logger.warning(f"{name} is not saved: it is not in {self._name_or_path!r} any more ({error})")
            return None


def _read_presets(path, num_hidden_layers):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    presets = content.get("presets") if isinstance(content, dict) else None
    if not isinstance(presets, dict):
        raise ValueError(f"{path} has no object 'presets'")
    if content.get("num_hidden_layers") != num_hidden_layers:
        raise ValueError(
            f"num_hidden_layers is {content.get('num_hidden_layers')!r} in {path}, {num_hidden_layers!r} in config.json"
        )
    for name, preset in presets.items():
        if not isinstance(preset, dict) or "length_config" not in preset:
            raise ValueError(f"preset {name!r} in {path} has no 'length_config'")
    return presets


def write_beside_then_rename(path, text):
    """Writes `text` to `path` so that at any moment it holds the old text or the new, whole."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
