import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# Empty at first: what an earlier version left in the user's own stood in for a file that was copied no more.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime from 1.29 on tells its maker what models it runs

import importlib.util
import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import transformers

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.kernels_qualaminilm import PAIR_LIMIT, attention_dtype, onednn_is_exact
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.data import load_tokenizer
from recipe.results import processor

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

CHROMIUM = shutil.which("chromium")
# Chromium's own traffic is off: no test is to wait for hosts that a closed network refuses.
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
TIMEOUT = 120  # seconds: a test that passes waits a small part of it, unless the machine is busy

once = pytest.mark.skipif(not TRANSFORMERS_5, reason="nothing here differs between the transformers lines")
trains = pytest.mark.skipif(not TRANSFORMERS_5, reason="the training recipes run on transformers 5")


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"])


def pytest_report_header():
    """Which versions and which of the int8 paths these tests run."""
    installed = {package.metadata["Name"]: package.version for package in metadata.distributions()}
    packages = [name for name in ("torch", "transformers", "onnxruntime", "openvino") if name in installed]
    exact = [pair for pair in (PAIR_LIMIT, 2 * 127) if onednn_is_exact(pair)]
    limits = [
        f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY") if name in os.environ
    ]
    return [
        "versions: " + ", ".join(f"{name} {installed[name]}" for name in packages),
        f"processor: {processor()} {' '.join(limits)}",
        f"int8: oneDNN's products are exact for neighbouring weights up to {max(exact, default='nothing')}, "
        f"attention is {attention_dtype(torch.device('cpu'))}",
    ]


@pytest.fixture(scope="session")
def validation_questions():
    """Validation questions of every training file, a `datasets.Dataset`; skips where the data is missing."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is missing")
    import datasets

    from recipe.data import read_questions

    names = (
        "squadshifts-new-wiki",
        "squadshifts-amazon-reviews",
        "squadshifts-reddit",
        "afriqa-en",
        "fairytaleqa-explicit",
    )
    return datasets.concatenate_datasets([read_questions(DATA / f"{name}.json", "validation") for name in names])


@pytest.fixture(scope="session")
def hundred_questions():
    """The committed validation questions, a `datasets.Dataset`."""
    from recipe.data import read_questions

    return read_questions(ROOT / "tests" / "hundred_questions.json")


@pytest.fixture(scope="session")
def folder_with_graph(tmp_path_factory):
    """A whole repository of tiny int8 weights and their graph."""
    path, stored = tmp_path_factory.mktemp("graph") / "int8", ROOT / "tests" / "folders" / "int8"
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(stored, engine="torch")
    model.config.length_presets["half"] = {"length_config": [0.5, 0.5, 0.5]}
    model.save_pretrained(path)
    load_tokenizer(stored).save_pretrained(path)
    if not importlib.util.find_spec("onnx"):
        pytest.skip("a graph is written with the onnx package, which is not installed")
    from recipe.export import export_beside_weights

    export_beside_weights(path)
    return path


@pytest.fixture(scope="module")
def browser():
    """Chromium, which pages are driven in."""
    if not CHROMIUM:
        pytest.skip("chromium is not installed; make test installs it as root where there is apt-get")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=TIMEOUT * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def tiny_config(**kwargs):
    """A configuration small enough to be computed by hand."""
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 66,
        "initializer_range": 0.4,
        "significance": "attention",
    }
    if kwargs.get("embedding_type") == "roberta":
        sizes |= {"pad_token_id": 1, "type_vocab_size": 1}
    return QuaLAMiniLMConfig(**(sizes | kwargs))


def right_padded(config, lengths, seed=0):
    """Random input_ids and attention_mask of rows of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return input_ids.masked_fill(attention_mask == 0, config.pad_token_id), attention_mask


def squad_file(path, articles):
    """A SQuAD file; `articles` maps a title to paragraphs, a paragraph being (context, [(question, [answers])])."""
    data = [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": context,
                    "qas": [
                        {
                            "id": f"{title}-{number}-{i}",
                            "question": question,
                            "answers": [{"text": text, "answer_start": context.index(text)} for text in answers],
                        }
                        for i, (question, answers) in enumerate(questions)
                    ],
                }
                for number, (context, questions) in enumerate(paragraphs)
            ],
        }
        for title, paragraphs in articles.items()
    ]
    path.write_text(json.dumps({"data": data}))
    return path


CITIES = ["Berlin", "Paris", "Nairobi", "Lima", "Oslo", "Hanoi", "Quito", "Accra"]


@pytest.fixture
def city_file(tmp_path):
    articles = {
        f"{name}-{i}": [
            (f"{name} lives in {city}. It is far from here.", [(f"Where does {name} live?", [city, f"in {city}"])])
        ]
        for name in ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn")
        for i, city in enumerate(CITIES)
    }
    return squad_file(tmp_path / "cities.json", articles)


@pytest.fixture
def city_windows(tmp_path, city_file, monkeypatch):
    """What recipe.windows writes of the cities, for the models of `tiny_folder`."""
    from recipe import windows

    folder = tmp_path / "windows"
    options = ["--model", tiny_folder(tmp_path / "tokenizer"), "--data", city_file, "--output_dir", folder]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["windows", *map(str, options)])
        windows.main()
    return folder


def run(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, check=True, capture_output=True, text=True
    )


def tiny_folder(path):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=30522, num_hidden_layers=2, hidden_dropout_prob=0.0, max_position_embeddings=64)
    model = QuaLAMiniLMForQuestionAnswering(config)
    for embeddings in model.bert.embeddings.children():
        if hasattr(embeddings, "weight"):
            torch.nn.init.normal_(embeddings.weight, std=1.0)
    model.save_pretrained(path)
    load_tokenizer(ROOT).save_pretrained(path)
    return path
