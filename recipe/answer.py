"""Prints the answer to the environment's QUESTION out of its CONTEXT, on one line: what `make answer` runs."""

import os

from transformers import pipeline

from recipe import ROOT


def main():
    answerer = pipeline("question-answering", model=str(ROOT), trust_remote_code=True)
    try:
        answer = answerer(question=os.environ["QUESTION"], context=os.environ["CONTEXT"])
    except ValueError as error:
        raise SystemExit(f"make answer: {error}") from error
    print(" ".join(answer["answer"].split()))


if __name__ == "__main__":
    main()
