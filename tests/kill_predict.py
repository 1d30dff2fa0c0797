"""Kills a job of recipe.predict at random moments, gives the command again, and counts what came of every row.

The long form of a test: `PYTHONPATH=. python tests/kill_predict.py FOLDER --rows 20000 --kills 3 --workers 2`.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_rows(path, rows, padding):
    """A file of short questions, every 50th of them empty, in lines of about `padding` bytes, so that it has parts."""
    with path.open("w") as file:
        for i in range(rows):
            question = "" if i % 50 == 7 else f"Where does number {i} live?"
            context = f"Number {i} lives in town {i % 89}, not in town {i % 97}."
            row = {"id": f"row {i}", "question": question, "context": context, "padding": " " * padding}
            file.write(json.dumps(row) + "\n")


def children(pid):
    """Ids of a process's children, none if it has ended."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def alive(pid):
    """Whether a process runs: not one that has ended and waits for its exit to be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_and_resume(command, output, kills, seed=0):
    """Runs `command`, which writes `output`, kills it `kills` times at random moments, and lets it end.

    Returns:
        a `list` of `int`: how many parts were finished at each kill.
    """
    draw, killed = random.Random(seed), []
    folder = output.with_name(output.name + ".parts")

    def finished():
        return len(list(folder.glob(f"*{output.suffix}"))) if folder.exists() else 0

    for kill in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not (folder / "job.json").exists() and process.poll() is None:
            time.sleep(0.01)
        parts = len(json.loads((folder / "job.json").read_text())["parts"])
        # A moment of this kill's share of the work.
        moment = draw.uniform(kill + 0.2, kill + 1) * parts / (kills + 0.5)
        while finished() < moment and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
        workers = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
        deadline = time.monotonic() + 300
        while any(map(alive, workers)):
            assert time.monotonic() < deadline, "workers outlive the process that started them"
            time.sleep(0.01)
        killed.append(finished())
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return killed


def check_rows(path, output):
    """Every row of `path` must stand exactly once: in `output`, in its order, or in its side file.

    Returns:
        how many stand in either (`int`, `int`).
    """
    rows = [json.loads(line) for line in path.open()]
    answers = [json.loads(line) for line in output.open()]
    bad = [json.loads(line) for line in output.with_name(output.name + ".bad.jsonl").open()]
    assert [row["id"] for row in rows if row["question"]] == [answer["id"] for answer in answers]
    assert [row["id"] for row in rows if not row["question"]] == [row["id"] for row in bad]
    assert set(Counter(row["id"] for row in answers + bad).values()) == {1}
    contexts = {row["id"]: row["context"] for row in rows}
    assert all(contexts[row["id"]][row["start"] : row["end"]] == row["answer"] for row in answers)
    return len(answers), len(bad)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write rows and answers")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default=".", help="folder of the model (this one)")
    parser.add_argument("--seed", type=int, default=time.time_ns(), help="of the moments (the time)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path, output = arguments.folder / "rows.jsonl", arguments.folder / "answers.jsonl"
    write_rows(path, arguments.rows, padding=500)
    command = [sys.executable, "-m", "recipe.predict", str(path), str(output), "--workers", str(arguments.workers)]
    killed = kill_and_resume([*command, "--model", arguments.model], output, arguments.kills, arguments.seed)
    answers, bad = check_rows(path, output)
    print(f"{arguments.rows} rows, killed with {killed} parts finished (--seed {arguments.seed}):", end=" ")
    print(f"{answers} answers, {bad} bad rows, each id exactly once")


if __name__ == "__main__":
    main()
