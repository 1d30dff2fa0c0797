"""Draws tests/javascript_cases.json: `python -m tests.draw_javascript_cases FOLDER`.

FOLDER holds the validation questions of the training files, as `datasets` saves them, a folder each: what
`recipe.windows` writes. By seed 24: 40 cases of a text of several windows, paragraphs of one file that follow each
other; 40 without an answer; 40 whose text has accents, emoji or Chinese, Japanese and Korean characters, a third of
each as far as there are as many; 80 of all that is left.
"""

import json
import random
import re
import sys
from pathlib import Path

import datasets

SEED = 24
EMOJI = re.compile("[\U00010000-\U0010ffff]")
CJK = re.compile("[\u3040-\u9fff\uac00-\ud7af]")
ACCENT = re.compile("[\u00c0-\u02af\u0300-\u04ff]")
LONG = (3000, 6000)  # characters
# Those whose texts others may copy on, as NOTICE says.
FILES = """afriqa-en fairytaleqa-explicit squad-v1.1-train-part squadshifts-amazon-reviews squadshifts-new-wiki
    squadshifts-reddit tydiqa-en written-documents written-wiki""".split()


def long_text(rows, draw):
    """The texts that follow a row's, with its own, one paragraph each, until there are enough characters."""
    first = draw.randrange(len(rows))
    rows = rows[first:] + rows[:first]
    texts = []
    for row in rows:
        if row["context"] not in texts:
            texts.append(row["context"])
        if sum(map(len, texts)) >= draw.randint(*LONG):
            break
    asked = draw.choice([row for row in rows if row["context"] in texts])
    return asked | {"context": "\n\n".join(texts)}


def main():
    files = {}
    for name in FILES:
        columns = datasets.load_from_disk(Path(sys.argv[1]) / name)
        files[name] = [row | {"file": name} for row in columns.select_columns(["id", "question", "context", "answers"])]
    draw = random.Random(SEED)
    left = [row for rows in files.values() for row in rows]
    draw.shuffle(left)
    cases = []

    def take(kind, number, fits):
        rows = [row for row in left if fits(row)][:number]
        for row in rows:
            left.remove(row)
            cases.append({"kind": kind, **{name: row[name] for name in ("file", "id", "question", "context")}})
        return number - len(rows)

    for name in draw.choices(FILES, [len(files[name]) for name in FILES], k=40):
        row = long_text(files[name], draw)
        cases.append({"kind": "long", **{name: row[name] for name in ("file", "id", "question", "context")}})
    take("no answer", 40, lambda row: not row["answers"]["text"])
    missing = take("emoji", 13, lambda row: EMOJI.search(row["context"]))
    missing += take("cjk", 13, lambda row: CJK.search(row["context"]))
    take("accents", 14 + missing, lambda row: ACCENT.search(row["context"]))
    take("any", 80, lambda row: True)
    content = {"drawn": f"by python -m tests.draw_javascript_cases, seed {SEED}", "cases": cases}
    path = Path(__file__).with_name("javascript_cases.json")
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
