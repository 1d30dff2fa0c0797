"""Makes a BERT or RoBERTa question-answering checkpoint a repository like this one:
`python convert_checkpoint.py SOURCE OUT [--quantize int8 --calibration FILE]`.

The result answers as SOURCE does and takes a `length_config`; recipe/ trains, searches and quantises it further.
Only --quantize needs what recipe/ needs (requirements-recipe.txt).
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from safetensors.torch import load_file
from transformers import AutoConfig, PretrainedConfig

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.length_configs_qualaminilm import is_plain_name, require
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.data import load_tokenizer
from recipe.results import whole_folder

ARCHITECTURES = {"bert": "BertForQuestionAnswering", "roberta": "RobertaForQuestionAnswering"}
DOWNLOADED = ("*.json", "*.txt", "*.md", "model*.safetensors", "pytorch_model*.bin")
RENAMED = (
    (r"^roberta\.", "bert."),
    (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
    (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
)
PACKED = "._packed_params._packed_params"
# What a checkpoint may hold and this model has no use for: pattern -> why.
LEFT_OUT = {
    r"^(bert|roberta)\.pooler\.": "the span head does not read the pooler",
    r"\.embeddings\.position_ids$": "positions are counted at each call",
}
LEFT_OUT_OF_INT8 = {
    r"(^|[._])(scale|zero_point)(_\d+)?$": "an activation's int8 grid, which calibration finds anew",
    r"\._packed_params\.dtype$": "the type of packed weights, which they carry themselves",
    r"^best_configure$": "how Intel Neural Compressor quantised",
}
CARD = """---
{{ card_data }}
---

# {{ name }}

Converted from {{ source }}, which answers questions out of a text, into the format of QuaLA-MiniLM: it drops tokens
layer by layer under a `length_config` chosen at call time. {{ stored }}

```python
from transformers import pipeline

qa = pipeline("question-answering", model="{{ name }}", trust_remote_code=True)
```

With nothing dropped it answers as its source does. Measure what a `length_config` costs before using one. {{ licence }}

"""


def source_folder(source, revision=None):
    """The local folder of `source`, a folder or a model's id on the Hub, at `revision` (a commit, branch or tag).

    Raises:
        ValueError: a revision of a local folder, or neither a folder nor an id.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"--revision {revision} is of a Hub repository, and SOURCE {source} is a folder")
        return Path(source)
    if Path(source).exists():
        raise ValueError(f"SOURCE {source} is a file, expected a folder or a model's id on the Hub")
    return Path(snapshot_download(source, revision=revision, allow_patterns=list(DOWNLOADED)))


def read_config(folder):
    """The source's configuration, as the one of ours that computes the same.

    Raises:
        ValueError: the checkpoint is of another architecture, or attends to the past only.
    """
    fields = PretrainedConfig.get_config_dict(folder)[0]
    if not fields:
        raise ValueError(f"{folder} has no config.json")
    expected = ARCHITECTURES.get(fields.get("model_type"))
    architectures = fields.get("architectures") or [expected]
    if expected is None or architectures != [expected]:
        raise ValueError(
            f"{folder} holds {fields.get('architectures')} of model_type {fields.get('model_type')!r}, expected "
            f"{' or '.join(ARCHITECTURES.values())}"
        )
    for switch in ("is_decoder", "add_cross_attention"):
        if fields.get(switch):
            raise ValueError(f"{switch} is true in the configuration of {folder}, expected an encoder")
    return QuaLAMiniLMConfig.from_transformers(AutoConfig.from_pretrained(folder))


def read_weights(folder):
    """The checkpoint's entries: name -> tensor, or what torch.ao's int8 layers store.

    Raises:
        ValueError: no weights, a file that cannot be read, or not without running code of its own, or an index that
            is no object of file names.
    """
    for name, read in (("model.safetensors", load_file), ("pytorch_model.bin", read_pickle)):
        index = folder / f"{name}.index.json"
        files = [name] if (folder / name).exists() else []
        if not files and index.exists():
            files = shards(index)
        entries = {}
        for file in files:
            try:
                entries.update(read(folder / file))
            except Exception as error:  # safetensors, zip, pickle and torch each raise their own
                raise ValueError(f"{folder / file} cannot be read as weights: {error}") from error
        if files:
            return entries
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def shards(index):
    """Names of the files that an index of weights tells of, all of them in its own folder."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is no index of weights: {type(error).__name__}: {error}") from error
    legal = isinstance(weight_map, dict) and weight_map
    require(f"weight_map in {index}", weight_map, legal, "a file's name for each tensor")
    for name in weight_map.values():
        require(f"a file in {index}", name, is_plain_name(name), "the name of a file beside it, no path")
    return sorted(set(weight_map.values()))


def read_pickle(path):
    entries = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(entries, dict):
        raise ValueError(f"it holds a {type(entries).__name__}, expected a state dict")
    return entries


def translate(entries):
    """What each entry of a checkpoint is to this model.

    Args:
        entries: see [`read_weights`].

    Returns:
        our name -> (its name, float32 tensor); and name -> why, for entries that are left out.
    """
    left_out = LEFT_OUT | (LEFT_OUT_OF_INT8 if any(name.endswith(PACKED) for name in entries) else {})
    weights, unused = {}, {}
    for name, entry in entries.items():
        reason = next((why for pattern, why in left_out.items() if re.search(pattern, name)), None)
        if reason is not None:
            unused[name] = reason
            continue
        found = {name: entry}
        if name.endswith(PACKED):
            layer = name.removesuffix(PACKED)
            found = {f"{layer}.weight": entry[0].dequantize(), f"{layer}.bias": entry[1]}
        for ours, tensor in found.items():
            for pattern, replacement in RENAMED:
                ours = re.sub(pattern, replacement, ours)
            weights[ours] = name, tensor.detach().float()
    return weights, unused


def build_model(config, weights):
    """The model of the translated `weights`.

    Raises:
        ValueError: weights that are missing, too many, or of another shape than `config` asks for, by name.
    """
    model = QuaLAMiniLMForQuestionAnswering(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    faults = [f"{name} is missing" for name in shapes if name not in weights]
    for name, (theirs, tensor) in weights.items():
        if name not in shapes:
            faults.append(f"{theirs} is unexpected")
        elif tuple(tensor.shape) != shapes[name]:
            faults.append(f"{theirs} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
    if faults:
        raise ValueError(f"the weights are not those of the configuration: {'; '.join(faults)}")
    model.load_state_dict({name: tensor for name, (_, tensor) in weights.items()})
    return model.eval()


def read_tokenizer(folder, config):
    """The folder's tokenizer.

    Raises:
        ValueError: it gives tokens that the model has no embedding for, or pads with another than the model's.
    """
    tokenizer = load_tokenizer(folder)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} gives {token!r} the id {largest}, the model has embeddings for ids below "
            f"{config.vocab_size}"
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        raise ValueError(
            f"the tokenizer of {folder} pads with id {tokenizer.pad_token_id}, the model with {config.pad_token_id}"
        )
    return tokenizer


def model_card(folder, source, name, stored):
    """A card that says where the model comes from, with the source's licence if its own card states one."""
    readme = folder / "README.md"
    theirs = ModelCard.load(readme).data if readme.exists() else ModelCardData()
    data = ModelCardData(
        license=theirs.license, language=theirs.language, library_name="transformers", pipeline_tag="question-answering"
    )
    licence = f"Its licence is its source's, {theirs.license}." if theirs.license else "Its source states no licence."
    return ModelCard.from_template(data, template_str=CARD, name=name, source=source, stored=stored, licence=licence)


def write_repository(out, model, tokenizer, card):
    """Writes the whole repository `out`, or nothing.

    Raises:
        FileExistsError: it exists.
        OSError: it could not be written.
    """
    with whole_folder(out) as unfinished:
        try:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            card.save(unfinished / "README.md")
        except Exception as error:  # safetensors and tokenizers have their own for a full disk
            raise OSError(f"OUT {out} could not be written: {error}") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("source", metavar="SOURCE", help="folder, or id on the Hub, of the checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--revision", help="commit, branch or tag of a SOURCE on the Hub")
    parser.add_argument("--quantize", choices=("int8",), help="store int8 weights")
    parser.add_argument("--calibration", nargs="+", default=[], help="SQuAD JSON files that --quantize calibrates on")
    parser.add_argument("--dry_run", action="store_true", help="say what becomes of each tensor, write nothing")
    arguments = parser.parse_args()
    if bool(arguments.quantize) != bool(arguments.calibration):
        parser.error("--quantize int8 and --calibration FILE go together")
    try:
        convert(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"convert_checkpoint.py: {error}")


def convert(arguments):
    if arguments.quantize:
        try:
            from recipe.data import longest_window
            from recipe.quantize import calibration_rows, calibration_windows, quantize
        except ModuleNotFoundError as error:
            advice = "pip install -r requirements-recipe.txt"
            raise ValueError(f"--quantize needs {error.name}, which is not installed: {advice}") from error
    out = arguments.out
    if out.exists() or out.is_symlink():  # before anything is downloaded
        raise FileExistsError(f"OUT {out} exists, expected a folder that is yet to be made")
    folder = source_folder(arguments.source, arguments.revision)
    if folder.resolve() in out.resolve().parents:
        raise ValueError(f"OUT {out} lies in SOURCE {folder}, which is not to be changed")
    config = read_config(folder)
    weights, unused = translate(read_weights(folder))
    model = build_model(config, weights)
    tokenizer = read_tokenizer(folder, config)
    if arguments.dry_run:
        for name, (theirs, tensor) in weights.items():
            print(f"{theirs} -> {name} {tuple(tensor.shape)}")
        for name, reason in unused.items():
            print(f"{name} -> left out: {reason}")
        return
    stored = "Its weights are float32."
    if arguments.quantize:
        table = calibration_windows(arguments.calibration, tokenizer, longest_window(config))
        model = quantize(model, calibration_rows(table, config))
        stored = f"Its weights are int8, calibrated on {', '.join(Path(each).name for each in arguments.calibration)}."
    given = Path(arguments.source)
    source = given.resolve().name if given.is_dir() else arguments.source
    write_repository(out, model, tokenizer, model_card(folder, source, out.name, stored))
    print(f"Wrote {out}: {len(weights)} tensors taken over, {len(unused)} left out")
    if arguments.quantize:
        print(f"python -m recipe.export --model {out} writes its graph, which ONNX Runtime answers with")


if __name__ == "__main__":
    main()
