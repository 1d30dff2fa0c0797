"""The files of a folder that holds a model: found, checked, and written whole."""

import functools
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from .length_configs_qualaminilm import is_plain_name, require

CONFIG_NAME = "config.json"
WEIGHTS_PATTERN = "model*.safetensors"


def check_weights(repository, **where):
    """Compares a repository's weights with the `weights_sha256` of its `config.json`, if it has any.

    Args:
        repository (`str`, path or `None`): as in `from_pretrained`, which has been through it: what a Hub repository
            has is in the cache. `where` are `cached_file`'s arguments.

    Raises:
        ValueError: a file has another checksum, or `weights_sha256` is no object of checksums by file name.
    """
    if repository is None:  # weights that were given, not read
        return
    try:
        path = stored_file(repository, CONFIG_NAME, local_files_only=True, **where)
        checksums = path and json.loads(Path(path).read_text(encoding="utf-8")).get("weights_sha256")
    except (AttributeError, OSError, RecursionError, ValueError):  # loading has complained of it already
        return
    if checksums is None:
        return
    legal = isinstance(checksums, dict) and all(map(is_plain_name, checksums))
    require(f"weights_sha256 in {path}", checksums, legal, "an object of SHA-256 checksums by file name")
    for name, checksum in checksums.items():
        file = Path(path).with_name(name)
        if file.is_file() and _sha256_known(file) != checksum:
            raise ValueError(
                f"{file} is not the file that weights_sha256 in {path} states: it is damaged, cut short, a Git LFS "
                f"pointer, or holds other weights. Get both files again; if it was meant, delete weights_sha256"
            )


def weights_sha256(folder):
    """SHA-256 of each safetensors file of weights in `folder`, a `dict` of `str` by file name."""
    return {each.name: file_sha256(each) for each in sorted(Path(folder).glob(WEIGHTS_PATTERN))}


def holds_weights(folder, checksums):
    """Whether files of weights stand in `folder` that have the `checksums`, an object of SHA-256 by file name."""
    if not (checksums and isinstance(checksums, dict) and all(map(is_plain_name, checksums))):
        return False
    files = {Path(folder, name): checksum for name, checksum in checksums.items()}
    return all(file.is_file() and _sha256_known(file) == checksum for file, checksum in files.items())


def _sha256_known(path):
    """[`file_sha256`] of a file of weights, read anew only if it is another than when this process last asked."""
    path = Path(path).resolve()
    stat = path.stat()
    return _sha256_of(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(maxsize=64)
def _sha256_of(path, *as_it_stands):
    return file_sha256(path)


def file_sha256(path):
    """SHA-256 of the file's bytes, in hex: what `sha256sum` prints, and the Hub for a large file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def stored_file(repository, name, **where):
    """Path of the file `name` of a repository, or beside the file `repository`; `None` where there is none."""
    if os.path.isfile(repository):
        beside = Path(repository).parent / name
        return beside if beside.is_file() else None
    from transformers.utils import cached_file  # slow to import, and of no use to who only writes files

    return cached_file(repository, name, _raise_exceptions_for_missing_entries=False, **where)


@contextmanager
def whole_file(path):
    """Within, a binary file beside `path` to write into: at the end it is on the disk and renamed into place, so that
    `path` holds the old content or the new at any moment, whole."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path, data):
    """Writes `data` (`bytes`) to `path`, all of it or nothing."""
    with whole_file(path) as file:
        file.write(data)
