"""Configuration of a QuaLA-MiniLM, and the code that a folder carries beside it."""

import copy
import hashlib
import importlib.metadata
import json
import os
import re
from numbers import Integral
from pathlib import Path

import transformers
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME, TRANSFORMERS_DYNAMIC_MODULE_NAME

from .files_qualaminilm import stored_file, weights_sha256, write_whole
from .length_configs_qualaminilm import (
    PRESETS_FILE,
    LengthConfigs,
    is_number,
    read_presets,
    require,
    require_answerability,
)

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

PARTS = (
    "length_configs",
    "files",
    "configuration",
    "dropping",
    "kernels",
    "quantization",
    "modeling",
    "graph",
    "engine",
    "spans",
    "reading",
    "pipeline",
)
CODE_FILES = tuple(f"{part}_qualaminilm.py" for part in PARTS)
CARRIED = (*CODE_FILES, "reader.py")  # beside the weights of every folder
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
    "int8_weights",
)
DTYPES = ("float16", "bfloat16", "float32", "float64")


class QuaLAMiniLMConfig(LengthConfigs, PretrainedConfig):
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
        int8_weights (`bool`): the weights are stored as quantization_qualaminilm.py says; else they are floats.
        no_answer_threshold (`float`): where the best answer has less evidence, in log units, a text does not answer;
            `None`, 0: less than its window's null.
        answerable_calibration (`list` of two `float`): slope and intercept of the logistic function that makes the
            best answer's evidence how sure it is that a text answers; `None`, 1 and 0: the model's own probability, of
            one window.
        int8_storage: what `config.json` said in int8_weights' place before there was that.
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
        int8_weights=False,
        no_answer_threshold=None,
        answerable_calibration=None,
        int8_storage=None,
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
        legal = isinstance(int8_storage, dict) and int8_storage and all(map(is_str, int8_storage.values()))
        require("int8_storage", int8_storage, int8_storage is None or legal, "None or a dict of str")
        require("int8_weights", int8_weights, isinstance(int8_weights, bool), "a bool")
        self.int8_weights = int8_weights or int8_storage is not None
        self.no_answer_threshold = no_answer_threshold
        self.answerable_calibration = answerable_calibration
        self._check_fields(kwargs)
        self.length_presets = self.checked_presets(length_presets)
        self._check_architecture(architecture_sha256, int8_weights or int8_storage)
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
        require_answerability(self.no_answer_threshold, self.answerable_calibration)
        model_type = others.get("model_type", self.model_type)
        require("model_type", model_type, isinstance(model_type, str), "a str")
        architectures, dtype = others.get("architectures"), others.get("dtype")
        legal = isinstance(architectures, list) and all(map(is_str, architectures))
        require("architectures", architectures, architectures is None or legal, "a list of str")
        legal = (dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")) in DTYPES
        require("dtype", dtype, dtype is None or legal, f"one of {DTYPES}")

    def _check_architecture(self, stated, int8_weights):
        """Raises a [`ValueError`] unless the SHA-256 `stated` is ours, or that of this `int8_weights`, which in older
        versions is no `bool`."""
        if stated not in (None, self.sha256_of_architecture(), self.sha256_of_architecture(int8_weights=int8_weights)):
            raise ValueError(
                f"architecture_sha256 is {stated!r}, which is not that of {', '.join(ARCHITECTURE)}: "
                f"{CONFIG_NAME} was changed after the weights were saved. If it was meant, delete architecture_sha256"
            )

    def sha256_of_architecture(self, **others):
        """SHA-256, in hex, of the fields that the weights mean nothing without, or of `others` in their place."""
        fields = json.dumps([others.get(name, getattr(self, name)) for name in ARCHITECTURE], sort_keys=True)
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

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        where = {
            name: kwargs[name]
            for name in ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            if kwargs.get(name) is not None
        }
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        keep_code(pretrained_model_name_or_path, **{name: where[name] for name in where if name != "subfolder"})
        path = stored_file(pretrained_model_name_or_path, PRESETS_FILE, **where)
        if path is not None:
            config_dict["length_presets"] = read_presets(path, config_dict.get("num_hidden_layers"))
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
                write_whole(path, text.encode())

    def code(self):
        """Texts of the model's code, a `dict` of `str` by file name, in the order of `CARRIED`.

        Raises:
            FileNotFoundError: one cannot be found any more, so that what was saved could not be loaded.
        """
        if self._name_or_path and self._name_or_path not in KEPT_CODE:
            keep_code(self._name_or_path, revision=getattr(self, "_commit_hash", None))
        beside = {name: _beside(name).read_text(encoding="utf-8") for name in CARRIED if _beside(name).is_file()}
        code = beside | KEPT_CODE.get(self._name_or_path, {})
        missing = [name for name in CARRIED if name not in code]
        if missing:
            raise FileNotFoundError(
                f"{', '.join(missing)} is neither in {Path(__file__).parent} nor in {self._name_or_path!r}, and "
                f"config.json names it: a folder saved without it could not be loaded. Load from a whole repository"
            )
        return {name: code[name] for name in CARRIED}

    def save_presets(self, folder):
        """Writes `length_presets` into the folder, as `length_configs.json`."""
        content = {"num_hidden_layers": self.num_hidden_layers, "presets": self.length_presets}
        write_whole(Path(folder) / PRESETS_FILE, (json.dumps(content, indent=2) + "\n").encode())

    def write_checksums(self, folder):
        """Writes into the `config.json` of `folder` what tells later that it and the weights beside it are whole, and
        belong together: `weights_sha256`, the SHA-256 of each safetensors file, and `architecture_sha256`. Where no
        `config.json` stands (PEFT saves adapters alone), nothing is written."""
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            return
        checksums = {"architecture_sha256": self.sha256_of_architecture(), "weights_sha256": weights_sha256(folder)}
        fields = json.loads(path.read_text(encoding="utf-8")) | checksums
        write_whole(path, (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


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
    for name in CARRIED:
        if os.path.isdir(repository) or not _beside(name).is_file():
            try:
                path = stored_file(repository, name, **where)
            except OSError:  # no network, and it was never asked for: that is no reason not to load
                continue
            if path is not None:
                kept[name] = Path(path).read_text(encoding="utf-8")


def _beside(name):
    return Path(__file__).with_name(name)


def is_str(value):
    return isinstance(value, str)
