"""What is shipped asks no network unasked, and says exactly what it depends on. `make lint` looks for code that runs
what stands in data."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

from conftest import ROOT
from qualaminilm.configuration_qualaminilm import CODE_FILES

IMPORTS_ALONE = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", *sys.stdlib_module_names}
# Within `try` alone, or transformers demands it of everybody.
USED_WHERE_FOUND = {"onnxruntime"}


@pytest.mark.parametrize("name", CODE_FILES)
def test_remote_code_imports_only_what_its_users_have(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {each.name.split(".")[0] for each in node.names} <= IMPORTS_ALONE | USED_WHERE_FOUND
        elif isinstance(node, ast.ImportFrom):
            assert f"{node.module}.py" in CODE_FILES if node.level else node.module.split(".")[0] in IMPORTS_ALONE
    assert not USED_WHERE_FOUND.intersection(get_imports(ROOT / name))


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


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_every_requirement_is_pinned_or_says_why_not(path):
    before = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        exact = re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+|-r requirements[\w-]*\.txt|#.*", line)
        assert exact or before.startswith("# Not one version:"), line
        before = line
