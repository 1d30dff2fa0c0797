"""One model in threads and processes, copied, cast and compiled."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from conftest import ROOT, once, right_padded
from qualaminilm.kernels_qualaminilm import FloatKernel, OneDNNKernel
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from tests.test_documents import block
from tests.test_quantization import int8_model, random_linear

QUESTION = "Where do I live?"
CONTEXT = "My name is Wolfgang and I live in Berlin. It is nice here, really."
LENGTH_CONFIGS = ["full", "fastest", [40, 30, 20, 10, 8, 6], [0.9, 0.8, 0.5, 0.4, 0.3, 0.2], {"max_macs": 0.5}]


def load(kind):
    """A pipeline around a model that nobody has called yet: the shipped one, or a small one of floats or int8."""
    if kind == "shipped":
        model = QuaLAMiniLMForQuestionAnswering.from_pretrained(ROOT, engine="torch").eval()
    else:
        presets = {"fastest": {"length_config": [0.5, 0.4, 0.3, 0.2, 0.2, 0.1]}}
        sizes = {"vocab_size": 30522, "num_hidden_layers": 6, "max_position_embeddings": 512}
        model = int8_model(length_presets=presets, **sizes)[kind == "int8"]
    tokenizer = AutoTokenizer.from_pretrained(ROOT, config=model.config)
    return QuestionAnsweringPipeline(model=model, tokenizer=tokenizer)


def test_sixteen_threads_get_the_answers_that_each_gets_alone():
    """At once from the first call, in which kernels are made."""
    calls = [
        {"question": QUESTION + "?" * i, "context": CONTEXT * (1 + i % 3), "length_config": length_config}
        for i, length_config in enumerate(LENGTH_CONFIGS * 4)
    ]
    qa = load("int8")
    alone = [qa(**call) for call in calls]
    assert len({str(answer) for answer in alone}) > len(LENGTH_CONFIGS)
    shared, together = load("int8"), Barrier(16)

    def work(thread):
        together.wait()
        turns = [(thread + i) % len(calls) for i in range(4)]
        return [(turn, shared(**calls[turn])) for turn in turns]

    with ThreadPoolExecutor(16) as pool:
        found = [each for of_thread in pool.map(work, range(16)) for each in of_thread]
    assert len(found) == 64
    assert all(answer == alone[turn] for turn, answer in found)


SERVICE = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
import torch
from transformers import pipeline

CONTEXT = "My name is Wolfgang and I live in Berlin. " * 20

def answer(question):
    return ask(qa, question)

def ask(qa, question):
    return qa(question=question, context=CONTEXT, length_config="fastest", batch_size=2)["answer"]

if __name__ == "__main__":
    torch.set_num_threads(2)
    qa = pipeline("question-answering", model=sys.argv[1], trust_remote_code=True, device="cpu")
    questions = ["Where do I live?", "What is my name?"] * 2
    expected = ["Berlin", "Wolfgang"] * 2
    assert [answer(question) for question in questions] == expected
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert [pool.submit(ask, qa, question).result() for question in questions] == expected
    for weights in ("int8", "fp32"):
        if weights == "fp32":
            qa.model.dequantize()
        assert [answer(question) for question in questions] == expected  # torch's threads have started
        exec(open("readme.py").read())
        assert answers == expected, weights
"""


def test_forked_and_spawned_processes_answer_after_their_parent_has(tmp_path):
    """As README says: a forked one calls `torch.set_num_threads(1)` first; a spawned one is handed the pipeline."""
    (tmp_path / "service.py").write_text(SERVICE)
    (tmp_path / "readme.py").write_text(block("python", "get_context"))
    command = [sys.executable, "service.py", str(ROOT)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("kind", ["floats", "remote"])
def test_copies_and_pickles_of_a_pipeline_answer_alike(kind):
    qa = load(kind) if kind != "remote" else pipeline("question-answering", model=str(ROOT), trust_remote_code=True)
    untouched = [copy.deepcopy(qa), pickle.loads(pickle.dumps(qa))]
    call = {"question": QUESTION, "context": CONTEXT * 10, "length_config": "fastest", "top_k": 3}
    expected = qa(**call)
    for twin in (*untouched, copy.deepcopy(qa), pickle.loads(pickle.dumps(qa))):
        assert twin.model is not qa.model
        assert twin(**call) == expected
    assert qa(**call) == expected


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_kernels_made_in_inference_mode_serve_outside_it(weights):
    model = int8_model()[weights == "int8"]
    input_ids, mask = right_padded(model.config, [9, 5])
    for length_config in ("full", [6, 5, 4]):
        with torch.inference_mode():
            expected = model(input_ids, mask, length_config=length_config).start_logits
        found = model(input_ids, mask, length_config=length_config).start_logits  # ready for backward, were it wanted
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kernel", [FloatKernel, OneDNNKernel])
def test_autocast_leaves_integer_products_exact(kernel):
    linear = random_linear(64, 32)
    quantized = torch.randint(0, 256, (7, 64), dtype=torch.uint8)
    made = kernel(linear._buffers)
    expected = made(quantized)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(quantized), expected)


@pytest.mark.parametrize("kernel", [FloatKernel, OneDNNKernel])
def test_a_kernel_is_exact_whatever_torch_s_default_dtype_is(kernel):
    linear = random_linear(64, 32, input_zero_point=201)
    hidden_states = torch.randn(7, 64)

    def product():
        made = kernel(linear._buffers)
        return made(made.quantize(hidden_states))

    expected = product()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(product(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("significance", ["learned", "attention"])
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_autocast_computes_close_to_single_precision(weights, significance):
    model = int8_model(significance=significance)[weights == "int8"]
    input_ids, mask = right_padded(model.config, [30, 21])
    for length_config in ("full", [0.8, 0.6, 0.5]):
        with torch.no_grad():
            expected = model(input_ids, mask, length_config=length_config).start_logits[mask.bool()]
            with torch.autocast("cpu", torch.bfloat16):
                found = model(input_ids, mask, length_config=length_config).start_logits[mask.bool()].float()
        assert torch.isfinite(found).all()
        if length_config == "full":
            torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("change", [lambda model: model.to(torch.bfloat16), lambda model: model.half()])
def test_the_shipped_model_answers_cast_and_under_autocast(change):
    qa = load("shipped")
    call = {"question": QUESTION, "context": CONTEXT * 3, "batch_size": 2}
    with torch.autocast("cpu", torch.bfloat16):
        assert qa(**call)["answer"] == qa(**call, length_config="fastest")["answer"] == "Berlin"
    change(qa.model)
    assert qa(**call)["answer"] == qa(**call, length_config="fastest")["answer"] == "Berlin"


@pytest.fixture
def inductor():
    """torch.compile's own backend, without processes beside this one."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    with config.patch(compile_threads=1):
        yield
    torch.compiler.reset()


@once
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_a_compiled_model_computes_what_it_did(inductor, weights):
    """At int8 the encoder stays outside the compiled graphs."""
    model = int8_model(num_hidden_layers=1)[weights == "int8"]
    input_ids, mask = right_padded(model.config, [12, 7])
    compiled = torch.compile(model)
    with torch.no_grad():
        for length_config in ("full", [4]):
            expected = model(input_ids, mask, length_config=length_config)
            found = compiled(input_ids, mask, length_config=length_config)
            for name in ("start_logits", "end_logits"):
                torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0)
