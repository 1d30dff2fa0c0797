"""Nothing is trained or chosen on a test set, whatever its file is called and however it was saved: questions tell.

`python -m recipe.test_sets ../shared/data/squad-v1.1-dev.json ../shared/data/squad-v2.0-dev.json` wrote test_sets.bin.
"""

import argparse
import hashlib
import re
import unicodedata
from pathlib import Path

import numpy as np

from qualaminilm.files_qualaminilm import whole_file
from recipe.data import read_questions

DIGESTS = Path(__file__).with_name("test_sets.bin")
# Of a source's questions, so many may be a test set's by chance. Of the training files that have any, `tydiqa-en` has
# most, 0.14 % ("When did the Roman Empire fall?").
CHANCE = 0.01


def digests(questions):
    """uint32 (questions,): of each question's letters and digits, without case. By chance one in 260,000 is a test
    set's."""
    plain = (re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", each).casefold()) for each in questions)
    return np.frombuffer(b"".join(hashlib.sha256(each.encode()).digest()[:4] for each in plain), "<u4")


def in_test_sets(source):
    """How many questions of `source`, as in [`read_questions`], are a test set's, and how many it has."""
    questions = read_questions(source)["question"][:]
    return int(np.isin(digests(questions), np.fromfile(DIGESTS, "<u4")).sum()), len(questions)


def is_test_set(source):
    """Whether more questions of `source` are a test set's than can be by chance."""
    found, questions = in_test_sets(source)
    return found > CHANCE * questions


def refuse_test_sets(option, sources):
    """Lets only `sources` pass that are no test sets.

    Raises:
        ValueError: one of them is; `option` is what it was given as.
    """
    for source in sources:
        if is_test_set(source):
            found, questions = in_test_sets(source)
            raise ValueError(
                f"{option} {source} is a test set: {found} of its {questions} questions are among those of SQuAD's "
                f"development sets, expected data to train or choose on"
            )


def main():
    parser = argparse.ArgumentParser(description="Write the digests of the test sets' questions.")
    parser.add_argument("data", nargs="+", help="SQuAD JSON files")
    sources = parser.parse_args().data
    found = np.unique(np.concatenate([digests(read_questions(source)["question"][:]) for source in sources]))
    with whole_file(DIGESTS) as file:
        found.tofile(file)
    print(f"Wrote {len(found)} digests to {DIGESTS}")


if __name__ == "__main__":
    main()
