"""What every results file says of the run that wrote it, and how files and folders come to stand whole."""

import datetime
import json
import os
import platform
import shlex
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

from qualaminilm.configuration_qualaminilm import write_beside_then_rename


def describe_run(module, *packages):
    """Threads, date, command and versions of the run of `python -m module`, which computed with `packages` too."""
    return {
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{each.__name__: each.__version__ for each in (torch, transformers, *packages)},
        },
    }


def write_json(path, content):
    """Writes indented JSON beside `path`, then renames it into place."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_beside_then_rename(Path(path), json.dumps(content, indent=2) + "\n")


def save_figure(figure, path, **options):
    """Saves a matplotlib figure beside `path`, in the format of its suffix (PNG if it has none), then renames it into
    place. `options` are of `savefig`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    figure.savefig(unfinished, format=path.suffix[1:] or "png", **options)
    os.replace(unfinished, path)


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
