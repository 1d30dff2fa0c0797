"""The graph in ONNX Runtime behind the model: when it answers, and when it must not."""

import contextlib
import copy
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForQuestionAnswering, pipeline

from conftest import ROOT, once, right_padded
from qualaminilm import engine_qualaminilm, graph_qualaminilm, quantization_qualaminilm
from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMEncoder, QuaLAMiniLMForQuestionAnswering
from tests.grid_steps import assert_possible

onnxruntime = pytest.importorskip("onnxruntime", reason="the engine runs in onnxruntime, which is not installed")

GRAPH = "onnx/model_int8.onnx"
CONFIGS = ("full", [1.0, 0.5, 0.2], [12, 9, 3], "half", {"max_macs": 0.9})


@pytest.fixture(autouse=True)
def attention_as_in_the_graph(monkeypatch):
    monkeypatch.setattr(quantization_qualaminilm, "attention_dtype", lambda *_: torch.float32)


@pytest.fixture(scope="session")
def folder(folder_with_graph):
    return folder_with_graph


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the folder, to change."""
    return shutil.copytree(folder, tmp_path / "own")


@pytest.fixture
def model(folder):
    return QuaLAMiniLMForQuestionAnswering.from_pretrained(folder)


@pytest.fixture(scope="session")
def in_layers(folder):
    return QuaLAMiniLMForQuestionAnswering.from_pretrained(folder, engine="torch")


@pytest.fixture
def twin(in_layers):
    """The model of the folder, in torch."""
    return copy.deepcopy(in_layers)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def batch(config, lengths=(31, 5, 1, 18), seed=0):
    input_ids, attention_mask = right_padded(config, lengths, seed)
    types = (torch.arange(input_ids.shape[1]) > 3).long().expand_as(input_ids)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": types}


@contextlib.contextmanager
def layers_run():
    """Within, a list that grows by one with each run of torch's layers."""
    runs, forward = [], QuaLAMiniLMEncoder.forward

    def counted(self, *args, **kwargs):
        runs.append(1)
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuaLAMiniLMEncoder, "forward", counted)
        yield runs


def in_torch(model, inputs, **kwargs):
    """Whether torch's layers compute a call, and what comes of it."""
    with layers_run() as runs:
        outputs = model(**inputs, **kwargs)
    return bool(runs), outputs


def by_hand(folder, inputs, entries):
    """What the graph says, out of a session of our own."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    return session.run(None, arrays | {"length_config": np.array(entries, np.float32)})


@pytest.mark.parametrize("length_config", CONFIGS, ids=str)
def test_a_call_for_logits_is_the_graphs(folder, model, length_config):
    inputs = batch(model.config)
    lengths = model.config.token_lengths(length_config)
    entries = [entry / 1000 for entry in lengths.entries] if lengths.relative else lengths.entries
    by_torch, outputs = in_torch(model, inputs, length_config=length_config)
    assert not by_torch
    np.testing.assert_array_equal([outputs.start_logits, outputs.end_logits], by_hand(folder, inputs, entries))
    assert outputs.start_logits.dtype == torch.float32 and outputs.loss is None
    found = model(**inputs, length_config=length_config, return_dict=False)
    assert isinstance(found, tuple) and torch.equal(found[1], outputs.end_logits)


def test_the_graph_computes_what_the_layers_do(model, twin):
    for length_config in ("full", [0.9, 0.6, 0.4]):
        inputs = batch(model.config, [31, 5, 18])
        found = [model(**inputs, length_config=length_config), twin(**inputs, length_config=length_config)]
        logits = [(outputs.start_logits, outputs.end_logits) for outputs in found]
        assert_possible(twin, inputs, length_config, *logits)


def test_batches_are_torch_s_where_the_processor_multiplies_bfloat16(folder, monkeypatch):
    few = batch(QuaLAMiniLMConfig.from_pretrained(folder), [31] * 16)
    many = {name: tensor.repeat(2, 1) for name, tensor in few.items()}
    for has_bfloat16 in (False, True):
        monkeypatch.setattr(engine_qualaminilm, "cpu_multiplies_bfloat16", lambda answer=has_bfloat16: answer)
        for engine in ("auto", "onnxruntime"):
            model = QuaLAMiniLMForQuestionAnswering.from_pretrained(folder, engine=engine)
            assert not in_torch(model, few)[0]
            assert in_torch(model, many)[0] == (has_bfloat16 and engine == "auto")


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": None},
        {"token_type_ids": None},
        {"attention_mask": torch.arange(31).expand(4, 31) < 20},
        {"attention_mask": (torch.arange(31).expand(4, 31) > 5).float() * 0.5},
        {"input_ids": torch.arange(4, 35, dtype=torch.int32).expand(4, 31)},
        {"token_type_ids": torch.ones(1, 31, dtype=torch.int64)},
    ],
    ids=str,
)
def test_inputs_as_the_layers_take_them(model, twin, change):
    inputs = batch(model.config) | change
    by_torch, outputs = in_torch(model, inputs)
    assert not by_torch
    expected = twin(**inputs)
    # A step of the int8 grid moves a logit of these weights by less than this, another meaning of the inputs by more.
    torch.testing.assert_close(outputs.start_logits, expected.start_logits, atol=0.3, rtol=0)
    assert not torch.allclose(model(**batch(model.config)).start_logits, expected.start_logits, atol=0.3, rtol=0)


def test_large_batches_run_in_parts(folder, model, monkeypatch):
    inputs = batch(model.config)
    monkeypatch.setattr(graph_qualaminilm, "AT_ONCE", 2 * 31)
    by_torch, outputs = in_torch(model, inputs)
    parts = [{name: tensor[[row]] for name, tensor in inputs.items()} for row in range(4)]
    start, end = (np.concatenate(each) for each in zip(*(by_hand(folder, part, [1.0] * 3) for part in parts)))
    assert not by_torch
    np.testing.assert_array_equal([outputs.start_logits, outputs.end_logits], [start, end])


@given(st.lists(st.integers(0, 400), min_size=1, max_size=40))
def test_rows_that_are_run_together_are_of_like_length(tokens):
    parts = list(graph_qualaminilm.of_like_number(np.array(tokens)))
    assert sorted(row for part in parts for row in part) == list(range(len(tokens)))
    for part in parts:
        real = [max(1, tokens[row]) for row in part]
        assert len(part) == 1 or len(part) * max(real) <= min(16 * 384, 1.125 * sum(real))


def test_rows_of_one_length_are_run_at_once():
    assert list(graph_qualaminilm.of_like_number(np.full(16, 384))) == [list(range(16))]
    assert list(graph_qualaminilm.of_like_number(np.array([30, 384, 380]))) == [[1, 2], [0]]


ELSE = {
    "position_ids": lambda inputs, model: {"position_ids": torch.arange(31)[None]},
    "inputs_embeds": lambda inputs, model: {"input_ids": None, "inputs_embeds": torch.zeros(4, 31, 24)},
    "labels": lambda inputs, model: {"start_positions": torch.zeros(4).long(), "end_positions": torch.ones(4).long()},
    "output_attentions": lambda inputs, model: {"output_attentions": True},
    "output_hidden_states": lambda inputs, model: {"output_hidden_states": True},
    "output_kept_tokens": lambda inputs, model: {"output_kept_tokens": True},
}


@pytest.mark.parametrize("asked", ELSE)
def test_what_else_is_asked_is_torchs(model, twin, asked):
    inputs = batch(model.config)
    inputs |= ELSE[asked](inputs, model)
    by_torch, outputs = in_torch(model, inputs)
    assert by_torch
    expected = twin(**inputs)
    assert outputs.keys() == expected.keys()
    assert torch.equal(outputs.start_logits, expected.start_logits)


def test_what_the_configuration_asks_is_torchs(model):
    model.config.output_hidden_states = True
    by_torch, outputs = in_torch(model, batch(model.config))
    assert by_torch and len(outputs.hidden_states) == 4


def test_gradients_are_torchs(model):
    inputs = batch(model.config)
    with torch.enable_grad():
        by_torch, outputs = in_torch(model, inputs)
        assert by_torch and outputs.start_logits.requires_grad
        model.requires_grad_(False)
        by_torch, outputs = in_torch(model, inputs)
        assert not by_torch
        model.qa_outputs.bias.requires_grad_()
        assert in_torch(model, inputs)[0]


@pytest.mark.parametrize("name", ["", "bert.encoder.layer.1", "bert.encoder.layer.2.attention.self.key", "qa_outputs"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_whoever_looks_on_sees_torch(model, name, kind):
    seen = []
    handle = getattr(model.get_submodule(name), kind)(lambda *_: seen.append(1))
    assert in_torch(model, batch(model.config))[0] and seen
    handle.remove()
    assert not in_torch(model, batch(model.config))[0]


@pytest.mark.parametrize("kind", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_whoever_looks_on_all_modules_sees_torch(model, kind):
    seen = set()
    handle = getattr(torch.nn.modules.module, kind)(lambda module, *_: seen.add(module))
    assert in_torch(model, batch(model.config))[0]
    handle.remove()
    # Of int8 layers too, whose inputs are rounded once for several.
    assert model.bert.encoder.layer[0].attention.self.key in seen
    assert not in_torch(model, batch(model.config))[0]


def test_a_function_in_the_place_of_forward_is_called(model):
    layer, calls = model.bert.encoder.layer[1], []
    forward = layer.forward
    layer.forward = lambda *args: calls.append(1) or forward(*args)
    assert in_torch(model, batch(model.config))[0] and calls


def test_dropout_that_somebody_turned_on_drops(model):
    inputs = batch(model.config)
    model.bert.embeddings.dropout.train()
    first, second = (in_torch(model, inputs) for _ in range(2))
    assert first[0] and not torch.equal(first[1].start_logits, second[1].start_logits)


def test_autocast_traces_and_compilers_see_torch(model):
    inputs = batch(model.config, [9])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_torch(model, inputs)[0]
    model.requires_grad_(False)
    with layers_run() as runs, contextlib.suppress(RuntimeError):  # packed int8 weights refuse to be constants
        torch.jit.trace(lambda ids: model(input_ids=ids).start_logits, inputs["input_ids"], check_trace=False)
    assert runs
    with layers_run() as runs:
        torch.compile(model, backend="eager")(**inputs)
    assert runs


def other_numbers(model):
    model.qa_outputs.bias.add_(1)


def loaded_numbers(model):
    key = model.bert.encoder.layer[0].attention.self.key
    key.load_state_dict(key.state_dict() | {"weight_scale": key.weight_scale.flip(0)})


def another_parameter(model):
    model.bert.embeddings.LayerNorm.weight = torch.nn.Parameter(torch.full((24,), 0.5))


def another_buffer(model):
    model.bert.encoder.layer[2].output.dense.bias = torch.ones(24)


def another_module(model):
    model.qa_outputs = torch.nn.Linear(24, 2)


def fewer_layers(model):
    model.bert.encoder.layer[1] = copy.deepcopy(model.bert.encoder.layer[0])


def floats(model):
    model.dequantize()


def half(model):
    model.half()


CHANGES = (other_numbers, loaded_numbers, another_parameter, another_buffer, another_module, fewer_layers, floats, half)


@pytest.mark.parametrize(
    "change, copied",
    [
        *((change, copied) for change in CHANGES for copied in ("not", "before")),
        *((other_numbers, copied) for copied in ("after", "pickled before", "pickled after")),
    ],
)
def test_other_weights_than_were_loaded_are_torchs(model, twin, change, copied):
    inputs = batch(model.config)
    torch.manual_seed(0)
    change(twin)
    expected = twin(**inputs).start_logits
    copies = copy.deepcopy if copied in ("before", "after") else lambda model: pickle.loads(pickle.dumps(model))
    if "before" in copied:
        model = copies(model)
    torch.manual_seed(0)
    change(model)
    if "after" in copied:
        model = copies(model)
    by_torch, outputs = in_torch(model, inputs)
    assert by_torch and torch.equal(outputs.start_logits, expected)


def test_functions_of_other_weights_leave_the_graph_to_the_loaded_ones(model):
    inputs = batch(model.config)
    before = model(**inputs).start_logits
    with layers_run() as runs:
        torch.func.functional_call(model, {"qa_outputs.bias": torch.ones(2)}, kwargs=inputs)
    assert runs
    by_torch, outputs = in_torch(model, inputs)
    assert not by_torch and torch.equal(outputs.start_logits, before)


@pytest.mark.parametrize("copies", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_answer_alike(model, copies):
    inputs = batch(model.config)
    expected = model(**inputs).start_logits
    copied = copies(model)
    by_torch, outputs = in_torch(copied, inputs)
    if copies is not copy.copy:  # which shares its modules with the first
        assert not by_torch
        other_numbers(copied)
    assert outputs.start_logits.numpy() == pytest.approx(expected.numpy(), abs=0.3)
    assert torch.equal(model(**inputs).start_logits, expected)


@pytest.mark.parametrize(
    "inputs, complaint",
    [
        ({"input_ids": torch.ones(2, 97).long()}, "the input is 97 tokens long"),
        ({"input_ids": torch.full((2, 9), 199)}, "index out of range"),
        ({"input_ids": torch.full((2, 9), -1)}, "index out of range"),
        ({"input_ids": torch.ones(2, 9).long(), "token_type_ids": torch.full((2, 9), 2)}, "index out of range"),
        ({"input_ids": torch.ones(2, 9).long(), "attention_mask": torch.ones(2, 8)}, "attention_mask has shape"),
        ({"input_ids": torch.ones(2, 9).long(), "length_config": [4, 3, 5]}, "entry 2 of length_config is 5"),
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(2, 9)}, "to have one of the following scalar types"),
    ],
)
def test_bad_inputs_are_named_as_ever(model, inputs, complaint):
    with pytest.raises((ValueError, IndexError, RuntimeError), match=complaint):
        model(**inputs)


def test_a_batch_of_no_rows(model, twin):
    nothing = torch.ones(0, 9).long()
    assert model(nothing).start_logits.shape == twin(nothing).start_logits.shape == (0, 9)


def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(engine_qualaminilm.logger, "warning_once", said.append)
    return said


def other_weights(folder):
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(folder)
    other_numbers(model)
    model.save_pretrained(folder)


def no_graph(folder):
    (folder / GRAPH).unlink()


def half_a_graph(folder):
    content = (folder / GRAPH).read_bytes()
    (folder / GRAPH).write_bytes(content[: len(content) // 2])


def nameless_graph(folder):
    fixed = ROOT / "tests" / "folders" / "export" / "model.onnx"
    shutil.copy(fixed, folder / GRAPH)


@pytest.mark.parametrize(
    "make, complaint, warned",
    [
        (other_weights, "was made from other weights than those beside it", True),
        (half_a_graph, "cannot be read", True),
        (nameless_graph, "was made from other weights than those beside it", True),
        (no_graph, f"has no {GRAPH}, or none that can be had now; python -m recipe.export", False),
    ],
)
def test_a_graph_that_is_not_of_these_weights(own, monkeypatch, make, complaint, warned):
    make(own)
    said = warnings(monkeypatch)
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(own)
    assert model.engine is None and in_torch(model, batch(model.config))[0]
    assert len(said) == warned and all(complaint in each for each in said)
    with pytest.raises(ValueError, match=f"engine is 'onnxruntime', but .*{complaint}"):
        QuaLAMiniLMForQuestionAnswering.from_pretrained(own, engine="onnxruntime")


@pytest.mark.parametrize(
    "changed",
    [
        {"num_hidden_layers": 2},
        {"layer_norm_eps": 1e-3},
        {"dtype": torch.float16},
        {"state_dict": "flipped"},
    ],
    ids=str,
)
def test_a_model_loaded_otherwise_than_it_is_stored_is_torchs(folder, monkeypatch, changed):
    if "state_dict" in changed:
        from safetensors.torch import load_file

        stored = load_file(folder / "model.safetensors")
        changed = {"state_dict": stored | {"qa_outputs.bias": stored["qa_outputs.bias"].flip(0)}}
    said = warnings(monkeypatch)
    source = None if "state_dict" in changed else folder
    config = QuaLAMiniLMForQuestionAnswering.config_class.from_pretrained(folder)
    extra = {"config": config} if source is None else {}
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(source, **changed, **extra)
    assert model.engine is None and said == []
    with pytest.raises(ValueError, match="engine is 'onnxruntime', but"):
        QuaLAMiniLMForQuestionAnswering.from_pretrained(source, engine="onnxruntime", **changed, **extra)


def test_weights_of_which_torch_counts_no_changes_are_torchs(model, twin):
    inputs = batch(model.config)
    with torch.inference_mode():
        copied = copy.deepcopy(model)
        assert copied.qa_outputs.bias.is_inference()
        other_numbers(copied)
        other_numbers(twin)
        by_torch, outputs = in_torch(copied, inputs)
        assert by_torch and torch.equal(outputs.start_logits, twin(**inputs).start_logits)


def test_a_graph_that_is_gone_after_the_load(own, monkeypatch):
    model = copy.deepcopy(QuaLAMiniLMForQuestionAnswering.from_pretrained(own))  # which has no session yet
    (own / GRAPH).unlink()
    said = warnings(monkeypatch)
    for _ in range(2):
        assert in_torch(model, batch(model.config))[0]
    assert len(said) == 1 and "cannot be read" in said[0]


def test_float_weights_and_unknown_engines_are_named(folder):
    with pytest.raises(ValueError, match="engine is 'onnxruntime', but the weights are floats"):
        QuaLAMiniLMForQuestionAnswering.from_pretrained(ROOT / "tests" / "folders" / "roberta", engine="onnxruntime")
    with pytest.raises(ValueError, match=r"engine is 'fast', expected one of \('auto', 'torch', 'onnxruntime'\)"):
        QuaLAMiniLMForQuestionAnswering.from_pretrained(folder, engine="fast")


def hub(path, folder):
    """A cache in which the Hub's me/tiny stands, as huggingface_hub lays it out."""
    commit = "0" * 40
    repository = path / "models--me--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return path


@pytest.mark.parametrize("fetched", [True, False])
def test_from_a_hub_id_without_network(folder, tmp_path, fetched):
    cache = hub(tmp_path, folder)
    if not fetched:
        next(cache.rglob("model_int8.onnx")).unlink()
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained("me/tiny", cache_dir=cache)
    assert in_torch(model, batch(model.config))[0] is not fetched


def test_without_onnxruntime_torch_answers_and_no_graph_is_fetched(folder, tmp_path, monkeypatch):
    cache, asked, stored_file = hub(tmp_path, folder), [], engine_qualaminilm.stored_file
    monkeypatch.setattr(engine_qualaminilm, "stored_file", lambda *a, **k: asked.append(a[1]) or stored_file(*a, **k))
    QuaLAMiniLMForQuestionAnswering.from_pretrained("me/tiny", cache_dir=cache)
    assert asked == [GRAPH]
    asked.clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = warnings(monkeypatch)
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained("me/tiny", cache_dir=cache)
    assert in_torch(model, batch(model.config))[0] and asked == said == []
    with pytest.raises(ValueError, match="engine is 'onnxruntime', but onnxruntime cannot be imported"):
        QuaLAMiniLMForQuestionAnswering.from_pretrained("me/tiny", cache_dir=cache, engine="onnxruntime")


def test_a_folder_saved_again_has_the_graph_while_it_is_of_its_weights(model, folder, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again = QuaLAMiniLMForQuestionAnswering.from_pretrained(tmp_path / "again", engine="onnxruntime")
    assert not in_torch(again, batch(model.config))[0]
    assert (tmp_path / "again" / GRAPH).read_bytes() == (folder / GRAPH).read_bytes()
    again.save_pretrained(tmp_path / "again")  # onto itself
    other_numbers(again)
    again.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / "onnx").exists()


def test_sessions_have_torchs_threads_and_none_of_them_spins(model):
    inputs, before = batch(model.config), torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            model(**inputs)
            options = [session.get_session_options() for session in model.engine.graph.sessions.values()]
            found = [each for each in options if each.intra_op_num_threads == threads]
            assert found and found[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"
    finally:
        torch.set_num_threads(before)


def test_threads_answer_at_once(folder):
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(folder)
    copied = copy.deepcopy(model)  # which has yet to make its session
    asked = [(batch(model.config, [20 + i]), length_config) for i in range(8) for length_config in ("full", "half")]

    def answer(question):
        inputs, length_config = question
        with torch.no_grad():
            return copied(**inputs, length_config=length_config).start_logits

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(answer, asked))
    for logits, (inputs, length_config) in zip(found, asked):
        assert torch.equal(logits, model(**inputs, length_config=length_config).start_logits)


def test_what_is_sent_to_a_spawned_process_answers(model):
    """Through the pickles of torch.multiprocessing, which put the weights into shared memory."""
    inputs = batch(model.config)
    expected = model(**inputs).start_logits
    sent = pickle.loads(ForkingPickler.dumps(model))
    for each in (sent, model):
        by_torch, outputs = in_torch(each, inputs)
        assert not by_torch and torch.equal(outputs.start_logits, expected)


FORKS = """
import multiprocessing, os, sys, torch
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering

def answer():
    with torch.inference_mode():
        return model(torch.arange(3, 40)[None], length_config="half").start_logits.tolist()

torch.set_num_threads(2)
model = QuaLAMiniLMForQuestionAnswering.from_pretrained(sys.argv[1], engine="onnxruntime")
first = answer()
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
with multiprocessing.get_context("fork").Pool(1) as pool:
    assert pool.apply(answer) == first
child = os.fork()
if not child:
    assert answer() == first and len(model.engine.graph.sessions) == 2
    sys.exit(7)  # as a server's worker ends: all that it holds is destroyed
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert answer() == first and len(model.engine.graph.sessions) == 1
print("answered")
"""


@once
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes fork here")
def test_forked_processes_answer_and_end(folder):
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", FORKS, folder],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["answered"], done.stderr


def test_through_transformers_own_loaders(folder):
    auto = AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=True)
    assert type(auto.engine).__name__ == "GraphEngine"
    assert AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=True, engine="torch").engine is None
    asked = {"question": "w5 w7 ?", "context": "w9 w11 w5 w20 w31 w8 ."}
    found = []
    for engine in ("onnxruntime", "torch"):
        qa = pipeline("question-answering", model=str(folder), trust_remote_code=True, model_kwargs={"engine": engine})
        assert (qa.model.engine is None) == (engine == "torch")
        found.append(qa(**asked))
    assert found[0].items() >= {name: found[1][name] for name in ("start", "end", "answer")}.items()
