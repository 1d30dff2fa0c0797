"""The JavaScript of demo/browser, called from Python."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT

BROWSER = ROOT / "demo" / "browser"
CASES = Path(__file__).with_name("javascript_cases.json")
# make installs it there where the machine has none.
NODE = shutil.which("node", path=os.pathsep.join((str(ROOT / ".venv" / "bin"), os.environ["PATH"])))
OLDEST = 20


def node_version():
    found = NODE and subprocess.run([NODE, "--version"], capture_output=True, text=True).stdout
    return int(re.match(r"v(\d+)", found)[1]) if found else 0


needs_node = pytest.mark.skipif(
    node_version() < OLDEST, reason=f"node {OLDEST} or newer is missing; make test sets it up"
)
needs_node_packages = pytest.mark.skipif(
    node_version() < OLDEST or not (BROWSER / "node_modules").is_dir(),
    reason="demo/browser/node_modules is missing; make node-packages installs it",
)


def call(calls, folder=ROOT, runtime="onnxruntime-node"):
    """What the functions of tests/javascript.mjs give with the model of a folder: a list of values, an exception for
    each that raised."""
    done = subprocess.run(
        [NODE, str(Path(__file__).with_name("javascript.mjs")), str(folder), runtime],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return [ValueError(each["error"]) if "error" in each else each.get("value") for each in json.loads(done.stdout)]


def code_units(text):
    """Where each of a text's characters begins in UTF-16 code units, and where the last one ends."""
    places = [0]
    for character in text:
        places.append(places[-1] + 1 + (character > "\uffff"))
    return places


def in_code_units(context, answers):
    """Python's answers, their places as JavaScript counts them."""
    places = code_units(context)
    return [each | {name: places[each[name]] for name in ("start", "end")} for each in answers]


def read_cases():
    return json.loads(CASES.read_text(encoding="utf-8"))["cases"]
