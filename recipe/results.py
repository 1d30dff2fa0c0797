"""What every results file says of the run that wrote it, and how files and folders come to stand whole."""

import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from qualaminilm.files_qualaminilm import whole_file, write_whole

INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def describe_run(module, *packages):
    """Commit, machine, date, command and versions of the run of `python -m module`, which computed with `packages`."""
    return {
        "commit": commit(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{each.__name__: each.__version__ for each in (torch, transformers, *packages)},
        },
    }


def describe_engine(model):
    """What computes the logits of a [`QuaLAMiniLMForQuestionAnswering`], in words."""
    return "torch" if model.engine is None else "ONNX Runtime, where it is the faster"


def commit():
    """The commit of this clone, with a + where files that it tracks are others; `None` outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + "+" * bool(changed)


def processor():
    """Its name, how many cores, and those of its instructions that int8 and bfloat16 depend on."""
    name = cpuinfo().get("model name", platform.processor())
    return f"{name}, {os.cpu_count()} cores, {' '.join(each for each in INSTRUCTIONS if cpu_has(each))}"


def cpu_has(*instructions):
    """Whether Linux says that the processor has one of these."""
    return bool(set(cpuinfo().get("flags", "").split()) & set(instructions))


def cpuinfo():
    """What Linux says of the last core, by name; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else ()
    return dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)


def write_json(path, content):
    """Writes indented JSON beside `path`, then renames it into place."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(path), (json.dumps(content, indent=2) + "\n").encode())


def save_figure(figure, path, **options):
    """Saves a matplotlib figure beside `path`, in the format of its suffix (PNG if it has none), then renames it into
    place. `options` are of `savefig`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", **options)


@contextmanager
def whole_folder(path):
    """Within, a folder beside `path` to write into: renamed to `path` at the end, gone if that is not reached.

    Raises:
        FileExistsError: `path` exists.
        OSError: what was to be written could not be.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists, expected a folder that is yet to be made")
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
