"""Speed beside the peers: `python -m recipe.benchmark --data FILE ... --output results/benchmark.json`.

Every row answers the same inputs in one process, and the rows take turns, so that what else the machine does meets all
of them; once more with a busy process beside each core. Peers come from the same weights (recipe/peers.py), and their
F1 is measured on the same validation questions. Start and memory are those of a process of a row's own
(recipe/alone.py). The models of the paper's table (`results/paper.json`) are configurations of this repository's class
with random weights, which are as fast as trained ones. Nothing is padded.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import onnx
import openvino
import torch
from tqdm import tqdm
from transformers import BertConfig, BertForQuestionAnswering

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.graph_qualaminilm import GRAPH_FILE, import_onnxruntime
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from qualaminilm.quantization_qualaminilm import QuantizedLinear
from recipe import ROOT
from recipe.data import file_sha256, identities, load_tokenizer, read_sources, with_answers
from recipe.evaluate import answer_all, score
from recipe.export import build_graph, export_beside_weights
from recipe.peers import (
    onnx_file,
    onnx_runtime_row,
    openvino_row,
    quantize_onnx_dynamic,
    quantize_onnx_static,
    quantize_openvino,
    torch_row,
    transformers_twin,
)
from recipe.quantize import quantize
from recipe.results import describe_run, save_figure, write_json
from recipe.test_sets import refuse_test_sets

onnxruntime = import_onnxruntime()
BASELINE = "BERT-base, transformers, fp32"
LENGTH = 384
USUAL_LENGTH = 164  # the median of the test set's rows
BATCH_SIZES = (1, 8, 32)
PAPER_BATCH_SIZES = (1, 32)
CALIBRATION_WINDOWS = 64
# Seconds before each turn. Every runtime's threads spin a while after their work is done, as is their default; when the
# next row's turn comes they must be asleep.
SETTLING = 0.1
TINYBERT = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
SIZES = {"BERT-base": TINYBERT | {"num_hidden_layers": 12}, "TinyBERT": TINYBERT, "MiniLM": {}}


@dataclass
class Row:
    """One line of the benchmark.

    Args:
        run: takes a dict of int64 (batch, sequence).
        facts: what is known of it without a clock: `macs_at_384`, `size_mb`.
        alone: what starts it in a process of its own: a kind of recipe/alone.py and a path; `None`: nothing does.
        of_paper (`bool`): one of the paper's models, timed at `PAPER_BATCH_SIZES` only.
        answers (`bool`): its answers mean something, so that their F1 does.
    """

    run: Callable
    facts: dict
    alone: tuple | None = None
    of_paper: bool = False
    answers: bool = True


def paper_rows(table):
    """The models of the paper's table: name -> [`Row`].

    Args:
        table: `rows` of `results/paper.json`.
    """
    models, rows = {}, {}
    window = {"input_ids": list(range(1000, 1000 + LENGTH)), "token_type_ids": [0] * LENGTH}
    for each in table:
        kind = each["architecture"], each["int8"]
        if kind not in models:
            config = QuaLAMiniLMConfig(significance="attention", **SIZES[each["architecture"]])
            model = QuaLAMiniLMForQuestionAnswering(config).eval()
            models[kind] = quantize(model, [window]) if each["int8"] else model
        model, length_config = models[kind], each["length_config"]
        facts = {"macs_at_384": model.config.macs(length_config), "size_mb": size_mb(model)}
        rows[each["name"]] = Row(torch_row(model, length_config=length_config), facts, of_paper=True)
    return rows


def size_mb(model):
    """Megabytes (10^6 bytes) of a model's tensors as they are stored."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 1e6


def our_rows(model, tokenizer, folder, threads, calibration):
    """The int8 `model`, its float twin and its peers: name -> [`Row`].

    Args:
        model: the int8 model, run by torch.
        tokenizer: its own.
        folder: where the peers' graphs are kept.
        threads (`int`): of every row.
        calibration: inputs for OpenVINO's quantisation, a `list` of dicts.
    """
    folder = Path(folder)
    floats = copy.deepcopy(model).dequantize()
    twin = transformers_twin(floats)
    twin.save_pretrained(folder / "twin")
    stored = folder / "twin" / "model.safetensors"
    graph = onnx_file(twin, folder)
    dynamic, static = quantize_onnx_dynamic(graph, twin.config), quantize_onnx_static(graph, calibration)
    openvino_int8 = quantize_openvino(graph, calibration)
    full = {"macs_at_384": model.config.macs("full")}
    base = BertForQuestionAnswering(BertConfig()).eval()  # BERT-base's sizes

    def weighing(path):
        return full | {"size_mb": path.stat().st_size / 1e6}

    half = copy.deepcopy(twin).to(torch.bfloat16)
    rows = {
        BASELINE: Row(torch_row(base), {"size_mb": size_mb(base)}, answers=False),
        "MiniLM, transformers, fp32": Row(torch_row(twin), weighing(stored), ("transformers", folder / "twin")),
        "MiniLM, transformers, bfloat16": Row(
            torch_row(half), full | {"size_mb": size_mb(half)}, ("transformers_bf16", folder / "twin")
        ),
        "MiniLM, ONNX Runtime, dynamic int8": Row(
            onnx_runtime_row(dynamic, threads), weighing(dynamic), ("onnx_runtime", dynamic)
        ),
        "MiniLM, ONNX Runtime, static int8": Row(
            onnx_runtime_row(static, threads), weighing(static), ("onnx_runtime", static)
        ),
        "MiniLM, OpenVINO, int8": Row(
            openvino_row(openvino_int8, threads),
            weighing(openvino_int8.with_suffix(".bin")),
            ("open_vino", openvino_int8),
        ),
        "ours, fp32, full": Row(torch_row(floats, length_config="full"), full | {"size_mb": size_mb(floats)}),
    }
    stored = folder / "int8"
    model.save_pretrained(stored)
    tokenizer.save_pretrained(stored)
    export_beside_weights(stored)
    in_graph = QuaLAMiniLMForQuestionAnswering.from_pretrained(stored, engine="onnxruntime").eval()
    for engine, engine_model in (("torch", model), ("ONNX Runtime", in_graph)):
        for name in model.length_presets:
            facts = weighing(stored / "model.safetensors") | {"macs_at_384": model.config.macs(name)}
            rows[f"ours, {engine}, int8, {name}"] = Row(torch_row(engine_model, length_config=name), facts)
    rows["ours, torch, int8, full"].alone = ("ours_torch", stored)
    rows["ours, ONNX Runtime, int8, full"].alone = ("ours", stored)
    rows["ours, without torch, int8, full"] = Row(
        onnx_runtime_row(stored / GRAPH_FILE, threads), weighing(stored / GRAPH_FILE), ("without_torch", stored)
    )
    for name in ("full", cheapest(model.config)):
        path = folder / f"exported-{name}.onnx"
        onnx.save(build_graph(model, name), path)
        facts = weighing(path) | {"macs_at_384": model.config.macs(name)}
        rows[f"exported, OpenVINO, int8, {name}"] = Row(openvino_row(path, threads), facts)
    return rows


def real_windows(questions, tokenizer, length, count):
    """`count` windows of exactly `length` real tokens, made of questions and as many contexts as it takes.

    Returns:
        dict of int64 `(count, length)`.
    """
    contexts = questions["context"]
    rows = []
    for i in range(count):
        context, taken = "", i
        while len(tokenizer.tokenize(context)) < length:
            context += " " + contexts[taken % len(contexts)]
            taken += 1
        rows.append((questions["question"][i % len(questions)], context))
    return dict(
        tokenizer(
            [question for question, _ in rows],
            [context for _, context in rows],
            truncation="only_second",
            max_length=length,
            return_token_type_ids=True,
            return_tensors="pt",
        )
    )


class StandIn:
    """A row in the place of the pipeline's model."""

    def __init__(self, row, config):
        self.row, self.config = row, config

    def __call__(self, length_config=None, **inputs):
        return span_logits_of(self.row(inputs))


def answering(pipeline, row):
    """The pipeline with `row` standing in for its model."""
    asking = copy.copy(pipeline)
    asking.model = StandIn(row, pipeline.model.config)
    return asking


def ask(pipeline, row, questions):
    """Asks `questions` one at a time, `row` standing in for the pipeline's model."""
    asking = answering(pipeline, row)
    for question, context in zip(questions["question"], questions["context"]):
        asking(question=question, context=context)


def span_logits_of(outputs):
    """A row's outputs with `start_logits` and `end_logits`, tensors `(batch, sequence)`."""
    if hasattr(outputs, "start_logits"):
        return outputs
    return SimpleNamespace(start_logits=torch.tensor(outputs[0]), end_logits=torch.tensor(outputs[1]))


def latency_curve(row, windows, repeats):
    """Latency against length: `tokens`, `ms`, and `fit`, the quadratic's at these tokens.

    Each point counts by its relative distance.
    """
    ids = {name: torch.cat((tensor[:1], tensor[1:2]), 1) for name, tensor in windows.items()}
    lengths = list(range(32, 513, 32))
    timed = {n: lambda n=n: row({name: tensor[:, :n] for name, tensor in ids.items()}) for n in lengths}
    milliseconds = [seconds * 1e3 for seconds in take_turns(timed, repeats).values()]
    fit = np.polyval(np.polyfit(lengths, milliseconds, 2, w=1 / np.array(milliseconds)), lengths)
    return {"tokens": lengths, "ms": milliseconds, "fit": fit.tolist()}


def draw_curves(curves, path):
    """Plots each curve's measured points, and its fit as a line."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, curve in curves.items():
        points = axes.plot(curve["tokens"], curve["ms"], "o", label=name)
        axes.plot(curve["tokens"], curve["fit"], color=points[0].get_color(), linewidth=1)
    axes.set(xlabel="tokens", ylabel="milliseconds, batch 1", xlim=(0, None), ylim=(0, None))
    axes.legend()
    save_figure(figure, path, dpi=150)


def cheapest(config):
    """Name of the preset of the fewest MACs."""
    return min(config.length_presets, key=config.macs)


def take_turns(rows, repeats):
    """Median seconds of each of `rows` (name -> callable), which take turns `repeats` times after one to warm up."""
    seconds = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, run in rows.items():
            time.sleep(SETTLING)
            # On the two cores that this was written on, a thread that sleeps may take 12 ms to wake, more than a short
            # row itself: such a row's own threads are woken by a run that does not count.
            if turn and seconds[name][0] < 1:
                run()
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def int8_rate(repeats=9):
    """Multiply-accumulates a second of the machine's own 8-bit matrix product, at this model's feed-forward sizes."""
    linear = QuantizedLinear(1536, 384)
    quantized = torch.zeros(32 * LENGTH, 1536, dtype=torch.uint8)
    seconds = take_turns({"gemm": lambda: linear(quantized)}, repeats)["gemm"]
    return quantized.shape[0] * 1536 * 384 / seconds


def alone(kind, path):
    """Seconds from a process's start to the first answer of one row, and its peak of resident MB."""
    script, started = Path(__file__).with_name("alone.py"), time.monotonic()
    command = [sys.executable, "-I", str(script), kind, str(path), str(started)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, megabytes = map(float, done.stdout.split())
    return {"seconds_to_first_answer": seconds, "peak_resident_mb": megabytes}


@contextmanager
def busy_cores():
    """Within, a process works beside each core of this one's."""
    work = "import os, sys\nos.sched_setaffinity(0, [int(sys.argv[1])])\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-I", "-c", work, str(core)]) for core in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(rows, windows, pipeline, questions, scored, repeats):
    """Times every row: name -> its facts, milliseconds, speed-ups over [`BASELINE`], and F1.

    Args:
        rows: name -> [`Row`], the baseline among them.
        windows: dict of int64 `(32 or more, LENGTH)`, without padding.
        pipeline: asks `questions`, a table with the columns question and context, one at a time.
        scored: a table of questions with answers.
        repeats (`int`): turns of each row; the median counts.
    """
    results = {name: dict(row.facts) for name, row in rows.items()}
    general = {name: row for name, row in rows.items() if not row.of_paper}

    def time_rows(key, calls, each=1):
        medians = take_turns(calls, repeats)
        for name, seconds in medians.items():
            results[name][f"{key}_ms"] = seconds * 1e3 / each
            results[name][f"{key}_speedup"] = medians[BASELINE] / seconds

    def time_inputs(key, timed, batch, length):
        inputs = {name: tensor[:batch, :length] for name, tensor in windows.items()}
        time_rows(key, {name: lambda run=row.run: run(inputs) for name, row in timed.items()})

    for batch in tqdm(BATCH_SIZES, desc="Batch sizes"):
        time_inputs(f"batch_{batch}", rows if batch in PAPER_BATCH_SIZES else general, batch, LENGTH)
    time_inputs("usual", general, 1, USUAL_LENGTH)
    with busy_cores():
        time_inputs("busy", general, 1, LENGTH)
    timed = {name: lambda run=row.run: ask(pipeline, run, questions) for name, row in general.items()}
    time_rows("pipeline", timed, len(questions))
    for name, row in tqdm(general.items(), desc="Scoring", unit="row"):
        if row.answers:
            texts, _ = answer_all(answering(pipeline, row.run), scored, 1, None, progress=False)
            results[name]["f1"] = score(scored, texts)["f1"]
        if row.alone:
            results[name] |= alone(*row.alone)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder of an int8 model (the shipped one)")
    parser.add_argument("--data", nargs="+", required=True, help="SQuAD JSON files whose validation split is asked")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each row (9)")
    parser.add_argument("--questions", type=int, default=100, help="questions asked through the pipeline (100)")
    parser.add_argument("--scored", type=int, default=500, help="questions that every row's F1 is measured on (500)")
    parser.add_argument("--output", required=True, help="JSON results file to write")
    parser.add_argument("--plot", default="assets/latency.png", help="picture to write (%(default)s)")
    arguments = parser.parse_args()
    data = identities(arguments.data)
    refuse_test_sets("--data", arguments.data)
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model, engine="torch")
    if not model.config.int8_weights:
        raise ValueError(f"--model {arguments.model} has float weights, expected int8 ones (recipe.quantize)")
    tokenizer = load_tokenizer(arguments.model)
    questions = with_answers(read_sources(arguments.data, "validation")).shuffle(seed=0)
    asked = questions.select(range(min(len(questions), arguments.questions)))
    scored = questions.select(range(min(len(questions), arguments.scored)))
    windows = real_windows(questions, tokenizer, LENGTH, max(BATCH_SIZES) + CALIBRATION_WINDOWS)
    calibration = [
        {name: tensor[-i:][:1] for name, tensor in windows.items()} for i in range(1, CALIBRATION_WINDOWS + 1)
    ]
    paper = json.loads((ROOT / "results" / "paper.json").read_text(encoding="utf-8"))["rows"]
    with tempfile.TemporaryDirectory() as folder:
        rows = our_rows(model, tokenizer, folder, torch.get_num_threads(), calibration) | paper_rows(paper)
        pipeline = QuestionAnsweringPipeline(model=model, tokenizer=tokenizer)
        measured = measure(rows, windows, pipeline, asked, scored, arguments.repeats)
        curves = {
            name: latency_curve(rows[f"ours, torch, int8, {name}"].run, windows, arguments.repeats)
            for name in ("full", cheapest(model.config))
        }
    rate = int8_rate()
    for row in measured.values():
        for batch in BATCH_SIZES:
            if f"batch_{batch}_ms" in row and "macs_at_384" in row:
                row[f"batch_{batch}_times_floor"] = row[f"batch_{batch}_ms"] / (row["macs_at_384"] * batch / rate * 1e3)
    draw_curves(curves, arguments.plot)
    write_json(
        arguments.output,
        {
            "tokens": LENGTH,
            "batch_sizes": BATCH_SIZES,
            "repeats": arguments.repeats,
            "usual_tokens": USUAL_LENGTH,
            "questions": len(asked),
            "scored": len(scored),
            "rows": {name: row for name, row in measured.items() if not rows[name].of_paper},
            "paper_rows": {name: row for name, row in measured.items() if rows[name].of_paper},
            "int8_macs_a_second": rate,
            "curves": curves,
            "data": data,
            "weights_sha256": file_sha256(Path(arguments.model) / "model.safetensors"),
            **describe_run("recipe.benchmark", matplotlib, onnxruntime, openvino),
        },
    )
    for name, row in measured.items():
        print(f"{name:55s}{row['batch_1_ms']:10.2f} ms{row['batch_32_ms']:10.2f} ms at 32")
    print(f"Wrote {arguments.output} and {arguments.plot}")


if __name__ == "__main__":
    main()
