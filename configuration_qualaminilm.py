"""Sizes of a QuaLA-MiniLM, its presets, and what a legal `length_config` is."""

import copy
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import reprlib
from collections import Counter
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import transformers
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME, TRANSFORMERS_DYNAMIC_MODULE_NAME, cached_file

OLDEST = {"torch": (2, 8), "transformers": (4, 57)}


def require_versions(**found):
    """Raises an [`ImportError`] that names every floor and what was `found`, package by package (`str`, or `None` where
    it is not installed), unless all of them are new enough."""
    found = {name: version for name, version in found.items() if version is not None}
    if any(tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST[name] for name, version in found.items()):
        floors = " and ".join(f"{name} {major}.{minor} or newer" for name, (major, minor) in OLDEST.items())
        here = " and ".join(f"{name} {version}" for name, version in found.items())
        raise ImportError(f"QuaLA-MiniLM needs {floors}; found {here}")


def installed(package):
    """Version of a package (`str`), which is not imported for it; `None` where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# Here, since transformers imports this file before any other; above stands only what old versions have too.
require_versions(torch=installed("torch"), transformers=transformers.__version__)

PRESETS_FILE = "length_configs.json"
WEIGHTS_PATTERN = "model*.safetensors"
GRAPH_FILE = "onnx/model_int8.onnx"
ROOMS = ("configuration", "modeling", "quantization", "spans", "reading", "pipeline")
CODE_FILES = tuple(f"{room}_qualaminilm.py" for room in ROOMS)
# Repository -> texts of its code by file name: see `keep_code`.
KEPT_CODE = {}
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
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
# What a damaged file may ask for at most; BERT-large has 24 layers and a third of a billion parameters.
MOST_LAYERS, MOST_PARAMETERS = 1000, 2**30
# What the weights mean nothing without.
ARCHITECTURE = (
    *SIZES,
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
    "embedding_type",
    "significance",
    "int8_storage",
)
DTYPES = ("float16", "bfloat16", "float32", "float64")
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
        no_answer_threshold (`float`): below this evidence, in log units, a text does not answer; `None`, 0: below that
            of its null.
        answerable_calibration (`list` of two `float`): slope and intercept of the logistic function that makes the
            best evidence how sure it is that a text answers; `None`, 1 and 0: the model's own probability, of one
            window.
        architecture_sha256, weights_sha256: of `config.json`; see [`QuaLAMiniLMConfig.write_checksums`]. The first is
            compared with the fields here, the second with the files when they are loaded. Neither is kept, so that
            none is ever written that is not of what stands beside it.

    Raises:
        ValueError: a field or a preset that is none of the accepted values, naming it; or fields that are not those
            of `architecture_sha256`.
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
        no_answer_threshold=None,
        answerable_calibration=None,
        architecture_sha256=None,
        weights_sha256=None,
        **kwargs,
    ):
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
        self.pad_token_id = pad_token_id
        self.embedding_type = embedding_type
        self.significance = significance
        self.length_config = length_config
        self.int8_storage = int8_storage
        self.no_answer_threshold = no_answer_threshold
        self.answerable_calibration = answerable_calibration
        self._check_fields(kwargs)
        self.length_presets = self._checked_presets(length_presets)
        if architecture_sha256 is not None and architecture_sha256 != self.sha256_of_architecture():
            raise ValueError(
                f"architecture_sha256 is {architecture_sha256!r}, which is not that of {', '.join(ARCHITECTURE)}: "
                f"{CONFIG_NAME} was changed after the weights were saved. If it was meant, delete architecture_sha256"
            )
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        self.auto_map = dict(AUTO_MAP)
        self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)

    def _check_fields(self, others):
        """Raises a [`ValueError`] that names a field of ours, or of `others`, which is none of the accepted values."""
        for name in SIZES:
            most = MOST_LAYERS if name == "num_hidden_layers" else MOST_PARAMETERS
            value = getattr(self, name)
            require(name, value, is_number(value, Integral) and 1 <= value <= most, f"an int from 1 to {most}")
        d, rows = self.hidden_size, self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        parameters = rows * d + self.num_hidden_layers * (4 * d * d + 2 * d * self.intermediate_size)
        if parameters > MOST_PARAMETERS:
            sizes = ", ".join(f"{name} {getattr(self, name)}" for name in SIZES)
            raise ValueError(f"{sizes} make {parameters} parameters, expected at most {MOST_PARAMETERS}")
        if d % self.num_attention_heads:
            raise ValueError(f"hidden_size ({d}) is not a multiple of num_attention_heads ({self.num_attention_heads})")
        for name, accepted in (("embedding_type", ("bert", "roberta")), ("significance", ("attention", "learned"))):
            require(name, getattr(self, name), getattr(self, name) in accepted, f"one of {accepted}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            require(name, value, is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
        std, eps, pad = self.initializer_range, self.layer_norm_eps, self.pad_token_id
        require("initializer_range", std, is_number(std) and 0 <= std <= 1, "a number in [0, 1]")
        require("layer_norm_eps", eps, is_number(eps) and 0 < eps < 1, "a number in (0, 1)")
        require("hidden_act", self.hidden_act, isinstance(self.hidden_act, str), "an activation's name")
        if pad is not None or self.embedding_type == "roberta":
            legal = is_number(pad, Integral) and 0 <= pad < self.vocab_size
            require("pad_token_id", pad, legal, f"an int from 0 to {self.vocab_size - 1}")
        storage = self.int8_storage
        legal = isinstance(storage, dict) and storage and all(isinstance(each, str) for each in storage.values())
        require("int8_storage", storage, storage is None or legal, "None or a dict of str")
        threshold, calibration = self.no_answer_threshold, self.answerable_calibration
        require("no_answer_threshold", threshold, threshold is None or is_finite(threshold), "None or a finite number")
        legal = isinstance(calibration, list) and len(calibration) == 2 and all(map(is_finite, calibration))
        legal = calibration is None or (legal and calibration[0] > 0)
        require("answerable_calibration", calibration, legal, "None or a list of two finite numbers, the first above 0")
        model_type = others.get("model_type", self.model_type)
        require("model_type", model_type, isinstance(model_type, str), "a str")
        architectures, dtype = others.get("architectures"), others.get("dtype")
        legal = isinstance(architectures, list) and all(isinstance(each, str) for each in architectures)
        require("architectures", architectures, architectures is None or legal, "a list of str")
        legal = (dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")) in DTYPES
        require("dtype", dtype, dtype is None or legal, f"one of {DTYPES}")

    def _checked_presets(self, presets):
        """`presets` and `"full"`; raises a [`ValueError`] that names what is wrong with one."""
        full = [1.0] * self.num_hidden_layers
        require("length_presets", presets, presets is None or isinstance(presets, dict), "a dict")
        presets = {"full": {"length_config": full}, **(presets or {})}
        for name, preset in presets.items():
            require("a preset's name", name, is_plain_name(name), "no path: a str without / \\ : and ..")
            legal = isinstance(preset, dict) and "length_config" in preset
            require(f"preset {name!r}", preset, legal, "a dict with a 'length_config'")
            self._read_entries(preset["length_config"], f"preset {name!r}")
            validation = preset.get("validation", {})
            require(f"validation of preset {name!r}", validation, isinstance(validation, dict), "a dict")
            f1 = validation.get("f1", 0)
            require(f"validation f1 of preset {name!r}", f1, is_number(f1) and 0 <= f1 <= 100, "a number in [0, 100]")
        require("preset 'full'", presets["full"]["length_config"], presets["full"]["length_config"] == full, full)
        return presets

    def sha256_of_architecture(self):
        """SHA-256, in hex, of the fields that the weights mean nothing without."""
        fields = json.dumps([getattr(self, name) for name in ARCHITECTURE], sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()

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
                min(n, max(2, (p*n + 999) // 1000))); `{"max_macs": s}`, of the presets whose MACs share is at most s
                `"full"` if it is among them, else that of the best validation F1 (of the most MACs, where not all were
                measured); or `None`, this configuration's own. Entries are non-increasing.

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
        if "full" in within:  # what a cheaper preset is better by is noise
            return self.token_lengths("full")
        f1 = {name: self.length_presets[name].get("validation", {}).get("f1") for name in within}
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
        keep_code(pretrained_model_name_or_path, **{name: where[name] for name in where if name != "subfolder"})
        path = _stored_file(pretrained_model_name_or_path, PRESETS_FILE, **where)
        if path is not None:
            config_dict["length_presets"] = _read_presets(path, config_dict.get("num_hidden_layers"))
        return config_dict, kwargs

    @classmethod
    def _dict_from_json_file(cls, json_file):
        try:
            fields = super()._dict_from_json_file(json_file)
        except RecursionError as error:
            raise ValueError(f"{json_file} is no JSON that can be read: {error}") from error
        require(json_file, fields, isinstance(fields, dict), "a JSON object")
        return fields

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

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in [`PretrainedConfig`]; also writes `length_configs.json` and the model's code, so that the folder is
        a complete repository.

        Raises:
            FileNotFoundError: see [`QuaLAMiniLMConfig.code`].
        """
        self.code()
        super().save_pretrained(save_directory, *args, **kwargs)
        self._complete(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """As in transformers, whose `save_pretrained` asks for it before ours has added what belongs to a folder."""
        self._complete(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _complete(self, folder):
        """Writes presets and code beside the `config.json` of `folder`."""
        self.save_presets(folder)
        for name, text in self.code().items():
            path = Path(folder) / name
            if not path.is_file() or path.resolve() != _beside(name).resolve():
                write_beside_then_rename(path, text)

    def code(self):
        """Texts of the model's code, a `dict` of `str` by file name, in the order of `CODE_FILES`.

        Raises:
            FileNotFoundError: one cannot be found any more, so that what was saved could not be loaded.
        """
        if self._name_or_path and self._name_or_path not in KEPT_CODE:
            keep_code(self._name_or_path, revision=getattr(self, "_commit_hash", None))
        beside = {name: _beside(name).read_text(encoding="utf-8") for name in CODE_FILES if _beside(name).is_file()}
        code = beside | KEPT_CODE.get(self._name_or_path, {})
        missing = [name for name in CODE_FILES if name not in code]
        if missing:
            raise FileNotFoundError(
                f"{', '.join(missing)} is neither in {Path(__file__).parent} nor in {self._name_or_path!r}, and "
                f"config.json names it: a folder saved without it could not be loaded. Load from a whole repository"
            )
        return {name: code[name] for name in CODE_FILES}

    def save_presets(self, folder):
        """Writes `length_presets` into the folder, as `length_configs.json`."""
        content = {"num_hidden_layers": self.num_hidden_layers, "presets": self.length_presets}
        write_beside_then_rename(Path(folder) / PRESETS_FILE, json.dumps(content, indent=2) + "\n")

    def write_checksums(self, folder):
        """Writes into the `config.json` of `folder` what tells later that it and the weights beside it are whole, and
        belong together: `weights_sha256`, the SHA-256 of each safetensors file, and `architecture_sha256`. Where no
        `config.json` stands (PEFT saves adapters alone), nothing is written."""
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            return
        checksums = {"architecture_sha256": self.sha256_of_architecture(), "weights_sha256": weights_sha256(folder)}
        fields = json.loads(path.read_text(encoding="utf-8")) | checksums
        write_beside_then_rename(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def keep_code(repository, **where):
    """Keeps the texts of a repository's code, where transformers runs a copy of it, while the repository is there.

    transformers copies what it runs and what that imports, at most, and 4.57 puts folders of one name on top of each
    other. (That this file imports the others would not do: versions before 4.57 follow a circle of imports for ever.)

    Args:
        repository (`str` or path), where: see [`check_weights`].
    """
    if not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
        return
    kept = KEPT_CODE[str(repository)] = {}
    for name in CODE_FILES:
        if os.path.isdir(repository) or not _beside(name).is_file():
            try:
                path = _stored_file(repository, name, **where)
            except OSError:  # no network, and it was never asked for: that is no reason not to load
                continue
            if path is not None:
                kept[name] = Path(path).read_text(encoding="utf-8")


def _beside(name):
    return Path(__file__).with_name(name)


def check_weights(repository, **where):
    """Compares a repository's weights with the `weights_sha256` of its `config.json`, if it has any.

    Args:
        repository (`str`, path or `None`): as in `from_pretrained`, which has been through it: what a Hub repository
            has is in the cache. `where` are `cached_file`'s arguments.

    Raises:
        ValueError: a file has another checksum, or `weights_sha256` is no object of checksums by file name.
    """
    if repository is None:  # weights that were given, not read
        return
    try:
        path = _stored_file(repository, CONFIG_NAME, local_files_only=True, **where)
        checksums = path and json.loads(Path(path).read_text(encoding="utf-8")).get("weights_sha256")
    except (AttributeError, OSError, RecursionError, ValueError):  # loading has complained of it already
        return
    if checksums is None:
        return
    legal = isinstance(checksums, dict) and all(map(is_plain_name, checksums))
    require(f"weights_sha256 in {path}", checksums, legal, "an object of SHA-256 checksums by file name")
    for name, checksum in checksums.items():
        file = Path(path).with_name(name)
        if file.is_file() and _sha256_known(file) != checksum:
            raise ValueError(
                f"{file} is not the file that weights_sha256 in {path} states: it is damaged, cut short, a Git LFS "
                f"pointer, or holds other weights. Get both files again; if it was meant, delete weights_sha256"
            )


def weights_sha256(folder):
    """SHA-256 of each safetensors file of weights in `folder`, a `dict` of `str` by file name."""
    return {each.name: file_sha256(each) for each in sorted(Path(folder).glob(WEIGHTS_PATTERN))}


def _sha256_known(path):
    """[`file_sha256`] of a file of weights, read anew only if it is another than when this process last asked."""
    path = Path(path).resolve()
    stat = path.stat()
    return _sha256_of(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(maxsize=64)
def _sha256_of(path, *as_it_stands):
    return file_sha256(path)


def file_sha256(path):
    """SHA-256 of the file's bytes, in hex: what `sha256sum` prints, and the Hub for a large file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _stored_file(repository, name, **where):
    """Path of the file `name` of a repository, or beside the file `repository`; `None` where there is none."""
    if os.path.isfile(repository):
        beside = Path(repository).with_name(name)
        return beside if beside.is_file() else None
    return cached_file(repository, name, _raise_exceptions_for_missing_entries=False, **where)


def _read_presets(path, num_hidden_layers):
    def unique(pairs):
        repeated = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        if repeated:
            raise ValueError(f"{repeated[0]!r} stands twice in one object")
        return dict(pairs)

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    presets = content.get("presets") if isinstance(content, dict) else None
    if not isinstance(presets, dict):
        raise ValueError(f"{path} has no object 'presets'")
    if content.get("num_hidden_layers") != num_hidden_layers:
        raise ValueError(
            f"num_hidden_layers is {content.get('num_hidden_layers')!r} in {path}, {num_hidden_layers!r} in config.json"
        )
    return presets


def is_plain_name(name):
    """Whether a name out of a file is a name and no path: a str without / \\ : and .., safe to join to a folder."""
    return isinstance(name, str) and bool(name.strip(".")) and not re.search(r"[/\\:\x00-\x1f]|\.\.", name)


def is_number(value, kind=Real):
    """Whether `value` is of `kind`, booleans not being numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def is_finite(value):
    return is_number(value) and math.isfinite(value)


def require(name, value, legal, accepted):
    """Raises a [`ValueError`] that says what `name` is and what is accepted, unless `value` is `legal`."""
    if not legal:
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected {accepted}")


def write_beside_then_rename(path, text):
    """Writes `text` to `path` so that at any moment it holds the old text or the new, whole."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
