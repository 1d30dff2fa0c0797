import json
import os
import re
from pathlib import Path

import pytest
import torch

from conftest import ROOT, tiny_config

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from recipe import benchmark
from recipe.benchmark import (
    BASELINE,
    LENGTH,
    Row,
    ask,
    latency_curve,
    measure,
    our_rows,
    paper_rows,
    real_windows,
    take_turns,
)
from recipe.data import load_tokenizer
from recipe.quantize import quantize

QUESTIONS = {
    "question": ["Where do I live?", "Who wrote it?", "When?"],
    "context": ["My name is Wolfgang and I live in Berlin.", "Ada wrote the first of them.", "It was in 1912, in May."],
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT)


def test_the_paper_s_models_are_configurations_of_this_class():
    """MACs by formula and parameters by count are the paper's, but for its vocabulary of 50,265."""
    table = json.loads((ROOT / "results" / "paper.json").read_text())["rows"]
    rows = paper_rows(table)
    assert list(rows) == [each["name"] for each in table] and len(rows) == 9
    for each in table:
        assert rows[each["name"]].facts["macs_at_384"] == pytest.approx(each["macs"], rel=0.03)
    sizes = {name: row.facts["size_mb"] for name, row in rows.items()}
    assert sizes["BERT-base"] == pytest.approx(each_mebibyte(415.47), rel=0.01)
    assert sizes["TinyBERT"] == pytest.approx(each_mebibyte(253.2), rel=0.01)
    fewer_words = (50265 - 30522) * 384 * 4 / 1e6
    assert sizes["MiniLM"] == pytest.approx(each_mebibyte(115.04) - fewer_words, rel=0.02)
    assert sizes["QuaLA-MiniLM"] < sizes["MiniLM"] / 3.8
    with torch.inference_mode():
        logits = rows["QuaLA-MiniLM (315, 251, 242, 159, 142, 33)"].run({"input_ids": torch.ones(2, 9).long()})
    assert logits.start_logits.shape == (2, 9)


def each_mebibyte(count):
    """The paper's MB are 2^20 bytes, ours 10^6."""
    return count * 2**20 / 1e6


def test_rows_take_turns_short_ones_awake_and_the_first_does_not_count(monkeypatch):
    clock = iter(i / 2 for i in range(1000))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    turns = []
    medians = take_turns({"one": lambda: turns.append("one"), "two": lambda: (turns.append("two"), next(clock))}, 3)
    assert turns == ["one", "two", *["one", "one", "two"] * 3]
    assert medians == {"one": 0.5, "two": 1}


def test_windows_are_full_of_real_tokens(tokenizer):
    windows = real_windows(QUESTIONS, tokenizer, 48, 5)
    assert windows["input_ids"].shape == (5, 48) and windows["attention_mask"].all()
    assert len({tuple(row) for row in windows["input_ids"].tolist()}) == 5
    text = tokenizer.decode(windows["input_ids"][1], skip_special_tokens=True)
    assert text.startswith("who wrote it? ada wrote the first of them. it was in 1912")


def test_a_row_is_asked_through_the_pipeline(tokenizer):
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(ROOT, dtype=torch.float32).eval()
    pipeline = QuestionAnsweringPipeline(model=model, tokenizer=tokenizer)
    asked = []

    def run(inputs):
        asked.append(tokenizer.decode(inputs["input_ids"][0]))
        return [torch.zeros(inputs["input_ids"].shape).numpy()] * 2  # as the runtimes answer: arrays, not an output

    ask(pipeline, run, QUESTIONS)
    assert len(asked) == 3 and asked[1] == "[CLS] who wrote it? [SEP] ada wrote the first of them. [SEP]"
    assert pipeline.model is model


def test_the_curve_s_fit_is_the_quadratic(monkeypatch, tokenizer):
    def quadratic(calls, repeats):
        return {n: (1 + 0.01 * n + 0.0001 * n * n) / 1e3 for n in calls}

    monkeypatch.setattr(benchmark, "take_turns", quadratic)
    curve = latency_curve(None, {"input_ids": torch.ones(2, LENGTH).long()}, 1)
    assert curve["tokens"] == list(range(32, 513, 32))
    assert curve["ms"][0] == pytest.approx(1.4224) and curve["fit"] == pytest.approx(curve["ms"])


def test_speed_ups_are_against_the_baseline(monkeypatch):
    """A clock that runs only inside rows: each is as many seconds as it is told."""
    now = [0.0]

    def taking(seconds):
        def run(inputs):
            now[0] += seconds * len(inputs["input_ids"])

        return run

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benchmark, "ask", lambda pipeline, run, questions: run({"input_ids": questions}))
    monkeypatch.setattr(benchmark, "alone", lambda kind, path: {"seconds_to_first_answer": kind + path})
    monkeypatch.setattr(benchmark, "answering", lambda pipeline, run: run)
    monkeypatch.setattr(benchmark, "answer_all", lambda run, scored, *_, **__: (scored, None))
    monkeypatch.setattr(benchmark, "score", lambda scored, texts: {"f1": len(scored)})
    rows = {
        BASELINE: Row(taking(6), {"size_mb": 1}, answers=False),
        "ours": Row(taking(2), {"size_mb": 2}, ("kind", "path")),
        "paper": Row(taking(3), {}, of_paper=True),
    }
    results = measure(rows, {"input_ids": torch.ones(40, 384)}, None, ["a", "b"], ["a", "b", "c"], 3)
    ours = results["ours"]
    assert ours["busy_ms"] == ours["usual_ms"] == 2e3 and ours["f1"] == 3
    assert "f1" not in results[BASELINE] and "busy_ms" not in results["paper"]
    assert (ours["batch_1_ms"], ours["batch_8_ms"], ours["batch_32_ms"]) == (2e3, 16e3, 64e3)
    assert ours["pipeline_ms"] == 2e3  # a question
    assert {ours[f"{key}_speedup"] for key in ("batch_1", "batch_8", "batch_32", "pipeline")} == {3.0}
    assert ours["size_mb"] == 2 and ours["seconds_to_first_answer"] == "kindpath"
    assert results["paper"] == {"batch_1_ms": 3e3, "batch_1_speedup": 2, "batch_32_ms": 96e3, "batch_32_speedup": 2}
    assert results[BASELINE]["batch_1_speedup"] == 1 and "seconds_to_first_answer" not in results[BASELINE]


def test_every_row_answers_the_same(tmp_path, tokenizer):
    """All peers of one small model: fp32 ones to rounding, int8 ones to what their grids allow."""
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    config = tiny_config(vocab_size=30522, max_position_embeddings=512, significance="learned")
    config.length_presets = {
        "full": {"length_config": [1.0, 1.0, 1.0]},
        "fast": {"length_config": [0.9, 0.6, 0.4]},
    }
    floats = QuaLAMiniLMForQuestionAnswering(config).eval()
    windows = real_windows(QUESTIONS, tokenizer, LENGTH, 4)
    rows = [{name: windows[name][i].tolist() for name in ("input_ids", "token_type_ids")} for i in range(2)]
    calibration = [{name: tensor[i : i + 1] for name, tensor in windows.items()} for i in range(2)]
    made = our_rows(quantize(floats, rows), tokenizer, tmp_path, 1, calibration)
    inputs = {name: tensor[2:] for name, tensor in windows.items()}
    logits = {
        name: torch.as_tensor(benchmark.span_logits_of(row.run(inputs)).start_logits).flatten()
        for name, row in made.items()
        if name != BASELINE
    }
    torch.testing.assert_close(logits["ours, fp32, full"], logits["MiniLM, transformers, fp32"], atol=1e-4, rtol=0)
    for name, each in logits.items():
        against = logits["ours, torch, int8, fast"] if name.endswith("fast") else logits["MiniLM, transformers, fp32"]
        # Their own grids, and bfloat16's eight digits.
        least = 0.5 if name.startswith(("MiniLM, ONNX", "MiniLM, OpenVINO")) else 0.95
        assert torch.corrcoef(torch.stack((each, against)))[0, 1] > least, name
    assert {name for name, row in made.items() if row.alone} == {
        "MiniLM, transformers, fp32",
        "MiniLM, transformers, bfloat16",
        "MiniLM, ONNX Runtime, dynamic int8",
        "MiniLM, ONNX Runtime, static int8",
        "MiniLM, OpenVINO, int8",
        "ours, torch, int8, full",
        "ours, ONNX Runtime, int8, full",
        "ours, without torch, int8, full",
    }
    for row in made.values():
        if row.alone:
            found = benchmark.alone(*row.alone)
            assert found["seconds_to_first_answer"] > 0 and found["peak_resident_mb"] > 0


def test_a_process_of_its_own_pays_for_itself_alone(tmp_path):
    QuaLAMiniLMForQuestionAnswering(tiny_config(max_position_embeddings=512)).save_pretrained(tmp_path)
    held = torch.ones(1 << 30, dtype=torch.uint8)
    resident = int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    found = benchmark.alone("ours_torch", tmp_path)
    assert found["seconds_to_first_answer"] > 0
    assert found["peak_resident_mb"] < resident - held.numel() / 2**21  # half of what is held here


def test_busy_processes_are_gone_afterwards():
    def children():
        return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}

    before = children()
    with benchmark.busy_cores():
        assert len(children() - before) == len(os.sched_getaffinity(0))
    assert children() == before
