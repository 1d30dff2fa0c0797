"""The reader answers as the pipeline does, with less installed."""

import copy
import importlib.util
import io
import json
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, once
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from recipe.data import load_tokenizer

pytest.importorskip("onnxruntime", reason="the reader runs in onnxruntime, which is not installed")

LINES = [
    "My name is Wolfgang and I live in Berlin. It is nice here, really.",
    "Bob moved to Lima in 1997, and wrote a letter to anna@post.org about it.",
    "The boats lie still, the nets are dry, and nobody is in a hurry.",
]
SHORT, LONG = LINES[0], " ".join(LINES * 4)
QUESTIONS = ["Where do I live?", "Who wrote the letter?", "When did Bob move?"]


@pytest.fixture(scope="module")
def module(folder_with_graph):
    """reader.py, as it is imported out of a folder that was saved."""
    found = importlib.util.spec_from_file_location("reader", folder_with_graph / "reader.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reader(module, folder_with_graph):
    return module.Reader(folder_with_graph, threads=1)


@pytest.fixture(scope="module")
def qa(folder_with_graph):
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(folder_with_graph, engine="onnxruntime")
    return QuestionAnsweringPipeline(model=model, tokenizer=load_tokenizer(folder_with_graph))


@pytest.fixture
def own(folder_with_graph, tmp_path):
    """A copy of the folder, to change."""
    return shutil.copytree(folder_with_graph, tmp_path / "own")


def set_threshold(folder, threshold):
    """Has its model answer only what has so much evidence, in log units."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"no_answer_threshold": threshold}))


def close(answers):
    """Answers with scores as they are to be compared: the reader's and the pipeline's batches may differ in threads."""
    if isinstance(answers, list):
        return [close(each) for each in answers]
    return {name: pytest.approx(each, rel=1e-4) if name != "answer" else each for name, each in answers.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 3},
        {"length_config": "half"},
        {"length_config": {"max_macs": 0.9}, "top_k": 2},
        {"length_config": [9, 6, 4]},
        {"max_seq_len": 40, "doc_stride": 10, "top_k": 4},
        {"max_answer_len": 3, "align_to_words": False},
        {"handle_impossible_answer": True, "no_answer_threshold": 3.0, "top_k": 2, "return_answerable": True},
        {"max_question_len": 2, "batch_size": 1},
        {"top_k": None, "max_answer_len": None, "align_to_words": None, "handle_impossible_answer": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("context", [SHORT, LONG], ids=["short", "long"])
def test_answers_are_the_pipelines(reader, qa, options, context):
    options = {"max_seq_len": 90, **options}
    for question in QUESTIONS:
        expected = qa(question=question, context=context, **options)
        assert reader(question, context, **options) == close(expected)


def test_forms_of_asking(reader, qa):
    asked = [{"question": question, "context": SHORT} for question in QUESTIONS]
    expected = qa(asked)
    assert reader(asked) == close(expected)
    assert reader(asked[0]) == reader(**asked[0]) == close(expected[0])
    assert reader(asked[:1]) == close(expected[:1])
    stream = reader(each for each in [*asked, {"question": "", "context": SHORT}])
    assert [next(stream) for _ in asked] == close(expected)
    with pytest.raises(ValueError, match="row 3: `question` cannot be empty"):
        next(stream)


@pytest.mark.parametrize(
    "asked, options",
    [
        ({"question": "Where?", "context": None}, {}),
        ({"question": "Where?", "context": "  "}, {}),
        ({"question": "Where?", "context": b"text"}, {}),
        ({"question": "Where?", "context": "\ud800"}, {}),
        ({"question": "Where?"}, {}),
        ([{"question": "Where?", "context": SHORT}, {"question": " ", "context": SHORT}], {}),
        ([{"question": "Where?", "context": SHORT}, {"question": "Where? " * 99, "context": SHORT}], {}),
        ({"question": "Where?", "context": SHORT}, {"top_k": 0}),
        ({"question": "Where?", "context": SHORT}, {"batch_size": True}),
        ({"question": "Where?", "context": SHORT}, {"max_seq_len": 400, "doc_stride": 500}),
        ({"question": "Where?", "context": LONG}, {"max_seq_len": 400}),
        ({"question": "Where?", "context": SHORT}, {"no_answer_threshold": "0"}),
        ({"question": "Where?", "context": SHORT}, {"handle_impossible_answer": "false"}),
        (5, {}),
        (b"text", {}),
        ({"question": "Where?", "context": SHORT}, {"length_config": "quick"}),
        ({"question": "Where?", "context": SHORT}, {"length_config": [0.5, 0.6, 0.5]}),
        ({"question": "Where?", "context": SHORT}, {"length_config": {"max_macs": 0.001}}),
    ],
    ids=str,
)
def test_faults_are_the_pipelines(reader, qa, asked, options):
    with pytest.raises((ValueError, KeyError)) as expected:
        qa(asked, **options)
    with pytest.raises(expected.type) as found:
        reader(asked, **options)
    assert str(found.value) == str(expected.value)
    if isinstance(asked, list):
        assert found.value.answers == close(expected.value.answers)
        # Where it is found after the model has run, the first row is answered.
        assert len(found.value.answers) == (len(asked[1]["question"]) > 99)


def test_a_length_config_of_its_own(module, folder_with_graph, qa):
    reader = module.Reader(folder_with_graph, length_config="half", threads=1)
    expected = qa(question=QUESTIONS[0], context=SHORT, length_config="half")
    assert reader(QUESTIONS[0], SHORT) == close(expected) != close(qa(question=QUESTIONS[0], context=SHORT))
    assert reader.macs_share() < 0.6 and list(reader.length_presets) == ["full", "fast", "half"]
    with pytest.raises(ValueError, match="'quick', which is no preset"):
        module.Reader(folder_with_graph, length_config="quick")


def test_a_tokenizer_that_truncates_on_the_left(module, own):
    path = own / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation_side": "left"}))
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(own, engine="onnxruntime")
    qa = QuestionAnsweringPipeline(model=model, tokenizer=load_tokenizer(own))
    options = {"max_seq_len": 50, "top_k": 3}
    assert module.Reader(own)(QUESTIONS[1], LONG, **options) == close(qa(QUESTIONS[1], LONG, **options))


def test_what_is_missing_is_named(module, own, monkeypatch):
    graph = own / "onnx" / "model_int8.onnx"
    other = shutil.move(graph, own / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"model_int8.onnx is missing: python -m recipe.export --model .*own"):
        module.Reader(own)
    stored = (own / "config.json").read_text()
    (own / "config.json").write_text(json.dumps(json.loads(stored) | {"int8_weights": False}))
    with pytest.raises(FileNotFoundError, match="the weights are floats: python -m recipe.quantize stores"):
        module.Reader(own)
    (own / "config.json").write_text(stored)
    graph.write_bytes(b"no graph")
    with pytest.raises(ValueError, match="model_int8.onnx cannot be read"):
        module.Reader(own)
    shutil.move(other, graph)
    config = json.loads((own / "config.json").read_text())
    for change, complaint in (
        ({"weights_sha256": {"model.safetensors": "0" * 64}}, "was made from other weights than .*config.json states"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3', expected an int above 0"),
        ({"length_config": "quick"}, "'quick', which is no preset"),
        ({"no_answer_threshold": "2"}, "no_answer_threshold is '2', expected None or a finite number"),
        ({"answerable_calibration": [1.0]}, "answerable_calibration is .*, expected None or a list of two"),
    ):
        (own / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=complaint):
            module.Reader(own)
    (own / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no 'num_hidden_layers'"):
        module.Reader(own)
    (own / "config.json").write_text("[")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        module.Reader(own)
    (own / "config.json").write_text(json.dumps(config))
    tokenizer = (own / "tokenizer.json").read_text()
    (own / "tokenizer.json").write_text(tokenizer[:99])
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer: "):
        module.Reader(own)
    (own / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        module.Reader(own)
    (own / "tokenizer.json").write_text(tokenizer)
    assert module.Reader(own)(QUESTIONS[0], SHORT)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="onnxruntime cannot be imported"):
        module.Reader(own)


def test_a_folder_that_was_named_relatively(module, own, monkeypatch, tmp_path):
    """A copy has no session yet, and makes one where the process stands by then."""
    monkeypatch.chdir(own)
    reader = module.Reader(".", threads=1)
    monkeypatch.chdir(tmp_path)
    assert copy.deepcopy(reader)(QUESTIONS[0], SHORT) == reader(QUESTIONS[0], SHORT)
    shutil.rmtree(own)
    with pytest.raises(ValueError, match="model_int8.onnx cannot be read"):
        copy.deepcopy(reader)(QUESTIONS[0], SHORT)


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_as_a_command(module, own, qa, tmp_path, monkeypatch, capsys, source):
    text = SHORT.replace(" ", "\n", 3)
    (tmp_path / "text").write_text(text)
    set_threshold(own, -1000.0)
    options = ["--question", QUESTIONS[0], "--model", str(own), "--length_config", "half"]
    monkeypatch.setattr(sys, "argv", ["reader.py", *options, *[str(tmp_path / "text")] * (source == "file")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    module.main()
    answer = qa(question=QUESTIONS[0], context=text, length_config="half")["answer"]
    assert capsys.readouterr().out == " ".join(answer.split()) + "\n"
    (tmp_path / "text").write_bytes(b"\xff")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(SystemExit, match="reader.py: 'utf-8' codec can't decode"):
        module.main()


def test_as_a_command_it_says_that_a_text_has_no_answer(module, own, tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text(SHORT)
    set_threshold(own, 1000.0)
    monkeypatch.setattr(sys, "argv", ["reader.py", "--question", "Who?", "--model", str(own), str(tmp_path / "text")])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 1
    assert capsys.readouterr().out == "Not in this text.\n"


@once
def test_neither_torch_nor_transformers_is_needed(folder_with_graph, reader, tmp_path):
    script = (
        "import runpy, sys\n"
        "before = set(sys.modules)\n"  # what a package of the environment has every process import
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"sys.argv = ['reader.py', '--question', {QUESTIONS[0]!r}]\n"
        f"runpy.run_path({str(folder_with_graph / 'reader.py')!r}, run_name='__main__')\n"
        "imported = {name for name in set(sys.modules) - before if sys.modules[name]}\n"
        "names = {name.partition('.')[0] for name in imported} - set(sys.stdlib_module_names)\n"
        "print(*sorted(name for name in names if not name.startswith(('_', 'qualaminilm'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, input=SHORT, capture_output=True, text=True, check=True
    )
    answer, packages = done.stdout.splitlines()
    assert answer == reader(QUESTIONS[0], SHORT)["answer"]
    assert packages == "numpy onnxruntime tokenizers"


def test_the_reader_is_carried_with_the_weights(folder_with_graph):
    assert (folder_with_graph / "reader.py").read_text() == (ROOT / "reader.py").read_text()
