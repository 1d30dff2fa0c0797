"""How many of the cases JavaScript answers as Python does: `PYTHONPATH=tests python -m tests.compare_javascript
MODEL RESULTS`.

MODEL is a folder with the graph beside the weights. Both run the graph, Python in onnxruntime, JavaScript in Node by
onnxruntime-node and by onnxruntime-web, whose WebAssembly is the browser's. What Python's logits make in JavaScript is
compared too. Writes the results file, and ends with the exit status 1 where fewer are alike than `LEAST`.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from qualaminilm.reading_qualaminilm import Reading
from recipe.browser import write_model
from recipe.results import describe_run, write_json
from tests.javascript import call, in_code_units, read_cases

PRESETS = ("full", "fast")
RUNTIMES = ("onnxruntime-node", "onnxruntime-web")
SAME_LOGITS = "the same logits"
LEAST = {SAME_LOGITS: 200, "onnxruntime-node": 196, "onnxruntime-web": 196}  # of 200


class Graph:
    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, window, shares):
        inputs = {name: array[None] for name, array in window.model_inputs().items()}
        inputs["length_config"] = np.array(shares, np.float32)
        return np.concatenate(self.session.run(["start_logits", "end_logits"], inputs))[:, window.scored()]


def main():
    cases, rows = read_cases(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "model"
        write_model(folder, sys.argv[1])
        reading = Reading(Tokenizer.from_file(str(folder / "tokenizer.json")), 384, 512)
        graph = Graph(folder / "model.onnx")
        for preset in PRESETS:
            (lengths,) = call([["tokenLengths", preset]], folder)
            expected, calls = [], []
            for case in cases:
                windows = reading.windows(case["question"], reading.tokens(case["context"]))
                logits = [graph(window, [each / 1000 for each in lengths["entries"]]) for window in windows]
                expected += in_code_units(case["context"], [reading.best(case["context"], windows, logits)])
                given = [each.tolist() for each in logits]
                calls.append(["best", case["question"], case["context"], {}, given])
            rows.append(compared(preset, SAME_LOGITS, expected, [found["answers"] for found in call(calls, folder)]))
            calls = [["answer", case["question"], case["context"], {"length_config": preset}] for case in cases]
            for runtime in RUNTIMES:
                rows.append(compared(preset, runtime, expected, call(calls, folder, runtime)))
    run = describe_run("tests.compare_javascript", onnxruntime)
    write_json(sys.argv[2], run | {"cases": len(cases), "rows": rows})
    print(f"Wrote {sys.argv[2]}")
    sys.exit(any(row["alike"] < LEAST[row["how"]] for row in rows))


def compared(preset, how, expected, found):
    alike = sum(
        all(one[key] == other[key] for key in ("start", "end", "answer")) for one, other in zip(expected, found)
    )
    apart = max(abs(one["score"] - other["score"]) for one, other in zip(expected, found))
    print(f"{preset}, {how}: {alike} of {len(expected)} answers alike, scores at most {apart:.1e} apart", flush=True)
    return {"preset": preset, "how": how, "alike": alike, "scores_apart": apart}


if __name__ == "__main__":
    main()
