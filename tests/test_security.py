"""What is shipped runs no code out of data, asks no network unasked, and says exactly what it depends on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from qualaminilm.configuration_qualaminilm import CODE_FILES

SHIPPED = sorted(
    [
        *ROOT.glob("*.py"),
        *(path for folder in ("recipe", "demo", "qualaminilm") for path in (ROOT / folder).rglob("*.py")),
    ]
)
RUNS_DATA = {"eval", "exec", "compile", "__import__"}  # builtins, called by their bare name
UNPICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "numpy_pickle"}


def faults(source):
    """What of `source` could run code that stands in data: a list of "line: what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [each.name for each in node.names] + [getattr(node, "module", None) or ""]
            found += [f"{node.lineno}: import {name}" for name in names if UNPICKLES & {*name.split(".")}]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if name in RUNS_DATA or name.startswith("builtins."):
                found.append(f"{node.lineno}: {name}")
            if name in ("torch.load", "torch.jit.load") and keywords.get("weights_only") != "True":
                found.append(f"{node.lineno}: {name} without weights_only=True")
            if keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False":
                found.append(f"{node.lineno}: {name} with allow_pickle or shell")
            if name in ("os.system", "os.popen", "joblib.load"):
                found.append(f"{node.lineno}: {name}")
    return found


def test_what_is_shipped_runs_nothing_out_of_data():
    assert {ROOT / name for name in CODE_FILES} < set(SHIPPED)
    assert {str(path): faults(path.read_text(encoding="utf-8")) for path in SHIPPED} == {
        str(path): [] for path in SHIPPED
    }


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle as fine",
        "eval(text)",
        "model = exec(text)",
        "import builtins\nbuiltins.eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "joblib.load(path)",
    ],
)
def test_the_scan_finds_what_it_looks_for(source):
    assert len(faults(source)) == 1


def test_the_scan_leaves_methods_alone():
    assert faults("model.eval()\nre.compile(text)\ntorch.load(path, weights_only=True)\ntorch.compile(model)") == []


IMPORTS_ALONE = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", CODE_FILES)
def test_remote_code_imports_only_what_its_users_have(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {each.name.split(".")[0] for each in node.names} <= IMPORTS_ALONE
        elif isinstance(node, ast.ImportFrom):
            assert f"{node.module}.py" in CODE_FILES if node.level else node.module.split(".")[0] in IMPORTS_ALONE


WITHOUT_NETWORK = """
import os, socket, sys, traceback

def refuse(*args, **kwargs):
    traceback.print_stack()
    os._exit(1)  # no handler catches this, and no thread hides it

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    __import__(f"qualaminilm.{name}")
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
assert QuaLAMiniLMForQuestionAnswering.from_pretrained(sys.argv[1]).length_presets
print("quiet")
"""


def test_import_and_load_ask_no_network(tmp_path):
    """Nor does a load from a folder, though nothing told transformers that there is no network."""
    names = [Path(name).stem for name in CODE_FILES]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK, str(ROOT), *names], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["quiet"], done.stderr


def unpinned(text):
    """Lines of a requirements file that allow several versions, and no comment above says why."""
    found, before = [], ""
    for line in text.splitlines():
        exact = re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+|-r requirements[\w-]*\.txt|#.*", line)
        if not exact and not before.startswith("# Not one version:"):
            found.append(line)
        before = line
    return found


def test_every_requirement_is_pinned_or_says_why_not():
    files = sorted(ROOT.glob("requirements*.txt"))
    assert len(files) >= 7
    assert {path.name: unpinned(path.read_text(encoding="utf-8")) for path in files} == {
        path.name: [] for path in files
    }
    text = "torch==2.1\n-r requirements.txt\ntorch\ntorch>=2\ntorch==2.*\n# Not one version: x\ntorch<3\ntorch~=2"
    assert unpinned(text) == ["torch", "torch>=2", "torch==2.*", "torch~=2"]
