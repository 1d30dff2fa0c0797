"""Make the weights, stage by stage, out of the base packages and the data: `python -m recipe.weights`.

Each file of recipe/stages/ is one stage: a command of the recipe, what it reads and its settings. A stage is done again
when its settings, or the files, packages, models or stages that it reads, are others than those that it was made from.
What was stopped goes on when the same command is given again.
"""

import argparse
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from qualaminilm.files_qualaminilm import file_sha256
from recipe import ROOT
from recipe.results import write_json

LONG = 1.0  # hours of work that are not discarded unasked
KEYS = {"module", "hours", "resumes", "stages", "files", "repository", "models", "packages", "settings"}


class Stage:
    """A stage as its file describes it, and what is recorded of its output.

    Args:
        path: of the file, `N-NAME.toml`. Its keys are

            - module: what `python -m` runs;
            - hours: about how long that takes;
            - resumes: whether the command goes on from what stands in its output folder;
            - stages, files: tables of the command's options, whose values are a stage before it, and files in the
              folder of the data, or patterns of some;
            - repository: as files, of this repository, relative to its root;
            - models: a table of its options that are folders of finished models, relative to the repository's root;
            - packages: installed ones that it reads;
            - settings: a table of its other options.
        data, output: folders, of the data and for what is made.

    Raises:
        ValueError: the file has another key or no module, or names files that do not exist, or two of one name.
    """

    def __init__(self, path, data, output):
        described = tomllib.loads(path.read_text(encoding="utf-8"))
        if not {"module"} <= described.keys() <= KEYS:
            raise ValueError(f"{path} has {sorted(described)}, expected module and some of {sorted(KEYS - {'module'})}")
        self.name = path.stem.partition("-")[2]
        self.module = described["module"]
        self.hours, self.resumes = described.get("hours", 0), described.get("resumes", False)
        self.stages, self.packages = described.get("stages", {}), described.get("packages", [])
        self.models, self.settings = described.get("models", {}), described.get("settings", {})
        self.files = {}
        for folder, options in ((data, described.get("files", {})), (ROOT, described.get("repository", {}))):
            for option, pattern in ((option, each) for option, patterns in options.items() for each in patterns):
                found = sorted(folder.glob(pattern))
                if not found:
                    raise ValueError(f"{path}: {option} is {pattern!r}, and no such file is in {folder}")
                self.files.setdefault(option, []).extend(found)
        for option, paths in self.files.items():
            if len({file.name for file in paths}) < len(paths):  # by which they are known
                raise ValueError(f"{path}: {option} has two files of one name")
        self.folder, self.record = output / self.name, output / f"{self.name}.json"
        known = json.loads(self.record.read_text()) if self.record.exists() else {}
        self.known = {"made_from": None, "hours": 0.0, "finished": False} | known

    def made_from(self, before):
        """What its output follows from, a dict; `before` has those of the stages before it, by name.

        Raises:
            ValueError: it reads a stage that does not come before it.
        """
        for name in self.stages.values():
            if name not in before:
                raise ValueError(f"stage {self.name} reads stage {name}, which does not come before it")
        found = {
            "module": self.module,
            "settings": self.settings,
            "stages": {option: sha256(before[name]) for option, name in self.stages.items()},
            "files": {option: {path.name: file_sha256(path) for path in paths} for option, paths in self.files.items()},
            # Of an installed package RECORD holds every file's hash.
            "packages": {name: sha256(distribution(name).read_text("RECORD")) for name in self.packages},
        }
        models = {option: sha256_of_model(ROOT / folder) for option, folder in self.models.items()}
        return found | ({"models": models} if models else {})

    def command(self):
        options = {option: self.folder.with_name(name) for option, name in self.stages.items()}
        options |= self.files | self.models | self.settings | {"output_dir": self.folder}
        command = [sys.executable, "-m", self.module]
        for option, value in options.items():
            values = value if isinstance(value, list) else [value]
            command += [f"--{option}", *(json.dumps(each) if isinstance(each, dict) else str(each) for each in values)]
        return command

    def discard(self):
        """Removes its output, and what the command keeps beside it until that is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.folder.parent.glob(f"{self.name}.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.known = {"made_from": None, "hours": 0.0, "finished": False}

    def run(self, made_from, lock):
        """Runs the command to its end, and records as it goes for how long it has worked.

        Args:
            lock: an open file, which the command holds open too.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        before, started = self.known["hours"], time.monotonic()

        def record(finished):
            hours = before + (time.monotonic() - started) / 3600
            self.known = {"made_from": made_from, "hours": round(hours, 4), "finished": finished}
            write_json(self.record, self.known)

        record(False)
        if not self.resumes:
            shutil.rmtree(self.folder, ignore_errors=True)
        with subprocess.Popen(self.command(), cwd=ROOT, pass_fds=[lock.fileno()]) as process:
            while process.poll() is None:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    record(False)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        record(True)


def sha256(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_model(folder):
    """Of its weights and its tokenizer."""
    return sha256({path.name: file_sha256(path) for path in (*folder.glob("*.safetensors"), folder / "tokenizer.json")})


def differences(before, after, name=""):
    """Lines that say what differs between two nested dicts."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [line for key in keys for line in differences(before.get(key), after.get(key), f"{name} {key}".strip())]
    return [] if before == after else [f"{name}: {before}, now {after}"]


def plan(stages, again):
    """For each stage what it is made from, and what is to be done: `None`, `"begin"`, `"go on"` or `"again"`.

    Raises:
        ValueError: more than an hour's work of a stage that `again` does not name is to be discarded.
    """
    before, steps = {}, {}
    for stage in stages:
        before[stage.name] = stage.made_from(before)
        stale = [] if stage.known["made_from"] is None else differences(stage.known["made_from"], before[stage.name])
        if stale and stage.known["hours"] > LONG and stage.name not in again:
            raise ValueError(
                f"stage {stage.name} was made from other things, in {stage.known['hours']:.1f} hours; "
                f"--again {stage.name} discards that. What differs:\n  " + "\n  ".join(stale)
            )
        if stale or stage.name in again:
            steps[stage.name] = "again"
        elif stage.known["finished"]:
            steps[stage.name] = None
        else:
            steps[stage.name] = "begin" if stage.known["made_from"] is None else "go on"
    return before, steps


def describe(stage, step):
    expected = f"about {stage.hours:g} h" if stage.hours else "minutes"
    state = {
        None: f"done, in {stage.known['hours']:.2f} h",
        "begin": f"to do, {expected}",
        "again": f"to do again, {expected}",
        "go on": f"to go on, after {stage.known['hours']:.2f} h of {expected}",
    }
    return f"  {stage.name:10} {state[step]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--stages", type=Path, default=Path(__file__).with_name("stages"), help="their files' folder")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "weights", help="folder for all that is made")
    parser.add_argument("--again", nargs="+", default=[], metavar="STAGE", help="do these again, discarding their work")
    parser.add_argument("--dry_run", action="store_true", help="say what is left, do nothing")
    arguments = parser.parse_args()
    output = arguments.output_dir.resolve()
    output.mkdir(parents=True, exist_ok=True)
    files = sorted(arguments.stages.glob("*.toml"), key=lambda path: int(path.stem.partition("-")[0]))
    with open(output / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"--output_dir {output} is being worked in")
        stages = [Stage(path, arguments.data.resolve(), output) for path in files]
        unknown = set(arguments.again) - {stage.name for stage in stages}
        if unknown:
            parser.error(f"--again {min(unknown)}: the stages are {', '.join(stage.name for stage in stages)}")
        made_from, steps = plan(stages, arguments.again)
        print(
            f"Stages of {arguments.stages}, in {output}:",
            *(describe(each, steps[each.name]) for each in stages),
            sep="\n",
        )
        if arguments.dry_run:
            return
        for stage in stages:
            step = steps[stage.name]
            if step == "again":
                stage.discard()
            if step:
                print(f"{stage.name}: {step}", flush=True)
                stage.run(made_from[stage.name], lock)
    print(f"All stages are done. {stages[-1].folder} is the model; python -m recipe.ship makes it the shipped one.")


if __name__ == "__main__":
    main()
