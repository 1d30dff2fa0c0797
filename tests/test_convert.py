import contextlib
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    RobertaConfig,
    RobertaForQuestionAnswering,
    pipeline,
)

import convert_checkpoint
from conftest import ROOT, right_padded, tiny_folder, trains
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.quantization_qualaminilm import QuantizedLinear
from recipe.data import load_tokenizer

# (layers, width, heads, intermediate)
SHAPES = {
    "bert-3x32": ("bert", (3, 32, 4, 48)),
    "bert-1x24": ("bert", (1, 24, 2, 96)),
    "roberta-6x16": ("roberta", (6, 16, 2, 32)),
    "roberta-2x48": ("roberta", (2, 48, 12, 20)),
}


def reference(family, shape):
    """A random checkpoint of transformers' own class."""
    layers, width, heads, intermediate = shape
    fields = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": 80,
    }
    if family == "bert":
        model = BertForQuestionAnswering(BertConfig(vocab_size=30530, **fields)).eval()
    else:
        config = RobertaConfig(vocab_size=300, type_vocab_size=1, layer_norm_eps=1e-5, **fields)
        model = RobertaForQuestionAnswering(config).eval()
    # Drawn here, since transformers' two lines draw in different orders.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "LayerNorm" not in name:
                parameter.normal_(std=0.1, generator=generator)
    return model


def save_tokenizer(family, folder):
    """Beside a checkpoint, as it was usual before tokenizer.json: vocab.txt, or vocab.json and merges.txt."""
    if family == "bert":
        vocabulary = load_tokenizer(ROOT).get_vocab()
        (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
        return
    bpe = ByteLevelBPETokenizer()
    words = ["Ann lives in Berlin, Bob in Paris.", "Where does Ann live?"] * 4
    bpe.train_from_iterator(words, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    bpe.save_model(str(folder))


@pytest.fixture(params=SHAPES)
def checkpoint(request, tmp_path):
    """A model of transformers and the folder it was saved to; pickled for every second shape."""
    family, shape = SHAPES[request.param]
    model, folder = reference(family, shape), tmp_path / "source"
    model.save_pretrained(folder)
    if shape[0] % 2 == 0:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    save_tokenizer(family, folder)
    return model, folder


@pytest.fixture
def bert_folder(tmp_path):
    folder = tmp_path / "source"
    reference("bert", (2, 16, 2, 24)).save_pretrained(folder)
    save_tokenizer("bert", folder)
    return folder


def convert(*arguments):
    """Runs the command in this process; what it would print to stderr and fail with is a `SystemExit`."""
    before = sys.argv
    sys.argv = ["convert_checkpoint.py", *map(str, arguments)]
    try:
        convert_checkpoint.main()
    finally:
        sys.argv = before


def refused(source, out, *options):
    """What the command says when it refuses; checks that it leaves nothing behind and `source` as it was."""
    before = {path: path.read_bytes() for path in Path(source).rglob("*") if path.is_file()}
    beside = set(out.parent.iterdir())
    with pytest.raises(SystemExit) as exit:
        convert(source, out, *options)
    assert {path: path.read_bytes() for path in Path(source).rglob("*") if path.is_file()} == before
    assert set(out.parent.iterdir()) == beside
    return exit.value.code


def test_answers_equal_the_source_class(checkpoint, tmp_path):
    model, folder = checkpoint
    convert(folder, tmp_path / "out")
    converted = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    input_ids, attention_mask = right_padded(model.config, [40, 25, 7])
    with torch.inference_mode():
        expected = model(input_ids, attention_mask)
        found = converted(input_ids, attention_mask)
    for name in ("start_logits", "end_logits"):
        real = attention_mask == 1
        torch.testing.assert_close(found[name][real], expected[name][real], atol=1e-5, rtol=0)


def test_the_repository_stands_alone(checkpoint, tmp_path):
    _, folder = checkpoint
    convert(folder, tmp_path / tmp_path.name)
    shutil.rmtree(folder)
    names = {path.name for path in (tmp_path / tmp_path.name).iterdir()}
    assert names >= {"config.json", "model.safetensors", "length_configs.json", "tokenizer.json", "README.md"}
    assert str(tmp_path) not in (tmp_path / tmp_path.name / "config.json").read_text()
    qa = pipeline("question-answering", model=str(tmp_path / tmp_path.name), trust_remote_code=True)
    context = "Ann lives in Berlin."
    answer = qa(question="Where does Ann live?", context=context, length_config="full")
    assert answer["answer"] == context[answer["start"] : answer["end"]]


def test_token_types_are_named_for_versions_that_leave_them_out(bert_folder, tmp_path):
    (bert_folder / "tokenizer_config.json").write_text(
        '{"do_lower_case": true, "model_input_names": ["input_ids", "attention_mask"]}'
    )
    convert(bert_folder, tmp_path / "out")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_input_names"] == names
    assert list(load_tokenizer(tmp_path / "out")("Who?", "Ann.")) == names


WITHOUT_THE_REST = """
import sys
# All that is installed beside requirements.txt and what those packages ask for.
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from transformers import pipeline
import convert_checkpoint

source, out, calibration = sys.argv[2:]
sys.argv[1:] = [source, out]
convert_checkpoint.main()
qa = pipeline("question-answering", model=out, trust_remote_code=True)
context = "Ann lives in Berlin."
answer = qa(question="Where does Ann live?", context=context)
assert answer["answer"] == context[answer["start"] : answer["end"]], answer
sys.argv[2:] = [out + "-int8", "--quantize", "int8", "--calibration", calibration]
convert_checkpoint.main()
"""


def beside(*packages):
    """Top-level modules of everything installed that is neither one of `packages` nor asked for by them."""
    wanted, ahead = set(), list(packages)
    while ahead:
        name = re.sub(r"[-_.]+", "-", ahead.pop()).lower()
        if name in wanted:
            continue
        wanted.add(name)
        with contextlib.suppress(PackageNotFoundError):
            ahead += [re.match(r"[\w.-]+", each)[0] for each in requires(name) or () if "extra ==" not in each]
    modules = packages_distributions()
    return {
        module for module, names in modules.items() if not {re.sub(r"[-_.]+", "-", n).lower() for n in names} & wanted
    } - {"pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence"}


def test_only_quantize_needs_what_the_recipe_does(bert_folder, city_file, tmp_path):
    """With nothing installed but requirements.txt; so do those who only ask."""
    modules = beside("torch", "transformers", "safetensors", "huggingface_hub")
    assert {"datasets", "torchmetrics", "optuna", "pyarrow", "matplotlib", "pytest"} <= modules
    assert not {"torch", "numpy", "tokenizers", "tqdm", "packaging"} & modules
    arguments = ",".join(sorted(modules)), bert_folder, tmp_path / "out", city_file
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_REST, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == (
        "convert_checkpoint.py: --quantize needs datasets, which is not installed: "
        "pip install -r requirements-recipe.txt"
    ), done.stderr
    assert (tmp_path / "out").is_dir() and not (tmp_path / "out-int8").exists()


@pytest.mark.parametrize(
    "index, complaint",
    [
        ({"a": "../secret.safetensors"}, "a file in .*index.json is '../secret.safetensors', expected the name"),
        ({"a": "/etc/passwd"}, "is '/etc/passwd'"),
        ({"a": "sub/model.safetensors"}, "is 'sub/model.safetensors'"),
        ({"a": "sub\\model.safetensors"}, "is 'sub"),
        ({"a": "C:model.safetensors"}, "is 'C:model.safetensors'"),
        ({"a": ".."}, "is '..'"),
        ({"a": ""}, "is ''"),
        ({"a": 3}, "is 3"),
        ({"a": None}, "is None"),
        ({"a": ["model-0.safetensors"]}, r"is \['model-0"),
        ({}, "weight_map in .*index.json is {}, expected a file's name for each tensor"),
        (["model-0.safetensors"], r"weight_map in .*index.json is \['model-0.safetensors'\]"),
        ("model-0.safetensors", "weight_map in .*index.json is 'model-0.safetensors'"),
        (None, "weight_map in .*index.json is None"),
    ],
)
def test_an_index_names_files_beside_it(bert_folder, tmp_path, index, complaint):
    """It may come from anyone: what it names is not to be read wherever it lies."""
    (bert_folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (bert_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert re.search(complaint, refused(bert_folder, tmp_path / "out"))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"3", b"\xff\xfe", b"[" * 100_000, b'{"weight_map"'])
def test_an_index_that_is_none_is_named(bert_folder, tmp_path, content):
    (bert_folder / "model.safetensors").unlink()
    (bert_folder / "model.safetensors.index.json").write_bytes(content)
    assert "model.safetensors.index.json is no index of weights: " in refused(bert_folder, tmp_path / "out")


def test_the_tokenizer_is_the_sources(checkpoint, tmp_path):
    _, folder = checkpoint
    convert(folder, tmp_path / "out")
    text = ("Where does Ann live?", "Ann LIVES in Berlin, Bob in Café Paris.")
    theirs = AutoTokenizer.from_pretrained(folder)(*text)
    ours = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)(*text)
    assert ours["input_ids"] == theirs["input_ids"]


def test_old_names_poolers_and_shards_are_read(bert_folder, tmp_path):
    weights = load_file(bert_folder / "model.safetensors")
    expected = dict(weights)
    for name in list(weights):
        if "LayerNorm" in name:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            weights[old] = weights.pop(name)
    weights["bert.pooler.dense.weight"] = torch.zeros(16, 16)
    weights["bert.embeddings.position_ids"] = torch.arange(80)[None]
    (bert_folder / "model.safetensors").unlink()
    halves = list(weights)[::2], list(weights)[1::2]
    for i, half in enumerate(halves):
        save_file({name: weights[name] for name in half}, bert_folder / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, half in enumerate(halves) for name in half}}
    (bert_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(bert_folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_dry_run_lists_every_tensor_and_writes_nothing(bert_folder, tmp_path, capsys):
    weights = load_file(bert_folder / "model.safetensors")
    save_file(weights | {"bert.pooler.dense.bias": torch.zeros(16)}, bert_folder / "model.safetensors")
    convert(bert_folder, tmp_path / "out", "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert f"bert.embeddings.LayerNorm.bias -> bert.embeddings.LayerNorm.bias {(16,)}" in lines
    assert "bert.pooler.dense.bias -> left out: the span head does not read the pooler" in lines
    assert {line.split(" -> ")[0] for line in lines} == weights.keys() | {"bert.pooler.dense.bias"}
    assert not (tmp_path / "out").exists()


def test_the_card_names_source_and_licence(bert_folder, tmp_path):
    convert(bert_folder, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "Converted from source," in card.text and "states no licence" in card.text and card.data.license is None
    (bert_folder / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage: de\n---\nA model.\n")
    convert(bert_folder, tmp_path / "licensed")
    card = ModelCard.load(tmp_path / "licensed" / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.language == "de" and "cc-by-4.0" in card.text
    assert card.data.pipeline_tag == "question-answering" and card.data.library_name == "transformers"


def test_int8_weights_on_request(bert_folder, city_file, tmp_path):
    convert(bert_folder, tmp_path / "float")
    convert(bert_folder, tmp_path / "int8", "--quantize", "int8", "--calibration", city_file)
    float_model, model = (
        QuaLAMiniLMForQuestionAnswering.from_pretrained(tmp_path / name).eval() for name in ("float", "int8")
    )
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 2 * 6
    input_ids, attention_mask = right_padded(model.config, [30, 12])
    with torch.inference_mode():
        expected, found = (each(input_ids, attention_mask).start_logits for each in (float_model, model))
    real = attention_mask == 1
    assert F.cosine_similarity(found[real], expected[real], dim=0) > 0.98
    assert "int8, calibrated on cities.json" in (tmp_path / "int8" / "README.md").read_text()


def test_int8_and_calibration_go_together(bert_folder, tmp_path):
    assert refused(bert_folder, tmp_path / "out", "--quantize", "int8") == 2
    assert refused(bert_folder, tmp_path / "out", "--calibration", "x.json") == 2
    options = ("--quantize", "int8", "--calibration", tmp_path / "missing.json")
    assert "missing.json does not exist" in refused(bert_folder, tmp_path / "out", *options)


def test_tensors_that_do_not_fit_are_named(bert_folder, tmp_path):
    path, out = bert_folder / "model.safetensors", tmp_path / "out"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if name != "qa_outputs.bias"}, path)
    assert "qa_outputs.bias is missing" in refused(bert_folder, out)
    save_file(weights | {"cls.predictions.bias": torch.zeros(3)}, path)
    assert "cls.predictions.bias is unexpected" in refused(bert_folder, out)
    # An activation's grid is known of int8 checkpoints only.
    save_file(weights | {"bert.encoder.layer.0.output.dense.scale": torch.zeros(())}, path)
    assert "dense.scale is unexpected" in refused(bert_folder, out)
    save_file(weights | {"qa_outputs.bias": torch.zeros(3)}, path)
    assert "qa_outputs.bias has shape (3,), expected (2,)" in refused(bert_folder, out)


def test_other_architectures_are_refused(bert_folder, tmp_path):
    out, config = tmp_path / "out", json.loads((bert_folder / "config.json").read_text())
    for fields, message in (
        ({"architectures": ["BertForMaskedLM"]}, "holds ['BertForMaskedLM'] of model_type 'bert'"),
        ({"model_type": "distilbert"}, "of model_type 'distilbert', expected BertForQuestionAnswering or Roberta"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"position_embedding_type": "relative_key"}, "'relative_key', expected 'absolute'"),
    ):
        (bert_folder / "config.json").write_text(json.dumps(config | fields))
        assert message in refused(bert_folder, out)
    (bert_folder / "config.json").write_text("{")
    assert "config.json" in refused(bert_folder, out)
    (bert_folder / "config.json").unlink()
    assert "config.json" in refused(bert_folder, out)


def test_a_span_head_is_never_made_up(tmp_path):
    torch.manual_seed(0)
    config = reference("bert", (1, 16, 2, 24)).config
    BertForMaskedLM(config).save_pretrained(tmp_path / "source")
    config.architectures = ["BertForQuestionAnswering"]
    config.save_pretrained(tmp_path / "source")
    save_tokenizer("bert", tmp_path / "source")
    assert "qa_outputs.weight is missing" in refused(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_files_are_named(bert_folder, tmp_path, name, damage):
    path = bert_folder / name
    weights = load_file(bert_folder / "model.safetensors")
    (bert_folder / "model.safetensors").unlink()
    (save_file if name == "model.safetensors" else torch.save)(weights, path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"weights" * 99, "empty": b""}[damage])
    assert f"{path} cannot be read as weights" in refused(bert_folder, tmp_path / "out")


def test_pickles_run_nothing(bert_folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "bang"),)

    (bert_folder / "model.safetensors").unlink()
    for write in (lambda path: torch.save({"bomb": Bomb()}, path), lambda path: path.write_bytes(pickle.dumps(Bomb()))):
        write(bert_folder / "pytorch_model.bin")
        assert "pytorch_model.bin cannot be read as weights" in refused(bert_folder, tmp_path / "out")
    assert not (tmp_path / "bang").exists()


def test_no_weights_at_all(bert_folder, tmp_path):
    (bert_folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refused(bert_folder, tmp_path / "out")


def test_a_tokenizer_that_does_not_fit_is_refused(bert_folder, tmp_path):
    out = tmp_path / "out"
    words = (bert_folder / "vocab.txt").read_text(encoding="utf-8")
    (bert_folder / "vocab.txt").write_text(words + "".join(f"extra{i}\n" for i in range(9)), encoding="utf-8")
    assert "gives 'extra8' the id 30530, the model has embeddings for ids below 30530" in refused(bert_folder, out)
    # The embedding may be the larger one: one of 30530 rows takes 30530 words.
    (bert_folder / "vocab.txt").write_text(words + "".join(f"extra{i}\n" for i in range(8)), encoding="utf-8")
    config = json.loads((bert_folder / "config.json").read_text())
    (bert_folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 3}))
    assert "pads with id 0, the model with 3" in refused(bert_folder, out)
    (bert_folder / "config.json").write_text(json.dumps(config))
    convert(bert_folder, out)


def test_nothing_is_overwritten(bert_folder, tmp_path):
    for out, make in (
        (tmp_path / "file", Path.touch),
        (tmp_path / "folder", Path.mkdir),
        (tmp_path / "link", lambda path: path.symlink_to("nowhere")),
    ):
        make(out)
        assert f"OUT {out} exists" in refused(bert_folder, out)
    assert "lies in SOURCE" in refused(bert_folder, bert_folder / "out")


def test_sources_that_are_none(tmp_path):
    (tmp_path / "model.bin").touch()
    for source, message in ((tmp_path / "model.bin", "is a file"), ("no/such/model", ""), ("../no/such", "")):
        with pytest.raises(SystemExit) as exit:
            convert(source, tmp_path / "out")
        assert message in exit.value.code and exit.value.code.startswith("convert_checkpoint.py: ")


def test_a_revision_is_of_the_hub(bert_folder, tmp_path, monkeypatch):
    assert "--revision main is of a Hub repository" in refused(bert_folder, tmp_path / "out", "--revision", "main")
    asked = {}

    def snapshot_download(source, revision, allow_patterns):
        asked.update(source=source, revision=revision)
        return str(bert_folder)

    monkeypatch.setattr(convert_checkpoint, "snapshot_download", snapshot_download)
    convert("someone/bert-squad", tmp_path / "out", "--revision", "abc123")
    assert asked == {"source": "someone/bert-squad", "revision": "abc123"}
    assert "Converted from someone/bert-squad," in (tmp_path / "out" / "README.md").read_text()


def test_a_full_disk_leaves_nothing(bert_folder, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert f"OUT {tmp_path / 'out'} could not be written" in refused(bert_folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_an_earlier_run_left_half_written_is_replaced(bert_folder, tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "junk").touch()
    convert(bert_folder, tmp_path / "out")
    assert not (tmp_path / "out.unfinished").exists() and not (tmp_path / "out" / "junk").exists()


class Twin(nn.Module):
    """RoBERTa for question answering under transformers' module names, plain enough for torch.fx to trace."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.roberta = nn.Module()
        embeddings = self.roberta.embeddings = nn.Module()
        embeddings.word_embeddings = nn.Embedding(config.vocab_size, width)
        embeddings.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        embeddings.token_type_embeddings = nn.Embedding(1, width)
        embeddings.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.roberta.encoder = nn.Module()
        layers = self.roberta.encoder.layer = nn.ModuleList([nn.Module() for _ in range(config.num_hidden_layers)])
        for layer in layers:
            layer.attention, layer.intermediate, layer.output = nn.Module(), nn.Module(), nn.Module()
            layer.attention.self, layer.attention.output = nn.Module(), nn.Module()
            for name in ("query", "key", "value"):
                setattr(layer.attention.self, name, nn.Linear(width, width))
            layer.attention.output.dense = nn.Linear(width, width)
            layer.intermediate.dense = nn.Linear(width, config.intermediate_size)
            layer.output.dense = nn.Linear(config.intermediate_size, width)
            for output in (layer.attention.output, layer.output):
                output.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qa_outputs = nn.Linear(width, 2)
        self.heads, self.width = config.num_attention_heads, width

    def forward(self, input_ids, position_ids):
        embeddings = self.roberta.embeddings
        states = embeddings.word_embeddings(input_ids) + embeddings.position_embeddings(position_ids)
        states = embeddings.LayerNorm(states + embeddings.token_type_embeddings(torch.zeros_like(input_ids)))
        for layer in self.roberta.encoder.layer:
            attention = layer.attention
            query, key, value = (
                getattr(attention.self, name)(states)
                .view(input_ids.size(0), input_ids.size(1), self.heads, self.width // self.heads)
                .transpose(1, 2)
                for name in ("query", "key", "value")
            )
            scores = torch.matmul(query, key.transpose(2, 3)) / (self.width // self.heads) ** 0.5
            context = torch.matmul(scores.softmax(-1), value).transpose(1, 2)
            context = context.reshape(input_ids.size(0), input_ids.size(1), self.width)
            states = attention.output.LayerNorm(attention.output.dense(context) + states)
            inner = F.gelu(layer.intermediate.dense(states))
            states = layer.output.LayerNorm(layer.output.dense(inner) + states)
        return self.qa_outputs(states)


@pytest.fixture
def int8_twin(tmp_path):
    """A RoBERTa quantised by torch.ao's static FX mode, and a folder with its state dict, as Intel publishes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its own end
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        model = reference("roberta", (2, 48, 4, 64))
        twin = Twin(model.config).eval()
        twin.load_state_dict(model.state_dict(), strict=False)
        generator = torch.Generator().manual_seed(0)
        examples = [
            (torch.randint(5, 300, (2, length), generator=generator), torch.arange(2, 2 + length)[None])
            for length in range(10, 60, 2)
        ]
        torch.testing.assert_close(twin(*examples[0])[..., 0], model(examples[0][0]).start_logits)
        prepared = prepare_fx(twin, get_default_qconfig_mapping("x86"), examples[0])
        for example in examples:
            prepared(*example)
        quantized = convert_fx(prepared)
    folder = tmp_path / "int8-source"
    model.config.architectures = ["RobertaForQuestionAnswering"]
    model.config.save_pretrained(folder)
    torch.save(
        quantized.state_dict() | {"best_configure": {"approach": "post_training_static"}}, folder / "pytorch_model.bin"
    )
    save_tokenizer("roberta", folder)
    return model, quantized, folder


def test_int8_checkpoints_of_torch_ao_are_read(int8_twin, tmp_path, capsys):
    model, quantized, folder = int8_twin
    entries = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert any(name.endswith("_packed_params._packed_params") for name in entries)
    convert(folder, tmp_path / "out", "--dry_run")
    listed = {line.split(" -> ")[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == entries.keys()
    convert(folder, tmp_path / "out")
    converted = QuaLAMiniLMForQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    kind = torch.ao.nn.quantized.Linear
    packed = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, kind)}
    assert len(packed) == 2 * 6 + 1
    input_ids = torch.randint(5, 300, (4, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = converted(input_ids).start_logits
        theirs = quantized(input_ids, torch.arange(2, 32)[None])[..., 0]
        for name, layer in packed.items():
            model.get_submodule(name).weight.copy_(layer.weight().dequantize())
        torch.testing.assert_close(found, model(input_ids).start_logits, atol=1e-5, rtol=0)
    # The twin rounds what enters each layer too, to seven bits, and its answers to this step.
    step = quantized.qa_outputs.scale
    assert (found - theirs).abs().mean() < 4 * step < 0.4 * theirs.std()


def test_int8_checkpoints_become_int8(int8_twin, city_file, tmp_path):
    _, _, folder = int8_twin
    convert(folder, tmp_path / "out", "--quantize", "int8", "--calibration", city_file)
    qa = pipeline("question-answering", model=str(tmp_path / "out"), trust_remote_code=True)
    context = "Ann lives in Berlin."
    answer = qa(question="Where does Ann live?", context=context)
    assert qa.model.config.int8_weights and answer["answer"] == context[answer["start"] : answer["end"]]


@trains
def test_converted_weights_go_through_the_recipe(city_windows, tmp_path, monkeypatch):
    from recipe import adapt, quantize, search

    def run(command, *arguments):
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, arguments)])
        command.main()

    tiny = QuaLAMiniLMForQuestionAnswering.from_pretrained(tiny_folder(tmp_path / "tiny"))
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields = {name: getattr(tiny.config, name) for name in (*sizes, "max_position_embeddings")}
    source = BertForQuestionAnswering(BertConfig(**fields))
    source.load_state_dict(tiny.state_dict())
    source.save_pretrained(tmp_path / "source")
    save_tokenizer("bert", tmp_path / "source")
    out, searched, adapted, int8 = (tmp_path / name for name in ("out", "searched", "adapted", "int8"))
    convert(tmp_path / "source", out)
    settings = "--seed 3 --candidates 24 --population 6 --subset 6 --survivors 5".split()
    settings += ["--max_loss", 100, "--max_preset_loss", 100, "--preset_shares", 0.7, 0.63, 0.6, 0.57]
    run(search, "--model", out, "--windows", city_windows, *settings, "--output_dir", searched)
    presets = QuaLAMiniLMForQuestionAnswering.from_pretrained(searched).length_presets
    assert len(presets) == 5
    steps = ["--max_steps", 2, "--bf16", "False"]
    run(adapt, "--model", searched, "--windows", city_windows, *steps, "--output_dir", adapted)
    run(quantize, "--model", adapted, "--windows", city_windows, "--output_dir", int8)
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(int8)
    assert model.config.int8_weights and model.config.num_hidden_layers == 2 and model.config.hidden_size == 16
    assert model.length_presets == presets
