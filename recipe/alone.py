"""One row of the benchmark in a process of its own: `python -I recipe/alone.py KIND PATH STARTED`.

It imports what a user of that row imports, and no other file of the recipe. Prints the seconds from STARTED, the
`time.monotonic()` of whoever began this process, to its first answer, of 384 tokens, and the peak of resident MB.
"""

import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
LENGTH = 384
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def transformers(path, **arguments):
    import torch
    from transformers import BertForQuestionAnswering

    model = BertForQuestionAnswering.from_pretrained(path, **arguments)
    with torch.inference_mode():
        model(**{name: torch.ones(1, LENGTH, dtype=torch.long) for name in INPUTS})


def transformers_bf16(path):
    import torch

    transformers(path, dtype=torch.bfloat16)


def ours(path, **arguments):
    import torch
    from transformers import AutoModelForQuestionAnswering

    model = AutoModelForQuestionAnswering.from_pretrained(path, trust_remote_code=True, **arguments)
    with torch.inference_mode():
        model(**{name: torch.ones(1, LENGTH, dtype=torch.long) for name in INPUTS})


def ours_torch(path):
    ours(path, engine="torch")


def without_torch(path):
    sys.path.insert(0, path)
    from reader import Reader

    # With the question's two words and three special tokens.
    Reader(path)("Which word?", "word " * (LENGTH - 6))


def onnx_runtime(path):
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    session.run(None, {name: np.ones((1, LENGTH), np.int64) for name in INPUTS})


def open_vino(path):
    import numpy as np
    import openvino

    openvino.compile_model(path, "CPU")({name: np.ones((1, LENGTH), np.int64) for name in INPUTS})


def main():
    kind, path, started = sys.argv[1:]
    globals()[kind](path)
    seconds = time.monotonic() - float(started)
    # Not getrusage: its peak begins with that of the process which started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(seconds, int(peak[1]) / 1024)


if __name__ == "__main__":
    main()
