"""Long texts beside transformers 4.57: seconds and memory of questions put to many pages.

One question and fifty against twenty pages, and one against two hundred: `python -m recipe.long_texts --windows F
--output results/long-texts.json`, with requirements-benchmark.txt installed and .venv-4 set up, where transformers 4.57
runs `BertForQuestionAnswering` of the same weights as floats. Each pipeline has a process of its own, and they take
turns. The text is validation passages, one after the other; a page has 3,000 characters.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

PAGE = 3000  # characters
MANY = 50  # questions
PAGES, MORE_PAGES = 20, 200
TURNS = {"one": 9, "many": 1, "more pages": 1}


def answer_on_request(folder, options):
    """The process of one pipeline: for each line of standard input, JSON of questions and a text, a line of JSON with
    the seconds that they took and the peak of this process's resident MB."""
    from transformers import pipeline  # here, since this file is also the command

    qa = pipeline("question-answering", model=folder, **options)
    for line in sys.stdin:
        questions, text = json.loads(line)
        started = time.perf_counter()
        qa(question=questions if len(questions) > 1 else questions[0], context=text)
        seconds = time.perf_counter() - started
        # Not getrusage: its peak begins with that of the process which started this one.
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        print(json.dumps([seconds, int(peak[1]) / 1024]), flush=True)


def begin(python, folder, **options):
    command = [python, "-I", __file__, "--answer", str(folder), json.dumps(options)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process, questions, text):
    process.stdin.write(json.dumps([questions, text]) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args} ended")
    return json.loads(line)


def pages_of(table, seed):
    """A text of `MORE_PAGES` pages, passages in an order that `seed` draws, and questions that its first `PAGES`
    answer."""
    rows = table.shuffle(seed=seed)
    contexts = dict.fromkeys(rows["context"])
    text = "\n\n".join(contexts)
    while len(text) < MORE_PAGES * PAGE:
        text += "\n\n" + text
    first = text[: PAGES * PAGE]
    questions = [row["question"] for row in rows if row["answers"]["text"] and row["context"] in first]
    return text[: MORE_PAGES * PAGE], questions[:MANY]


def measure(processes, text, questions):
    """Name -> stage -> seconds, the median of its turns, and the peak of resident MB by then."""
    few = text[: PAGES * PAGE]
    stages = {"one": (questions[:1], few), "many": (questions, few), "more pages": (questions[:1], text)}
    found = {name: {} for name in processes}
    for process in processes.values():
        ask(process, questions[:1], few[:PAGE])  # loads what it loads late
    for stage, (asked, context) in stages.items():
        turns = [{name: ask(each, asked, context) for name, each in processes.items()} for _ in range(TURNS[stage])]
        for name in processes:
            seconds, peaks = zip(*(turn[name] for turn in turns))
            found[name][stage] = {"seconds": statistics.median(seconds), "peak_resident_mb": max(peaks)}
    return found


def main():
    from recipe import ROOT  # here, since the pipelines' processes import no more than their users do

    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder of an int8 model (the shipped one)")
    parser.add_argument("--windows", required=True, help="folder that recipe.windows wrote: validation is in it")
    parser.add_argument("--length_config", default="fast", help="a preset, beside full (fast)")
    parser.add_argument("--python4", default=str(ROOT / ".venv-4/bin/python"), help="of transformers 4.57 (.venv-4's)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of passages (0)")
    parser.add_argument("--output", required=True, help="JSON results file to write")
    arguments = parser.parse_args()
    run(arguments)


def run(arguments):
    import tempfile

    import torch

    from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
    from recipe.data import load_tokenizer
    from recipe.peers import transformers_twin
    from recipe.results import describe_run, write_json
    from recipe.windows import validation_questions

    text, questions = pages_of(validation_questions(arguments.windows), arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model, dtype=torch.float32)
        transformers_twin(model.eval().dequantize()).save_pretrained(folder)
        load_tokenizer(arguments.model).save_pretrained(folder)
        ours = {"trust_remote_code": True}
        processes = {
            "MiniLM, transformers 4.57, fp32": begin(arguments.python4, folder),
            "ours, int8, full": begin(sys.executable, arguments.model, **ours),
            f"ours, int8, {arguments.length_config}": begin(
                sys.executable, arguments.model, **ours, length_config=arguments.length_config
            ),
        }
        try:
            rows = measure(processes, text, questions)
        finally:
            for process in processes.values():
                process.kill()
    found = {
        "rows": rows,
        "pages": {"one": PAGES, "many": PAGES, "more pages": MORE_PAGES},
        "characters_a_page": PAGE,
        "questions": {"one": 1, "many": len(questions), "more pages": 1},
        "turns": TURNS,
        **describe_run("recipe.long_texts"),
    }
    write_json(arguments.output, found)
    for name, stages in rows.items():
        figures = (
            f"{stage} {each['seconds']:.2f} s, {each['peak_resident_mb']:.0f} MB" for stage, each in stages.items()
        )
        print(f"{name}: {'; '.join(figures)}")
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer_on_request(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
