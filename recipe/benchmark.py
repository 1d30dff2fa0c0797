"""Speed beside the peers, in one process: `python -m recipe.benchmark --data FILE ... --output results/benchmark.json`.

Every row answers the same inputs, and the rows take turns, so that what else the machine does meets all of them. Peers
come from the same weights: transformers' own classes, ONNX Runtime and OpenVINO (requirements-benchmark.txt).
"""

import argparse
import copy
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

# Before torch starts its threads: those that wait for work must not keep a processor from the row whose turn it is.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import datasets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import onnx
import torch
from tqdm import tqdm
from transformers import BertConfig, BertForQuestionAnswering

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from qualaminilm.quantization_qualaminilm import QuantizedLinear
from recipe.data import file_sha256, identities, load_tokenizer, read_questions, refuse_test_sets
from recipe.evaluate import ROOT
from recipe.export import build_graph, transformers_config
from recipe.results import describe_run, write_json

BASELINE = "BERT-base, transformers, fp32"
LENGTH = 384
BATCH_SIZES = (1, 8, 32)
CALIBRATION_WINDOWS = 64


def transformers_twin(model):
    """transformers' own `BertForQuestionAnswering` of a float `model`, without its scorers."""
    twin = BertForQuestionAnswering(transformers_config(model.config)).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".scorer." not in name}
    twin.load_state_dict(weights)
    return twin


def onnx_file(twin, folder):
    """`twin` as an ONNX graph with dynamic batch and sequence; returns its path."""
    path = Path(folder) / "model.onnx"
    inputs = (torch.ones(2, 16, dtype=torch.long),) * 3
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "sequence"} for name in [*names, "start_logits", "end_logits"]}

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.twin = twin

        def forward(self, input_ids, attention_mask, token_type_ids):
            outputs = self.twin(input_ids, attention_mask, token_type_ids)
            return outputs.start_logits, outputs.end_logits

    torch.onnx.export(
        Logits().eval(),  # export leaves a module in the mode that it found
        inputs,
        path,
        input_names=names,
        output_names=["start_logits", "end_logits"],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )
    return path


def quantize_onnx(path):
    """ONNX Runtime's own int8 graph of the float one at `path`; returns its path."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = path.with_name("dynamic.onnx")
    quantize_dynamic(path, quantized, weight_type=QuantType.QInt8, per_channel=True)
    return quantized


def onnx_runtime_row(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


def quantize_openvino(path, calibration):
    """OpenVINO's own int8 graph of the float ONNX one at `path`; returns its path."""
    import nncf
    import openvino

    quantized = path.with_name("openvino.xml")
    samples = nncf.Dataset([{name: tensor.numpy() for name, tensor in inputs.items()} for inputs in calibration])
    graph = nncf.quantize(openvino.convert_model(path), samples, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(graph, quantized)
    return quantized


def openvino_row(path, threads):
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(path, "CPU", hints)
    return lambda inputs: compiled({name: tensor.numpy() for name, tensor in inputs.items()})


def exported_rows(model, folder, threads):
    """The graphs of recipe.export of the int8 `model`, in both runtimes, at `"full"` and the cheapest preset."""
    rows = {}
    for name in ("full", cheapest(model.config)):
        path = Path(folder) / f"exported-{name}.onnx"
        onnx.save(build_graph(model, name), path)
        rows[f"exported, ONNX Runtime, int8, {name}"] = onnx_runtime_row(path, threads)
        rows[f"exported, OpenVINO, int8, {name}"] = openvino_row(path, threads)
    return rows


def torch_row(model, **arguments):
    def run(inputs):
        with torch.inference_mode():
            return model(**inputs, **arguments)

    return run


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


def ask(pipeline, row, questions):
    """Asks `questions` one at a time, `row` standing in for the pipeline's model."""
    asking = copy.copy(pipeline)
    asking.model = lambda length_config=None, **inputs: span_logits_of(row(inputs))
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
    figure.savefig(path, dpi=150)


def cheapest(config):
    """Name of the preset of the fewest MACs."""
    return min(config.length_presets, key=config.macs)


def take_turns(rows, repeats):
    """Median seconds of each of `rows` (name -> callable), which take turns `repeats` times after one to warm up."""
    seconds = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, run in rows.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in seconds.items()}


def int8_rate(repeats=9):
    """Multiply-accumulates a second of the machine's own 8-bit matrix product, at this model's feed-forward sizes."""
    linear = QuantizedLinear(1536, 384)
    quantized = torch.zeros(32 * LENGTH, 1536, dtype=torch.uint8)
    seconds = take_turns({"gemm": lambda: linear(quantized)}, repeats)["gemm"]
    return quantized.shape[0] * 1536 * 384 / seconds


def build_rows(model, folder, threads, calibration):
    """The rows of the benchmark: name -> callable that takes a dict of int64 (batch, sequence).

    Args:
        model: the int8 model.
        folder: where the peers' graphs are kept.
        threads (`int`): of every row.
        calibration: inputs for OpenVINO's quantisation, a `list` of dicts.
    """
    floats = copy.deepcopy(model).dequantize()
    twin = transformers_twin(floats)
    twin.save_pretrained(Path(folder) / "twin")
    path = onnx_file(twin, folder)
    base = BertConfig()  # BERT-base's sizes; speed does not depend on what the weights are
    return {
        BASELINE: torch_row(BertForQuestionAnswering(base).eval()),
        "MiniLM, transformers, fp32": torch_row(twin),
        "MiniLM, ONNX Runtime, int8": onnx_runtime_row(quantize_onnx(path), threads),
        "MiniLM, OpenVINO, int8": openvino_row(quantize_openvino(path, calibration), threads),
        "ours, fp32, full": torch_row(floats, length_config="full"),
        **{f"ours, int8, {name}": torch_row(model, length_config=name) for name in model.length_presets},
        **exported_rows(model, folder, threads),
    }


def fresh_process(kind, folder):
    """Seconds from disk to the first answer and peak resident MB of one row, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "recipe.benchmark", "--one", kind, str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, megabytes = map(float, done.stdout.split())
    return {"seconds_to_first_answer": seconds, "peak_resident_mb": megabytes}


def one(kind, folder):
    """What [`fresh_process`] runs: prints both numbers."""
    inputs = {
        name: torch.ones(1, LENGTH, dtype=torch.long) for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    started = time.perf_counter()
    if kind == "transformers":
        run = torch_row(BertForQuestionAnswering.from_pretrained(folder))
    elif kind == "ours":
        run = torch_row(QuaLAMiniLMForQuestionAnswering.from_pretrained(folder))
    elif kind == "onnxruntime":
        run = onnx_runtime_row(Path(folder) / "dynamic.onnx", torch.get_num_threads())
    else:
        run = openvino_row(Path(folder) / "openvino.xml", torch.get_num_threads())
    run(inputs)
    seconds = time.perf_counter() - started
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT), help="folder of an int8 model (the shipped one)")
    parser.add_argument("--data", nargs="+", help="SQuAD JSON files whose validation split is asked")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each row (9)")
    parser.add_argument("--questions", type=int, default=100, help="questions asked through the pipeline (100)")
    parser.add_argument("--output", help="JSON results file to write")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(*arguments.one)
    if not (arguments.data and arguments.output):
        parser.error("the following arguments are required: --data, --output")
    data = identities(arguments.data)
    refuse_test_sets("--data", data)
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model)
    if not model.config.int8_storage:
        raise ValueError(f"--model {arguments.model} has float weights, expected int8 ones (recipe.quantize)")
    tokenizer = load_tokenizer(arguments.model)
    questions = datasets.concatenate_datasets([read_questions(source, "validation") for source in arguments.data])
    questions = questions.shuffle(seed=0)
    windows = real_windows(questions, tokenizer, LENGTH, max(BATCH_SIZES) + CALIBRATION_WINDOWS)

    def part(first, count):
        return {name: tensor[first : first + count] for name, tensor in windows.items()}

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        calibration = [part(max(BATCH_SIZES) + i, 1) for i in range(CALIBRATION_WINDOWS)]
        rows = build_rows(model, folder, threads, calibration)
        results = {name: {} for name in rows}
        for batch in tqdm(BATCH_SIZES, desc="Batch sizes"):
            inputs = part(0, batch)
            timed = {name: lambda row=row, inputs=inputs: row(inputs) for name, row in rows.items()}
            for name, seconds in take_turns(timed, arguments.repeats).items():
                results[name][f"batch_{batch}_ms"] = seconds * 1e3
        asked = questions.select(range(min(len(questions), arguments.questions)))
        pipeline = QuestionAnsweringPipeline(model=model, tokenizer=tokenizer)
        timed = {name: lambda row=row: ask(pipeline, row, asked) for name, row in rows.items()}
        for name, seconds in take_turns(timed, arguments.repeats).items():
            results[name]["pipeline_ms_a_question"] = seconds * 1e3 / len(asked)
        curves = {
            name: latency_curve(rows[f"ours, int8, {name}"], windows, arguments.repeats)
            for name in ("full", cheapest(model.config))
        }
        models = {
            "MiniLM, transformers, fp32": ("transformers", "twin", "model.safetensors"),
            "MiniLM, ONNX Runtime, int8": ("onnxruntime", ".", "dynamic.onnx"),
            "MiniLM, OpenVINO, int8": ("openvino", ".", "openvino.bin"),
            "ours, int8, full": ("ours", arguments.model, "model.safetensors"),
        }
        for name, (kind, where, weights) in models.items():
            path = Path(folder) / where
            results[name] |= fresh_process(kind, path)
            results[name]["weights_mb"] = (path / weights).stat().st_size / 1e6
    rate = int8_rate()
    for name, measured in results.items():
        for batch in BATCH_SIZES:
            measured[f"batch_{batch}_speedup"] = results[BASELINE][f"batch_{batch}_ms"] / measured[f"batch_{batch}_ms"]
        measured["pipeline_speedup"] = results[BASELINE]["pipeline_ms_a_question"] / measured["pipeline_ms_a_question"]
        if name.startswith("ours, int8"):
            macs = model.config.macs(name.rsplit(", ", 1)[1], LENGTH)
            for batch in BATCH_SIZES:
                measured[f"batch_{batch}_times_floor"] = measured[f"batch_{batch}_ms"] / (macs * batch / rate * 1e3)
    draw_curves(curves, ROOT / "assets" / "latency.png")
    write_json(
        arguments.output,
        {
            "tokens": LENGTH,
            "repeats": arguments.repeats,
            "questions": len(asked),
            "rows": results,
            "int8_macs_a_second": rate,
            "curves": curves,
            "data": data,
            "weights_sha256": file_sha256(Path(arguments.model) / "model.safetensors"),
            **describe_run("recipe.benchmark", matplotlib),
        },
    )
    for name, measured in results.items():
        print(f"{name:40s}" + "".join(f"{measured[f'batch_{b}_ms']:10.2f} ms" for b in BATCH_SIZES))
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
