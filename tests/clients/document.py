"""The blocks of docs/clients.md, for the scripts beside this file to run."""

import os
import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ASKED = {"question": "Where do I live?", "context": "My name is Wolfgang and I live in Berlin."}


def blocks(title, language="python"):
    """The blocks in `language` under the heading that begins with `title`, a `list` of `str`."""
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    (section,) = [part for part in text.split("\n## ")[1:] if part.startswith(title)]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def run(code, **names):
    """The names that a block has defined, given those that it takes as defined."""
    names |= {"__name__": "__main__"}
    exec(compile(code, "docs/clients.md", "exec"), names)
    return names


def enter_clone():
    """Goes to a new folder that holds what a clone does, so that what a block writes stays out of this one."""
    folder = Path(tempfile.mkdtemp(prefix="clone-"))
    for path in ROOT.glob("[!.]*"):
        (folder / path.name).symlink_to(path)
    os.chdir(folder)
    return folder
