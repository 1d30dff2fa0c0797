import hashlib
import json
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    BertConfig,
    BertModel,
    GPT2Config,
    RobertaConfig,
    RobertaModel,
    pipeline,
)
from transformers.dynamic_module_utils import get_relative_imports

from conftest import ROOT, TRANSFORMERS_5, tiny_config, tiny_folder
from qualaminilm.configuration_qualaminilm import CODE_FILES, QuaLAMiniLMConfig, require_versions
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering, QuaLAMiniLMModel
from recipe.data import load_tokenizer

PAPER_CONFIGS = {(384,) * 6: 4.76e9, (315, 251, 242, 159, 142, 33): 2.55e9}


def presets(**configs):
    return {name: {"length_config": entries, "validation": {"f1": f1}} for name, (entries, f1) in configs.items()}


@given(st.integers(1, 1000), st.integers(0, 600))
def test_a_share_keeps_its_part_of_the_real_tokens_rounded_up(thousandths, n):
    kept = tiny_config().token_lengths([thousandths / 1000] * 3).kept(0, n)
    up = -(-thousandths * n // 1000)
    assert kept == min(n, max(2, up))


@pytest.mark.parametrize(
    "length_config, n, kept",
    [
        ((315, 251, 242), 384, [315, 251, 242]),
        ([315, 251, 242], 250, [250, 250, 242]),
        ([2, 2, 2], 1, [1, 1, 1]),
        ([0.5, 0.25, 0.001], 10, [5, 3, 2]),
        ([1.0, 0.6674, 0.3], 3, [3, 3, 2]),  # 0.667 of 3 is 2.001
        ([np.float32(0.5), np.float64(0.25), 0.25], 100, [50, 25, 25]),
        (np.array([7, 5, 3]).tolist(), 384, [7, 5, 3]),
        ("full", 384, [384, 384, 384]),
        (None, 384, [384, 384, 384]),
    ],
)
def test_legal_length_configs(length_config, n, kept):
    lengths = tiny_config().token_lengths(length_config)
    assert [lengths.kept(layer, n) for layer in range(3)] == kept


@pytest.mark.parametrize(
    "length_config, complaint",
    [
        ("quick", "'quick', which is no preset; the presets are 'full', 'half'"),
        ([4, 3], "has 2 entries, the model has 3 layers"),
        ([], "has 0 entries"),
        ([4, 3, 1], "entry 2 of length_config is 1, less than 2"),
        ([4, 3, 5], "entry 2 of length_config is 5, more than the entry before it, 3"),
        ([0.5, 0.6, 0.5], "entry 1 of length_config is 0.6, more than the entry before it, 0.5"),
        ([0.5, 0.5, 0.0], r"entry 2 of length_config is 0.0, not in \(0, 1\]"),
        ([0.5, 0.5, 0.0004], r"entry 2 of length_config is 0.0004, not in \(0, 1\]"),
        ([1.1, 0.5, 0.5], r"entry 0 of length_config is 1.1, not in \(0, 1\]"),
        ([float("nan"), 0.5, 0.5], "entry 0 of length_config is nan"),
        ([0.5, 2, 0.5], "entry 1 of length_config is 2, an int among floats"),
        ([4, 0.5, 2], "entry 1 of length_config is 0.5, a float among ints"),
        ([4, True, 2], "entry 1 of length_config is True, a bool"),
        ([True, True, True], "entry 0 of length_config is True, a bool"),
        ([4, "3", 2], "entry 1 of length_config is '3', a str"),
        ([None, 3, 2], "entry 0 of length_config is None, a NoneType"),
        (4, "length_config is 4, a int"),
        (True, "length_config is True, a bool"),
        ({4, 3, 2}, "a set"),
        ({"max_macs": 0}, "length_config is {'max_macs': 0}"),
        ({"max_macs": 1.5}, "length_config is {'max_macs': 1.5}"),
        ({"max_macs": True}, "length_config is {'max_macs': True}"),
        ({"max_macs": "0.5"}, "length_config is {'max_macs': '0.5'}"),
        ({"macs": 0.5}, "length_config is {'macs': 0.5}"),
        ({}, "length_config is {}"),
        ({"max_macs": 0.1}, "the cheapest preset, 'half', has a MACs share of 0.512"),
    ],
)
def test_illegal_length_configs_are_named(length_config, complaint):
    config = tiny_config(length_presets=presets(half=([0.5, 0.5, 0.5], 80)))
    with pytest.raises(ValueError, match=complaint) as raised:
        config.token_lengths(length_config)
    assert "Accepted: a preset's name, one int >= 2 a layer" in str(raised.value) or "cheapest" in str(raised.value)


def test_max_macs_picks_the_best_preset_that_is_cheap_enough():
    config = tiny_config(
        length_presets=presets(
            large=([0.9] * 3, 85), medium=([0.5] * 3, 80), odd=([0.4] * 3, 82), small=([0.2] * 3, 60)
        )
    )
    shares = {name: config.macs_share(name) for name in config.length_presets}
    for limit, best in ((0.95, "large"), (shares["medium"], "odd"), (shares["small"], "small")):
        assert config.token_lengths({"max_macs": limit}) == config.token_lengths(best)


def test_max_macs_that_allow_for_full_pick_it():
    """Nothing dropped is what the others are measured against: that one of them is better on validation is noise."""
    better = presets(full=([1.0] * 3, 79.4), accurate=([0.9] * 3, 79.5))
    assert tiny_config(length_presets=better).token_lengths({"max_macs": 1.0}).entries == (1000, 1000, 1000)
    assert tiny_config(length_presets=better).token_lengths({"max_macs": 0.999}).entries == (900, 900, 900)


def test_max_macs_spend_most_where_not_all_were_measured():
    some = presets(large=([0.9] * 3, None), small=([0.5] * 3, 80))
    del some["large"]["validation"]
    assert tiny_config(length_presets=some).token_lengths({"max_macs": 0.95}).entries == (900, 900, 900)


@pytest.mark.parametrize("length_config, macs", PAPER_CONFIGS.items())
def test_macs_by_formula_are_the_paper_s(length_config, macs):
    config = QuaLAMiniLMConfig(significance="attention")
    assert config.macs(length_config) == pytest.approx(macs, rel=0.002)
    assert config.macs("full") == 6 * (4 * 384 * 384**2 + 2 * 384**3 + 2 * 384 * 384 * 1536)


def test_macs_of_learned_significance_by_hand():
    config = tiny_config(significance="learned")  # d 16, d_ff 24
    by_hand = 0
    for n_in, n_out in ((10, 5), (5, 4), (4, 2)):
        by_hand += 2 * n_in * 16 * 16 + 2 * n_out * 16 * 16 + 2 * n_in * n_out * 16 + 2 * n_out * 16 * 24
    assert config.macs([5, 4, 2], n=10) == by_hand


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="significance is 'magic', expected one of"):
        QuaLAMiniLMConfig(significance="magic")
    with pytest.raises(ValueError, match="embedding_type is 'gpt'"):
        QuaLAMiniLMConfig(embedding_type="gpt")
    with pytest.raises(ValueError, match=r"preset 'full' is \[0.5, 0.5, 0.5\]"):
        tiny_config(length_presets=presets(full=([0.5] * 3, 80)))
    with pytest.raises(ValueError, match=r"hidden_size \(10\) is not a multiple of num_attention_heads \(3\)"):
        QuaLAMiniLMConfig(hidden_size=10, num_attention_heads=3)
    with pytest.raises(ValueError, match="config.model_type is 'gpt2'"):
        QuaLAMiniLMConfig.from_transformers(GPT2Config())
    config = BertConfig()
    config.position_embedding_type = "relative_key"
    with pytest.raises(ValueError, match="position_embedding_type is 'relative_key'"):
        QuaLAMiniLMConfig.from_transformers(config)


def test_from_transformers_takes_every_size():
    config = RobertaConfig(
        vocab_size=77, hidden_size=24, num_hidden_layers=5, num_attention_heads=3, pad_token_id=1, layer_norm_eps=1e-5
    )
    ours = QuaLAMiniLMConfig.from_transformers(config)
    assert ours.embedding_type == "roberta"
    assert (ours.vocab_size, ours.hidden_size, ours.num_hidden_layers, ours.num_attention_heads) == (77, 24, 5, 3)
    assert (ours.pad_token_id, ours.layer_norm_eps, ours.significance) == (1, 1e-5, "attention")


def save(folder, **kwargs):
    model = QuaLAMiniLMForQuestionAnswering(tiny_config(**kwargs))
    model.save_pretrained(folder)
    return model


def test_a_saved_folder_is_a_complete_repository(tmp_path):
    half = presets(half=([0.5, 0.5, 0.25], 80))
    save(tmp_path, length_presets=half, length_config="half")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "length_configs.json", "pipeline_qualaminilm.py"} < names
    assert not [name for name in names if name.endswith(".unfinished")]
    config = json.loads((tmp_path / "config.json").read_text())
    assert "length_presets" not in config and config["dtype"] == "float32"
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.length_presets == ["full", "half"]
    assert loaded.config.token_lengths() == loaded.config.token_lengths([0.5, 0.5, 0.25])
    # And again from the class that transformers copied to its cache.
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert {path.name for path in again.iterdir()} == names
    assert json.loads((again / "length_configs.json").read_text())["presets"]["half"] == half["half"]
    assert AutoConfig.from_pretrained(again, trust_remote_code=True, length_config=None).length_config == "half"
    config = AutoConfig.from_pretrained(again, trust_remote_code=True, length_config="full")
    assert config.length_config == "full"
    assert config.auto_map["AutoConfig"] == "configuration_qualaminilm.QuaLAMiniLMConfig"


def test_length_config_at_load(tmp_path):
    save(tmp_path)
    for wanted in ([4, 3, 2], "full", {"max_macs": 1.0}):
        model = AutoModelForQuestionAnswering.from_pretrained(tmp_path, trust_remote_code=True, length_config=wanted)
        assert model.config.length_config == wanted
    shallow = AutoModelForQuestionAnswering.from_pretrained(tmp_path, trust_remote_code=True, num_hidden_layers=2)
    assert shallow.config.token_lengths().entries == (1000, 1000)
    with pytest.raises(ValueError, match="entry 2 of length_config is 1"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path, trust_remote_code=True, length_config=[4, 3, 1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_precision_file_loads_as_float32(tmp_path, dtype):
    model = save(tmp_path).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float())
    half = AutoModelForQuestionAnswering.from_pretrained(tmp_path, trust_remote_code=True, dtype=dtype)
    assert half.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "is not valid JSON"),
        ("[]", "has no object 'presets'"),
        ('{"num_hidden_layers": 3, "presets": []}', "has no object 'presets'"),
        ('{"num_hidden_layers": 4, "presets": {}}', "num_hidden_layers is 4 in .*, 3 in config.json"),
        (
            '{"num_hidden_layers": 3, "presets": {"fast": {}}}',
            "preset 'fast' is {}, expected a dict with a 'length_config'",
        ),
        (
            '{"num_hidden_layers": 3, "presets": {"fast": {"length_config": [2, 2, 9]}}}',
            "entry 2 of preset 'fast' is 9",
        ),
    ],
)
def test_a_broken_presets_file_is_named_at_load(tmp_path, content, complaint):
    save(tmp_path)
    (tmp_path / "length_configs.json").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path, trust_remote_code=True, length_config="fast")


@pytest.mark.parametrize("kind", [AutoConfig, AutoModelForQuestionAnswering])
def test_what_was_loaded_from_a_folder_that_is_gone_is_saved_whole(tmp_path, kind):
    """Through transformers' own loader, which copies of a repository's code what it believes is needed."""
    other, source, out = tmp_path / "other" / tmp_path.name, tmp_path / tmp_path.name, tmp_path / "out"
    for folder, comment in ((other, "# another version"), (source, "# this version")):
        tiny_folder(folder)
        path = folder / "pipeline_qualaminilm.py"
        path.write_text(path.read_text() + comment + "\n")
    code = {name: (source / name).read_text() for name in CODE_FILES}
    # transformers 4.57 copies folders of one name to one place.
    AutoModelForQuestionAnswering.from_pretrained(other, trust_remote_code=True)
    pipeline("question-answering", model=str(other), trust_remote_code=True)
    loaded = kind.from_pretrained(source, trust_remote_code=True)
    shutil.rmtree(source)
    loaded.save_pretrained(out)
    assert {name: (out / name).read_text() for name in CODE_FILES} == code
    if kind is AutoModelForQuestionAnswering:
        load_tokenizer(ROOT).save_pretrained(out)
        qa = pipeline("question-answering", model=str(out), trust_remote_code=True)
        assert qa(question="Where does Ann live?", context="Ann lives in Oslo.")["answer"]
        ids = torch.arange(9)[None]
        assert torch.equal(qa.model(ids).start_logits, loaded.eval()(ids).start_logits)


def test_the_code_imports_itself_in_no_circle():
    """Which transformers before 4.57 follows for ever, instead of importing what says that it is too old."""
    assert {path.name for path in ROOT.glob("*_qualaminilm.py")} == {*CODE_FILES}
    imports = {name: [f"{each}.py" for each in get_relative_imports(ROOT / name)] for name in CODE_FILES}
    assert {*TopologicalSorter(imports).static_order()} == {*CODE_FILES}
    # What runs before it has said so imports no package of another version.
    assert sorted(imports["configuration_qualaminilm.py"]) == ["files_qualaminilm.py", "length_configs_qualaminilm.py"]
    assert imports["files_qualaminilm.py"] == ["length_configs_qualaminilm.py"]
    assert imports["length_configs_qualaminilm.py"] == []


def test_length_configs_need_no_package():
    """What runs the exported graph reads them without torch and transformers."""
    script = (
        "import sys\n"
        "from qualaminilm.length_configs_qualaminilm import LengthConfigs, read_presets\n"
        "class Sizes(LengthConfigs):\n"
        "    num_hidden_layers, hidden_size, intermediate_size, significance = 6, 384, 1536, 'learned'\n"
        "    length_config = None\n"
        "sizes = Sizes()\n"
        "sizes.length_presets = sizes.checked_presets(read_presets('length_configs.json', 6))\n"
        "print(sizes.token_lengths({'max_macs': 0.5}).entries, sizes.macs('full'))\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-Sc", script], cwd=ROOT, capture_output=True, text=True, check=True)
    config = QuaLAMiniLMConfig.from_pretrained(ROOT)
    answer, imported = done.stdout.splitlines()
    assert answer == f"{config.token_lengths({'max_macs': 0.5}).entries} {config.macs('full')}"
    assert imported == "['__main__', 'qualaminilm']"


def test_code_that_is_missing_is_named_before_anything_is_written(tmp_path):
    save(tmp_path / tmp_path.name)
    (tmp_path / tmp_path.name / "pipeline_qualaminilm.py").unlink()
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / tmp_path.name, trust_remote_code=True)
    for saved in (model, model.config):
        with pytest.raises(FileNotFoundError, match="pipeline_qualaminilm.py is neither in .* nor in "):
            saved.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(monkeypatch):
    """A Hub that keeps the files of every commit: a list of name -> bytes."""
    commits = []

    def create_commit(*args, operations, **kwargs):
        commits.append({each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations})

    def create_repo(*args, **kwargs):
        return SimpleNamespace(repo_id="me/tiny")

    # Newer transformers ask an object, older ones functions, 5.0 some of its own names for them.
    for where in (HfApi, transformers.utils.hub, transformers.modeling_utils, transformers.configuration_utils):
        monkeypatch.setattr(where, "create_commit", create_commit, raising=False)
        monkeypatch.setattr(where, "create_repo", create_repo, raising=False)
    monkeypatch.setattr(transformers.utils.hub.ModelCard, "load", lambda *args, **kwargs: ModelCard("---\n---\n"))
    return commits


@pytest.mark.parametrize("again", [False, True])
def test_what_is_pushed_is_what_is_saved(tmp_path, hub, again):
    if again:  # over a folder that holds another model's files
        save(tmp_path / "tiny")
    torch.manual_seed(1)
    model = QuaLAMiniLMForQuestionAnswering(tiny_config())
    model.save_pretrained(str(tmp_path / "tiny"), push_to_hub=True)
    model.push_to_hub("me/tiny")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir() if path.name != "README.md"}
    assert json.loads(saved["config.json"])["weights_sha256"] == {
        "model.safetensors": hashlib.sha256(saved["model.safetensors"]).hexdigest()
    }
    assert set(saved) >= {"length_configs.json", *CODE_FILES}
    for pushed in hub:
        pushed.pop("README.md", None)
        assert pushed == {name: saved[name] for name in pushed}
        assert again or pushed == saved
        assert {"config.json", "model.safetensors"} <= set(pushed)
    assert len(hub) == 2


def test_a_configuration_is_pushed_whole(tmp_path, hub):
    config = tiny_config(length_presets=presets(half=([0.5] * 3, 80)))
    config.save_pretrained(str(tmp_path / "tiny"), push_to_hub=True)
    config.push_to_hub("me/tiny")
    for pushed in hub:
        assert set(pushed) >= {"config.json", "length_configs.json", *CODE_FILES}
        assert json.loads(pushed["length_configs.json"])["presets"]["half"]
    assert len(hub) == 2


@pytest.mark.parametrize(
    "torch_version, transformers_version, complaint",
    [
        ("2.8.0", "4.57.0", None),
        ("2.8.0a0+5228986c39.nv25.6", "5.0.0rc1", None),
        ("2.13.0+cpu", "5.23.0", None),
        ("10.0", "10.0.dev0", None),
        (None, "5.0.0", None),
        ("2.7.1", "5.0.0", "found torch 2.7.1 and transformers 5.0.0"),
        ("1.13.1", "4.57.6", "found torch 1.13.1 and transformers 4.57.6"),
        ("2.13.0", "4.56.2", "found torch 2.13.0 and transformers 4.56.2"),
        ("2.6.0+cu124", "4.9.0", r"found torch 2.6.0\+cu124 and transformers 4.9.0"),
    ],
)
def test_too_old_versions_are_named(torch_version, transformers_version, complaint):
    if complaint is None:
        require_versions(torch=torch_version, transformers=transformers_version)
        return
    floors = "QuaLA-MiniLM needs torch 2.8 or newer and transformers 4.57 or newer; "
    with pytest.raises(ImportError, match=floors + complaint):
        require_versions(torch=torch_version, transformers=transformers_version)


def test_old_transformers_are_named_by_whatever_loads_a_folder(tmp_path, monkeypatch):
    save(tmp_path / tmp_path.name)
    monkeypatch.setattr(transformers, "__version__", "4.49.0")
    for kind in (AutoConfig, AutoModelForQuestionAnswering):
        with pytest.raises(ImportError, match="transformers 4.57 or newer; found torch .* and transformers 4.49.0"):
            kind.from_pretrained(tmp_path / tmp_path.name, trust_remote_code=True)


def test_a_folder_of_the_other_transformers_line_loads(tmp_path):
    """The two lines' environments stand side by side; each reads what the other wrote, logits and all."""
    other = ROOT / (".venv-4" if TRANSFORMERS_5 else ".venv") / "bin" / "python"
    if not other.exists():
        pytest.skip(f"{other} is missing")
    script = (
        "import sys, torch; sys.path[:0] = ['.', 'tests']\n"
        "from conftest import tiny_config\n"
        "from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering as Model\n"
        "model = Model(tiny_config(length_presets={'half': {'length_config': [.5, .5, .5]}})).eval()\n"
        f"model.half().save_pretrained({str(tmp_path)!r})\n"
        "logits = model.float()(torch.arange(9)[None], length_config='half').start_logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits')!r})"
    )
    subprocess.run([other, "-c", script], cwd=ROOT, check=True, capture_output=True)
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.dtype == torch.float32
    expected = torch.load(tmp_path / "logits", weights_only=True)
    torch.testing.assert_close(model(torch.arange(9)[None], length_config="half").start_logits, expected)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("significance", ["attention", "learned"])
@pytest.mark.parametrize("length_config", ["full", [0.9, 0.5, 0.2], (40, 11, 7)])
def test_macs_by_formula_are_what_torch_counts(family, significance, length_config):
    n = 50
    config = tiny_config(embedding_type=family, significance=significance)
    kept = [config.token_lengths(length_config).kept(layer, n) for layer in range(3)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if significance == "learned":
            # Asked for its maps, attention is computed in products that torch counts.
            model = QuaLAMiniLMModel(config).eval()
            model(torch.arange(3, 3 + n)[None], length_config=length_config, output_attentions=True)
        else:
            # Our model skips the output projection of what it drops; BERT's own layers skip nothing.
            layers = (BertModel if family == "bert" else RobertaModel)(twin_config(config)).encoder.layer
            for layer, n_in, n_out in zip(layers, [n, *kept], kept):
                attended = layer.attention(torch.zeros(1, n_in, config.hidden_size))[0][:, :n_out]
                layer.output(layer.intermediate(attended), attended)
    flops = counter.get_total_flops()
    if significance == "learned":
        features, heads, size, reach = config.hidden_size // 12, 4, 8, 33
        for scored in (n_in for n_in, n_out in zip([n, *kept], kept) if n_out < n_in):
            dense = config.hidden_size * (features + heads * (size + 1))
            flops -= 2 * scored * (dense + heads * size * scored + (features + heads) * 2)
            flops -= 2 * (scored + -scored % 16) * (features + heads) * reach  # zeros are added up to 16 slots
    assert flops == 2 * config.macs(length_config, n)


def twin_config(config):
    """transformers' configuration of the same sizes."""
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
    kind = BertConfig if config.embedding_type == "bert" else RobertaConfig
    return kind(**{name: getattr(config, name) for name in names.split()}, attn_implementation="eager")
