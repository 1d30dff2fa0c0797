"""What every results file says of the run that wrote it, and how it is written."""

import datetime
import json
import platform
import shlex
import sys
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
