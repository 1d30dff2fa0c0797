"""`make weights` in small, by hand: `python -m tests.rehearse_weights FOLDER`, on 500 questions of ../shared/data.

Once through, then once killed in the teacher's stage and once in the student's: both must end with the same weights and
presets, bit for bit. Under 20 minutes each on two cores.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from qualaminilm.files_qualaminilm import file_sha256
from tests.conftest import DATA, ROOT

SAME = ("model.safetensors", "length_configs.json")


def draw_questions(path):
    articles = json.loads((DATA / "written-wiki.json").read_text(encoding="utf-8"))["data"]
    random.Random(0).shuffle(articles)
    drawn, questions = [], 0
    while questions < 500:
        drawn.append(articles.pop())
        questions += sum(len(paragraph["qas"]) for paragraph in drawn[-1]["paragraphs"])
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"version": "v2.0", "data": drawn}), encoding="utf-8")


def start(folder, output):
    stages, data = ROOT / "tests" / "stages", folder / "data"
    options = ["--stages", stages, "--data", data, "--output_dir", folder / output]
    return subprocess.Popen([sys.executable, "-m", "recipe.weights", *map(str, options)], cwd=ROOT, process_group=0)


def finish(folder, output):
    started = time.monotonic()
    assert start(folder, output).wait() == 0
    print(f"{output}: {(time.monotonic() - started) / 60:.1f} minutes")
    return {name: file_sha256(folder / output / "search" / name) for name in SAME}


def kill_when(folder, output, exists):
    running = start(folder, output)
    while not (folder / output / exists).exists():
        assert running.poll() is None
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    print(f"{output}: killed when {exists} was there")


def main():
    folder = Path(sys.argv[1]).resolve()
    draw_questions(folder / "data" / "questions.json")
    whole = finish(folder, "whole")
    kill_when(folder, "killed", "teacher/checkpoint-4/trainer_state.json")
    kill_when(folder, "killed", "student/checkpoint-40/trainer_state.json")
    killed = finish(folder, "killed")
    print(*(f"{name}: {whole[name]} {killed[name]}" for name in SAME), sep="\n")
    assert whole == killed


if __name__ == "__main__":
    main()
