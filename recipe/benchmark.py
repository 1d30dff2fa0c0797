"""Speed beside the peers, in one process: `python -m recipe.benchmark --data FILE ... --output results/benchmark.json`.

Every row answers the same inputs, and the rows take turns, so that what else the machine does meets all of them. Peers
come from the same weights (recipe/peers.py). The models of the paper's table (`results/paper.json`) are configurations
of this repository's class with random weights, which are as fast as trained ones. Nothing is padded.
"""

import argparse
import copy
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import datasets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import onnx
import torch
from tqdm import tqdm
from transformers import BertConfig, BertForQuestionAnswering

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from qualaminilm.quantization_qualaminilm import QuantizedLinear
from recipe.data import file_sha256, identities, load_tokenizer, read_questions
from recipe.evaluate import ROOT
from recipe.export import build_graph
from recipe.peers import (
    onnx_file,
    onnx_runtime_row,
    openvino_row,
    quantize_onnx,
    quantize_openvino,
    torch_row,
    transformers_twin,
)
from recipe.quantize import quantize
from recipe.results import describe_run, save_figure, write_json
from recipe.test_sets import refuse_test_sets

BASELINE = "BERT-base, transformers, fp32"
LENGTH = 384
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
        fresh: how a process of its own starts it, the arguments of `--one`; `None`: it does not.
        of_paper (`bool`): one of the paper's models, timed at `PAPER_BATCH_SIZES` only.
    """

    run: Callable
    facts: dict
    fresh: tuple | None = None
    of_paper: bool = False


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


def our_rows(model, folder, threads, calibration):
    """The int8 `model`, its float twin and its peers: name -> [`Row`].

    Args:
        model: the int8 model.
        folder: where the peers' graphs are kept.
        threads (`int`): of every row.
        calibration: inputs for OpenVINO's quantisation, a `list` of dicts.
    """
    folder = Path(folder)
    floats = copy.deepcopy(model).dequantize()
    twin = transformers_twin(floats)
    twin.save_pretrained(folder / "twin")
    graph = onnx_file(twin, folder)
    onnx_int8, openvino_int8 = quantize_onnx(graph), quantize_openvino(graph, calibration)
    full = {"macs_at_384": model.config.macs("full")}
    base = BertForQuestionAnswering(BertConfig()).eval()  # BERT-base's sizes

    def weighing(path):
        return full | {"size_mb": path.stat().st_size / 1e6}

    rows = {
        BASELINE: Row(torch_row(base), {"size_mb": size_mb(base)}),
        "MiniLM, transformers, fp32": Row(
            torch_row(twin), weighing(folder / "twin" / "model.safetensors"), ("transformers", folder / "twin")
        ),
        "MiniLM, ONNX Runtime, int8": Row(
            onnx_runtime_row(onnx_int8, threads), weighing(onnx_int8), ("onnxruntime", onnx_int8)
        ),
        "MiniLM, OpenVINO, int8": Row(
            openvino_row(openvino_int8, threads),
            weighing(openvino_int8.with_suffix(".bin")),
            ("openvino", openvino_int8),
        ),
        "ours, fp32, full": Row(torch_row(floats, length_config="full"), full | {"size_mb": size_mb(floats)}),
    }
    stored = folder / "int8"
    model.save_pretrained(stored)
    for name in model.length_presets:
        facts = weighing(stored / "model.safetensors") | {"macs_at_384": model.config.macs(name)}
        rows[f"ours, int8, {name}"] = Row(torch_row(model, length_config=name), facts)
    rows["ours, int8, full"].fresh = ("ours", stored)
    for name in ("full", cheapest(model.config)):
        path = folder / f"exported-{name}.onnx"
        onnx.save(build_graph(model, name), path)
        facts = weighing(path) | {"macs_at_384": model.config.macs(name)}
        rows[f"exported, ONNX Runtime, int8, {name}"] = Row(onnx_runtime_row(path, threads), facts)
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


def ask(pipeline, row, questions):
    """Asks `questions` one at a time, `row` standing in for the pipeline's model."""
    asking = copy.copy(pipeline)
    asking.model = StandIn(row, pipeline.model.config)
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


def fresh_process(kind, path):
    """Seconds from disk to the first answer and peak resident MB of one row, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "recipe.benchmark", "--one", kind, str(path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, megabytes = map(float, done.stdout.split())
    return {"seconds_to_first_answer": seconds, "peak_resident_mb": megabytes}


def one(kind, path):
    """What [`fresh_process`] runs: prints both numbers."""
    inputs = {
        name: torch.ones(1, LENGTH, dtype=torch.long) for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    started = time.perf_counter()
    if kind == "transformers":
        run = torch_row(BertForQuestionAnswering.from_pretrained(path))
    elif kind == "ours":
        run = torch_row(QuaLAMiniLMForQuestionAnswering.from_pretrained(path))
    elif kind == "onnxruntime":
        run = onnx_runtime_row(path, torch.get_num_threads())
    else:
        run = openvino_row(path, torch.get_num_threads())
    run(inputs)
    seconds = time.perf_counter() - started
    # Not getrusage: its peak begins with that of the process which started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(seconds, int(peak[1]) / 1024)


def measure(rows, windows, pipeline, questions, repeats):
    """Times every row: name -> its facts, milliseconds, and speed-ups over [`BASELINE`].

    Args:
        rows: name -> [`Row`], the baseline among them.
        windows: dict of int64 `(32 or more, LENGTH)`, without padding.
        pipeline: asks `questions`, a table with the columns question and context, one at a time.
        repeats (`int`): turns of each row; the median counts.
    """
    results = {name: dict(row.facts) for name, row in rows.items()}

    def time_rows(key, calls, each=1):
        medians = take_turns(calls, repeats)
        for name, seconds in medians.items():
            results[name][f"{key}_ms"] = seconds * 1e3 / each
            results[name][f"{key}_speedup"] = medians[BASELINE] / seconds

    for batch in tqdm(BATCH_SIZES, desc="Batch sizes"):
        inputs = {name: tensor[:batch] for name, tensor in windows.items()}
        timed = {
            name: lambda run=row.run, inputs=inputs: run(inputs)
            for name, row in rows.items()
            if batch in PAPER_BATCH_SIZES or not row.of_paper
        }
        time_rows(f"batch_{batch}", timed)
    timed = {name: lambda run=row.run: ask(pipeline, run, questions) for name, row in rows.items() if not row.of_paper}
    time_rows("pipeline", timed, len(questions))
    for name, row in rows.items():
        if row.fresh:
            results[name] |= fresh_process(*row.fresh)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder of an int8 model (the shipped one)")
    parser.add_argument("--data", nargs="+", help="SQuAD JSON files whose validation split is asked")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each row (9)")
    parser.add_argument("--questions", type=int, default=100, help="questions asked through the pipeline (100)")
    parser.add_argument("--output", help="JSON results file to write")
    parser.add_argument("--plot", default="assets/latency.png", help="picture to write (%(default)s)")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(*arguments.one)
    if not (arguments.data and arguments.output):
        parser.error("the following arguments are required: --data, --output")
    data = identities(arguments.data)
    refuse_test_sets("--data", arguments.data)
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model)
    if not model.config.int8_storage:
        raise ValueError(f"--model {arguments.model} has float weights, expected int8 ones (recipe.quantize)")
    tokenizer = load_tokenizer(arguments.model)
    questions = datasets.concatenate_datasets([read_questions(source, "validation") for source in arguments.data])
    questions = questions.shuffle(seed=0)
    asked = questions.select(range(min(len(questions), arguments.questions)))
    windows = real_windows(questions, tokenizer, LENGTH, max(BATCH_SIZES) + CALIBRATION_WINDOWS)
    calibration = [
        {name: tensor[-i:][:1] for name, tensor in windows.items()} for i in range(1, CALIBRATION_WINDOWS + 1)
    ]
    paper = json.loads((ROOT / "results" / "paper.json").read_text(encoding="utf-8"))["rows"]
    with tempfile.TemporaryDirectory() as folder:
        rows = our_rows(model, folder, torch.get_num_threads(), calibration) | paper_rows(paper)
        pipeline = QuestionAnsweringPipeline(model=model, tokenizer=tokenizer)
        measured = measure(rows, windows, pipeline, asked, arguments.repeats)
        curves = {
            name: latency_curve(rows[f"ours, int8, {name}"].run, windows, arguments.repeats)
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
            "questions": len(asked),
            "rows": {name: row for name, row in measured.items() if not rows[name].of_paper},
            "paper_rows": {name: row for name, row in measured.items() if rows[name].of_paper},
            "int8_macs_a_second": rate,
            "curves": curves,
            "data": data,
            "weights_sha256": file_sha256(Path(arguments.model) / "model.safetensors"),
            **describe_run("recipe.benchmark", matplotlib),
        },
    )
    for name, row in measured.items():
        print(f"{name:55s}{row['batch_1_ms']:10.2f} ms{row['batch_32_ms']:10.2f} ms at 32")
    print(f"Wrote {arguments.output} and {arguments.plot}")


if __name__ == "__main__":
    main()
