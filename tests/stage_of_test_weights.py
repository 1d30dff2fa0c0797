"""A stage for tests/test_weights.py: writes what it reads, step by step, and goes on from what it wrote."""

import argparse
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--stage", type=Path)
parser.add_argument("--data", type=Path, nargs="*", default=[])
parser.add_argument("--steps", type=int, default=1)
parser.add_argument("--pause", type=float, default=0)
arguments = parser.parse_args()
sources = [*arguments.data, *([arguments.stage / "steps"] if arguments.stage else [])]
text = "".join(path.read_text() for path in sources)
arguments.output_dir.mkdir(exist_ok=True)
steps = arguments.output_dir / "steps"
with (arguments.output_dir.parent / "runs").open("a") as runs:
    runs.write(f"{arguments.output_dir.name} from {steps.exists() and len(steps.read_text().splitlines())}\n")
for step in range(len(steps.read_text().splitlines()) if steps.exists() else 0, arguments.steps):
    time.sleep(arguments.pause)
    with steps.open("a") as file:
        file.write(f"{step} {text!r}\n")
