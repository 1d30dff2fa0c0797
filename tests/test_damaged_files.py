"""Weights, config.json and length_configs.json that are cut short, flipped, swapped or made up."""

import copy
import hashlib
import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForQuestionAnswering,
    BertConfig,
    BertModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from conftest import ROOT, tiny_config
from qualaminilm import files_qualaminilm
from qualaminilm.configuration_qualaminilm import ARCHITECTURE, QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering, QuaLAMiniLMModel
from recipe.quantize import quantize
from recipe.training import load_model

CHECKSUMS = ("architecture_sha256", "weights_sha256")
HALF = {"half": {"length_config": [0.5, 0.5, 0.25], "validation": {"f1": 80.5}}}
INPUT = torch.arange(3, 12)[None]
examples = settings(max_examples=80, deadline=None)


def tiny_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return QuaLAMiniLMForQuestionAnswering(tiny_config(**({"length_presets": HALF} | kwargs))).eval()


def load(folder, **kwargs):
    return QuaLAMiniLMForQuestionAnswering.from_pretrained(folder, **kwargs)


def logits(model, **kwargs):
    with torch.no_grad():
        return torch.stack(model(INPUT, **kwargs)[:2])


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def write_config(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))


def without_checksums(folder):
    write_config(folder, {name: value for name, value in read_config(folder).items() if name not in CHECKSUMS})
    return folder


def states_its_weights(folder):
    """Whether config.json has the checksum of every file of weights, by the definition."""
    files = folder.glob("*.safetensors")
    return read_config(folder)["weights_sha256"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def weights(folder):
    return folder / "model.safetensors"


def test_every_flipped_bit_is_found(folder, weights):
    whole = weights.read_bytes()
    draw = random.Random(0)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    places = [*range(0, 8, 3), *draw.choices(range(8, header), k=5), *draw.choices(range(header, len(whole)), k=10)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors is not the file that weights_sha256 in .* states"):
            load(folder)
    weights.write_bytes(whole)
    assert torch.equal(logits(load(folder)), logits(tiny_model()))


def test_every_cut_is_found(folder, weights):
    whole = weights.read_bytes()
    for length in (0, 7, 8, 9, 100, *random.Random(0).choices(range(len(whole)), k=5), len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="weights_sha256 in .* states: it is damaged, cut short"):
            load(folder)
    weights.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="weights_sha256"):
        load(folder)


@pytest.mark.parametrize(
    "kwargs", [{}, {"hidden_size": 32}, {"num_hidden_layers": 2, "length_presets": None}, {"significance": "learned"}]
)
def test_another_model_s_weights_are_refused(folder, tmp_path, kwargs):
    tiny_model(seed=1, **kwargs).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    for route in (QuaLAMiniLMForQuestionAnswering, QuaLAMiniLMModel):
        with pytest.raises(ValueError, match="weights_sha256 .* or holds other weights"):
            route.from_pretrained(folder)
    with pytest.raises(ValueError, match="weights_sha256"):
        AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def read_whole(monkeypatch):
    """What the checksums read, file by file."""
    seen = []

    def open_and_note(path, *arguments):
        seen.append(Path(path).name)
        return open(path, *arguments)

    monkeypatch.setattr(files_qualaminilm, "open", open_and_note, raising=False)
    return seen


def test_weights_are_hashed_once_a_process_and_when_they_changed(folder, weights, read_whole):
    load(folder)
    load(folder)
    QuaLAMiniLMModel.from_pretrained(str(folder))
    assert read_whole == ["model.safetensors"]
    whole, stat = weights.read_bytes(), weights.stat()
    # Other bytes, of the same number and dated alike.
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match="model.safetensors is not the file"):
        load(folder)


def test_ctrl_c_ends_a_load_at_once(folder, read_whole, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert not read_whole


def test_a_load_that_fails_for_another_reason_says_it(folder):
    with pytest.raises(ValueError, match="entry 2 of length_config is 1"):
        load(folder, length_config=[4, 3, 1])


def test_weights_that_are_given_are_not_looked_for(folder):
    model = tiny_model(seed=1)
    given = QuaLAMiniLMForQuestionAnswering.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(logits(given), logits(model))


def test_without_checksums_a_folder_loads_as_ever(folder):
    expected = logits(load(folder))
    assert torch.equal(logits(load(without_checksums(folder))), expected)
    # Whoever means other weights deletes the checksums, and has them.
    tiny_model(seed=1).save_pretrained(folder)
    assert not torch.equal(logits(load(without_checksums(folder))), expected)


def test_a_damaged_file_without_a_checksum_ends_in_an_error_or_a_model(folder, weights):
    """Whatever stands in it: no crash, no hang, no error of another kind."""
    without_checksums(folder)
    whole = weights.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = whole[8 : 8 + size]

    def named(content, complaint="the weights of .* cannot be read"):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            load(folder)

    for claimed in (0, 1, size - 1, size + 1, len(whole), 10**8, 10**8 + 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1):
        named(struct.pack("<Q", claimed) + whole[8:])
    named(b"")
    named(whole[:-1])
    for content in (b"[" * size, b'{"a":' * (size // 5), b"\xff" * size, b"{}".ljust(size)):
        named(struct.pack("<Q", size) + content.ljust(size) + whole[8 + size :])
    fields = json.loads(header)
    name = next(name for name in fields if name != "__metadata__")
    for change in ({"shape": [2**62, 4]}, {"data_offsets": [0, 2**60]}, {"data_offsets": [8, 0]}, {"dtype": "F7"}):
        content = json.dumps(fields | {name: fields[name] | change}).encode()
        named(struct.pack("<Q", len(content)) + content + whole[8 + size :])
    draw = random.Random(1)
    for _ in range(15):
        damaged = bytearray(whole)
        damaged[draw.randrange(8, 8 + size)] ^= 1 << draw.randrange(8)
        weights.write_bytes(damaged)
        try:
            load(folder)
        except (ValueError, RuntimeError, OSError) as error:
            assert str(error)


def hub_cache(folder, root):
    """The folder as the Hub's cache holds it: blobs, and a snapshot of symbolic links to them."""
    commit = "0123456789" * 4
    repository = root / "models--me--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, repository / "blobs" / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_from_the_hub_s_cache(folder, tmp_path):
    snapshot = hub_cache(folder, tmp_path / "cache")
    places = [{"cache_dir": tmp_path / "cache"}, {"cache_dir": tmp_path / "cache", "revision": snapshot.name}]
    for place in places:
        model = load("me/tiny", **place)
        assert torch.equal(logits(model), logits(load(folder)))
        assert model.length_presets == ["full", "half"]
    weights = snapshot / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.resolve().write_bytes(damaged)
    for place in places:
        with pytest.raises(ValueError, match="model.safetensors is not the file that weights_sha256"):
            load("me/tiny", **place)
    # Presets written into a snapshot take the link's place: the blob is not written through it.
    link = snapshot / "length_configs.json"
    blob = link.resolve()
    before = blob.read_bytes()
    tiny_config().save_presets(snapshot)
    assert blob.read_bytes() == before != link.read_bytes() and not link.is_symlink()


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    positions = torch.tensor([2])
    model.train()(INPUT, start_positions=positions, end_positions=positions).loss.backward()
    optimizer.step()
    return model.eval()


def int8(model):
    rows = [{"input_ids": INPUT[0].tolist(), "token_type_ids": [0] * INPUT.shape[1]}]
    return quantize(model, rows)


SAVES = {
    "as it was": (lambda model: model, {}),
    "trained": (trained, {}),
    "half": (lambda model: model.half(), {}),
    "int8": (int8, {}),
    "dequantised": (lambda model: int8(model).dequantize(), {}),
    "sharded": (lambda model: model, {"max_shard_size": "10KB"}),
    "a variant": (lambda model: model, {"variant": "fp16"}),
    "another state": (lambda model: model, {"state_dict": tiny_model(seed=2).state_dict()}),
}


@pytest.mark.parametrize("case", SAVES)
def test_what_is_saved_states_its_own_weights(folder, tmp_path, case):
    change, options = SAVES[case]
    model = change(load(folder))
    for out in (tmp_path / "new", folder):
        model.save_pretrained(out, **options)
        assert states_its_weights(out)
        again = load(out, variant=options.get("variant"))
        if "state_dict" not in options and not (case == "sharded" and out == folder):
            torch.testing.assert_close(logits(again), logits(copy.deepcopy(model).float()))
    last = sorted((tmp_path / "new").glob("*.safetensors"))[-1]
    assert ("sharded" in case) == ("-of-" in last.name)
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{last.name} is not the file"):
        load(tmp_path / "new", variant=options.get("variant"))


def test_a_trainer_s_checkpoints_state_their_weights(folder, tmp_path):
    rows = [{"input_ids": INPUT[0], "start_positions": torch.tensor(1), "end_positions": torch.tensor(2)}] * 4
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(load(folder), arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    for out in (tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-2", tmp_path / "out"):
        assert states_its_weights(out)
        load(out)
    assert torch.equal(logits(load(tmp_path / "out")), logits(trainer.model.eval()))


def test_a_configuration_alone_states_none(folder, tmp_path):
    config = QuaLAMiniLMConfig.from_pretrained(folder)
    assert not any(name in field for name in CHECKSUMS for field in (vars(config), config.to_dict()))
    config.save_pretrained(tmp_path / "alone")
    assert not read_config(tmp_path / "alone").keys() & set(CHECKSUMS)
    model = load(folder)
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process" / "config.json").exists()


def test_the_shipped_model_states_its_weights():
    assert states_its_weights(ROOT) and read_config(ROOT)["architecture_sha256"]


PATHS = [{name: "abc"} for name in ("../a", "/a", "a/b", "a\\b", "..", "")]


@pytest.mark.parametrize("value", [True, 3, "abc", ["model.safetensors"], *PATHS])
def test_checksums_of_another_form_are_named(folder, value):
    write_config(folder, read_config(folder) | {"weights_sha256": value})
    with pytest.raises(ValueError, match="weights_sha256 in .*config.json is "):
        load(folder)


def test_an_encoder_without_a_head_still_trains(folder, tmp_path):
    QuaLAMiniLMModel.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(**sizes, num_hidden_layers=3)).save_pretrained(tmp_path / "bert")
    for name in ("ours", "bert"):
        model = load_model(tmp_path / name)
        assert logits(model).isfinite().all()
    scored = load_model(folder, significance="learned")  # scorers come new
    assert scored.bert.encoder.layer[0].scorer is not None


OTHER = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "type_vocab_size": 1,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "embedding_type": "roberta",
    "significance": "learned",
    "int8_weights": True,
}


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_a_legal_architecture_that_is_not_the_weights_is_refused(folder, name):
    """Half of these would load without a word, and answer nonsense."""
    (folder / "length_configs.json").unlink()
    fields = read_config(folder)
    write_config(folder, fields | {name: OTHER[name]})
    with pytest.raises(ValueError, match=f"architecture_sha256 is .*{name}.* changed after the weights were saved"):
        load(folder)
    del fields["architecture_sha256"]
    write_config(folder, fields | {name: OTHER[name]})
    assert getattr(QuaLAMiniLMConfig.from_pretrained(folder), name) == OTHER[name]  # it is legal


numbers = st.sampled_from([0, -1, 1, 2, 3, 2**31, 10**9, 10**30, -(10**9), 0.5, 1e308, -1e308, 5e-324])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | numbers | st.text(max_size=5)
any_json = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*read_config(ROOT), "length_presets"} - set(CHECKSUMS))
DELETED = object()


class Stored:
    """A folder, and what it held when it was whole."""

    def __init__(self, path):
        model = tiny_model()
        model.save_pretrained(path)
        self.path, self.logits = path, logits(model, length_config="full")
        self.config, self.presets = read_config(path), json.loads((path / "length_configs.json").read_text())

    def write(self, config=None, presets=None):
        """Writes both files, as given or whole."""
        write_config(self.path, self.config if config is None else config)
        (self.path / "length_configs.json").write_text(json.dumps(self.presets if presets is None else presets))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return Stored(tmp_path_factory.mktemp("stored"))


@given(st.sampled_from(FIELDS), st.just(DELETED) | any_json)
@examples
def test_a_changed_config_gives_the_same_model_or_names_the_field(stored, name, value):
    others = {field: stored.config[field] for field in stored.config if field != name}
    stored.write(others if value is DELETED else others | {name: value})
    try:
        model = load(stored.path)
    except (ValueError, OSError) as error:
        assert name in str(error)
    else:
        assert model.config.token_lengths("half")
        assert torch.equal(logits(model, length_config="full"), stored.logits)


@given(st.sampled_from(FIELDS), st.just(DELETED) | any_json)
@examples
def test_a_changed_config_without_checksums_is_legal_or_names_the_field(stored, name, value):
    others = {field: stored.config[field] for field in stored.config if field not in (name, *CHECKSUMS)}
    stored.write(others if value is DELETED else others | {name: value})
    try:
        config = QuaLAMiniLMConfig.from_pretrained(stored.path)
    except (ValueError, OSError) as error:
        assert name in str(error)
    else:
        assert config.macs("half") < config.macs("full") < 1e15


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 10**9},
        {"vocab_size": 10**12},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**5, "intermediate_size": 10**5},
        {"max_position_embeddings": 2**40},
        {"hidden_size": 10**400},
    ],
)
@pytest.mark.parametrize("int8", [False, True])
def test_huge_sizes_are_refused_before_anything_is_allocated(folder, sizes, int8):
    (folder / "length_configs.json").unlink()
    write_config(without_checksums(folder), read_config(folder) | sizes | {"int8_weights": int8})
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} .*expected"):
        load(folder)


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@given(st.data())
@examples
def test_changed_presets_are_legal_or_named(stored, data):
    presets, value = copy.deepcopy(stored.presets), data.draw(any_json)
    *way, last = (None, *data.draw(st.sampled_from(list(places(presets)))))
    if last is None:
        presets = {} if value is None else value
    else:
        parent = presets
        for key in way[1:]:
            parent = parent[key]
        parent[last] = value
    stored.write(presets=presets)
    try:
        model = load(stored.path)
    except ValueError as error:
        assert "preset" in str(error) or "num_hidden_layers" in str(error)
    else:
        for length_config in (*model.length_presets, {"max_macs": 1.0}):
            assert logits(model, length_config=length_config).isfinite().all()
        assert torch.equal(logits(model, length_config="full"), stored.logits)


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "is not valid JSON"),
        (b'{"num_hidden_layers": 3, "presets": {', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a":' * 100_000, "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"../other/length_configs.json", "is not valid JSON"),
        (b'"../other/length_configs.json"', "has no object 'presets'"),
        (b'{"num_hidden_layers": 3, "presets": "presets.json"}', "has no object 'presets'"),
        (b'{"num_hidden_layers": 3, "presets": {}, "presets": {}}', "'presets' stands twice"),
        (b'{"num_hidden_layers": 3, "presets": {"a": {"length_config": "../b"}}}', "preset 'a' is '../b'"),
        (b'{"num_hidden_layers": 3, "presets": {"a": "b.json"}}', "preset 'a' is 'b.json'"),
        (b'{"num_hidden_layers": 3, "presets": {"a": {"length_config": [1e400, 0.5, 0.5]}}}', "entry 0 of preset 'a'"),
        (b'{"num_hidden_layers": 3, "presets": {"a": {"length_config": [NaN, 0.5, 0.5]}}}', "entry 0 of preset 'a'"),
        (
            b'{"num_hidden_layers": 3, "presets": {"a": {"length_config": [2, 2, 2], "validation": {"f1": NaN}}}}',
            "validation f1 of preset 'a' is nan",
        ),
    ],
)
def test_presets_that_cannot_be_read_are_named(folder, content, complaint):
    (folder / "length_configs.json").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        load(folder)


@pytest.mark.parametrize("name", ["../half", "a/b", "/etc/passwd", "a\\b", "..", "C:half", "a\x00b", "a\nb", ""])
def test_presets_that_are_named_like_paths_are_refused(folder, name):
    content = {"num_hidden_layers": 3, "presets": {name: HALF["half"]}}
    (folder / "length_configs.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a preset's name is .*, expected no path"):
        load(folder)
    with pytest.raises(ValueError, match="a preset's name is "):
        tiny_config(length_presets={name: HALF["half"]})


def test_a_length_config_that_names_a_path_is_no_preset(folder):
    write_config(folder, read_config(folder) | {"length_config": "../other/length_configs.json"})
    with pytest.raises(ValueError, match="length_config is '../other/length_configs.json', which is no preset"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe\x00", b"[]", b"3", b"null", b'"config"'])
def test_a_config_that_is_no_object_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises((ValueError, OSError), match="config"):
        load(folder)
    with pytest.raises((ValueError, OSError), match="config"):
        QuaLAMiniLMConfig.from_pretrained(folder)


def test_weights_of_another_shape_are_refused_without_a_checksum_too(folder, weights):
    tensors = load_file(weights) | {"qa_outputs.bias": torch.zeros(3)}
    save_file(tensors, weights, metadata={"format": "pt"})
    without_checksums(folder)
    with pytest.raises(RuntimeError, match="mismatch"):  # transformers' own
        load(folder)
