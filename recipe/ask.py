"""Ask your own documents: `python -m recipe.ask "Who signed it?" contract.pdf mails/`, after `pip install -r
requirements-ask.txt`.

Reads text, Markdown, HTML, PDF and e-mail files, and folders of them. Prints the answers, the surest first, each with
its file, page and line; ends with the exit status 1 where the files do not say, and 2 where none could be read.
"""

import argparse
import heapq
import itertools
import json
import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm
from transformers import pipeline

from recipe import ROOT
from recipe.documents import texts

TOGETHER = 32  # texts that are answered at once
LINE = 100  # characters of the line shown around an answer


def files_in(paths):
    """The files that `paths` name, those of folders in the order of their names; hidden ones of folders are not."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def readable(paths, report):
    """Yields (file, page, text) of each text in `paths`; `report` is called with a line for each file without one."""
    for path in paths:
        try:
            found = texts(path)
        except (OSError, ValueError) as error:
            report(f"{path}: {error.strerror if isinstance(error, OSError) and error.strerror else error}")
            continue
        yield from ((path, page, text) for page, text in found)


def answers(qa, question, found):
    """Yields a dict for each of `found`, (file, page, text), that has an answer; `qa` is the pipeline."""
    found = iter(found)
    while together := list(itertools.islice(found, TOGETHER)):
        examples = [{"question": question, "context": text} for _, _, text in together]
        for (path, page, text), answer in zip(
            together, qa(examples, handle_impossible_answer=True, return_answerable=True)
        ):
            if answer["answer"]:
                where = {"file": str(path), "page": page, "start": answer["start"], "end": answer["end"]}
                line = line_around(text, answer["start"], answer["end"])
                yield {"answer": answer["answer"], "answerable": answer["answerable"]} | where | {"line": line}


def line_around(text, start, end):
    """The line that `text[start:end]` stands in, cut to about `LINE` characters around it, blanks run together."""
    first = max(text.rfind("\n", 0, start) + 1, start - LINE // 2)
    stop = text.find("\n", end)
    last = min(len(text) if stop < 0 else stop, end + LINE // 2)
    if first > 0 and text[first - 1] not in "\n":
        first = text.find(" ", first, start) + 1 or first
    if last < len(text) and text[last] != "\n":
        last = max(text.rfind(" ", end, last), end)
    return " ".join(text[first:last].split())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("question")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a file, or a folder of them")
    parser.add_argument("--model", default=str(ROOT), help="folder of the model (the shipped one)")
    parser.add_argument("--length_config", default="full", help="a preset's name (full)")
    parser.add_argument("--top_k", type=int, default=5, help="answers to print, at most one a page (%(default)s)")
    parser.add_argument("--jsonl", action="store_true", help="print a JSON object a line")
    arguments = parser.parse_args()
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what stops it comes as an exception, with the file's name
    unread = 0

    def report(line):
        nonlocal unread
        unread += 1
        tqdm.write(line, file=sys.stderr)

    try:
        qa = pipeline(
            "question-answering", model=arguments.model, trust_remote_code=True, length_config=arguments.length_config
        )
        paths = list(files_in(arguments.files))
        progress = tqdm(paths, desc="Reading", unit="file", disable=None)
        found = answers(qa, arguments.question, readable(progress, report))
        best = heapq.nlargest(arguments.top_k, found, key=lambda answer: answer["answerable"])
    except ValueError as error:
        parser.error(str(error))
    for answer in best:
        if arguments.jsonl:
            print(json.dumps(answer, ensure_ascii=False))
        else:
            page = f", page {answer['page']}" if answer["page"] else ""
            text = " ".join(answer["answer"].split())
            print(f"{text}\n    {answer['answerable']:.2f}  {answer['file']}{page}: {answer['line']}")
    if not best:
        if not arguments.jsonl:
            print("Not in these files.")
        sys.exit(2 if unread == len(paths) else 1)


if __name__ == "__main__":
    main()
