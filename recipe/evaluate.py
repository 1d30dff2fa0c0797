"""Official SQuAD EM and F1 at any length config: `python -m recipe.evaluate --data FILE --output results/NAME.json`.

Every question goes through the pipeline that people use, windows of long contexts included.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torchmetrics
from torchmetrics.functional.text import squad
from tqdm import tqdm

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from recipe import ROOT
from recipe.data import SOURCE, SPLITS, file_sha256, identities, load_tokenizer, read_sources, with_answers
from recipe.presets import parse_length_config, record_scores
from recipe.results import describe_engine, describe_run, write_json
from recipe.test_sets import is_test_set

TEST_LOG = ROOT / "results" / "test-runs.jsonl"

# Tokens, as in the usual evaluation of BERT on SQuAD; the pipeline's own default is 15.
MAX_ANSWER_LEN = 30


def answer_all(pipeline, questions, batch_size, length_config, progress=True, **parameters):
    """Answers every question, shortest first.

    Args:
        pipeline: a `QuestionAnsweringPipeline`.
        questions: a table of :func:`recipe.data.read_questions`.
        batch_size: windows that pass through the model together.
        length_config: see `QuaLAMiniLMConfig.token_lengths`.
        progress: whether to show a progress bar.
        parameters: other arguments of the pipeline; answers have up to `MAX_ANSWER_LEN` tokens unless they say.

    Returns:
        the answers' texts, in the order of `questions`, and the number of real tokens of every window, a `list` of
        `int`.
    """
    examples = [{"question": q, "context": c} for q, c in zip(questions["question"], questions["context"])]
    lengths = [[len(window) for window in pipeline.preprocess(example)] for example in examples]
    order = sorted(range(len(examples)), key=lambda i: lengths[i])
    texts = [None] * len(examples)
    answers = pipeline(
        (examples[i] for i in order),
        batch_size=batch_size,
        length_config=length_config,
        **{"max_answer_len": MAX_ANSWER_LEN} | parameters,
    )
    for i, answer in zip(tqdm(order, desc="Answering", unit="question", disable=not progress), answers):
        texts[i] = answer["answer"]
    return texts, [length for windows in lengths for length in windows]


def scores_by_question(questions, texts):
    """F1 and exact match of each question in percent, float64 (questions,) each.

    The official SQuAD v1.1 definitions (torchmetrics); to a question without an answer "" is the one right answer, as
    in SQuAD v2.0 (Rajpurkar et al., arXiv:1806.03822).
    """
    f1, em = np.zeros(len(texts)), np.zeros(len(texts))
    for i, (text, answers) in enumerate(zip(texts, questions["answers"])):
        answers = answers if answers["text"] else {"text": [""], "answer_start": [0]}
        result = squad([{"id": "0", "prediction_text": text}], [{"id": "0", "answers": answers}])
        f1[i], em[i] = result["f1"].item(), result["exact_match"].item()
    return f1, em


def score(questions, texts, by=SOURCE):
    """Mean F1 and exact match in percent, and the standard error of the F1; where some questions have no answer, of
    those that have one and of those that have none as well; and where `questions` have the column `by`, of each of its
    values, under its name in the plural."""
    f1, em = scores_by_question(questions, texts)

    def means(rows):
        rows = np.asarray(rows)
        error = f1[rows].std() / math.sqrt(len(rows))
        return {"f1": f1[rows].mean(), "em": em[rows].mean(), "f1_standard_error": error, "questions": len(rows)}

    result = means(range(len(texts)))
    answerable = np.array([bool(answers["text"]) for answers in questions["answers"]])
    if not answerable.all():
        result["has_answer"] = means(np.flatnonzero(answerable))
        result["no_answer"] = means(np.flatnonzero(~answerable))
    if by in questions.column_names:
        groups = np.array(questions[by])
        result[f"{by}s"] = {name: means(np.flatnonzero(groups == name)) for name in sorted(set(groups.tolist()))}
    return result


def command_line():
    """The command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT), help="folder of the model (the shipped one)")
    parser.add_argument("--data", nargs="+", required=True, help="SQuAD JSON files, or data sets on the Hub")
    parser.add_argument("--split", choices=SPLITS, default="all", help="part of each file (all)")
    parser.add_argument("--length_config", default="full", help="a preset's name, or JSON: [0.9, ...] (full)")
    parser.add_argument("--batch_size", type=int, default=16, help="windows a batch (16)")
    parser.add_argument(
        "--max_answer_len", type=int, default=MAX_ANSWER_LEN, help="tokens of the longest answer (%(default)s)"
    )
    parser.add_argument(
        "--handle_impossible_answer",
        action="store_true",
        help='let "" be an answer, and count questions that have none, as SQuAD v2.0 does',
    )
    parser.add_argument(
        "--no_answer_threshold", type=float, help='evidence below which the answer is "" (the model\'s own)'
    )
    parser.add_argument(
        "--by", choices=(SOURCE, "title"), default=SOURCE, help="what to tell scores apart by as well (%(default)s)"
    )
    parser.add_argument("--output", required=True, help="JSON results file to write")
    parser.add_argument(
        "--record", action="store_true", help="also write the scores into the preset in length_configs.json"
    )
    return parser


def main():
    parser = command_line()
    arguments = parser.parse_args()
    length_config = parse_length_config(arguments.length_config)
    data = identities(arguments.data)
    is_test = any(map(is_test_set, arguments.data))
    recorded_as = "test" if is_test else "validation"
    if arguments.record and not (isinstance(length_config, str) and (is_test or arguments.split == "validation")):
        parser.error("--record takes a preset's name as --length_config, and a test set or --split validation")

    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model, dtype=torch.float32)
    pipeline = QuestionAnsweringPipeline(model=model.eval(), tokenizer=load_tokenizer(arguments.model))
    questions = read_sources(arguments.data, arguments.split)
    if not arguments.handle_impossible_answer:
        questions = with_answers(questions)
    started = time.perf_counter()
    texts, lengths = answer_all(
        pipeline,
        questions,
        arguments.batch_size,
        length_config,
        max_answer_len=arguments.max_answer_len,
        handle_impossible_answer=arguments.handle_impossible_answer,
        no_answer_threshold=arguments.no_answer_threshold,
    )
    seconds = time.perf_counter() - started
    scores = score(questions, texts, arguments.by)

    config = model.config
    result = {
        **scores,
        "length_config": length_config,
        "max_answer_len": arguments.max_answer_len,
        "handle_impossible_answer": arguments.handle_impossible_answer,
        "no_answer_threshold": arguments.no_answer_threshold,
        "significance": config.significance,
        "macs_share_at_384": config.macs_share(length_config),
        "mean_macs_share_over_rows": sum(config.macs_share(length_config, n) for n in lengths) / len(lengths),
        "median_tokens_a_row": sorted(lengths)[len(lengths) // 2],
        "seconds": round(seconds, 1),
        "engine": describe_engine(model),
        "split": arguments.split,
        "data": data,
        "weights_sha256": file_sha256(Path(arguments.model) / "model.safetensors"),
        **describe_run("recipe.evaluate", torchmetrics),
    }
    if is_test:
        TEST_LOG.parent.mkdir(exist_ok=True)
        with TEST_LOG.open("a", encoding="utf-8") as log:
            log.write(json.dumps(result) + "\n")
        print(f"Logged this look at the test set in {TEST_LOG}")
    write_json(arguments.output, result)
    if arguments.record:
        record_scores(arguments.model, length_config, recorded_as, scores)
    print(
        f"F1 {scores['f1']:.2f} (standard error {scores['f1_standard_error']:.2f})  EM {scores['em']:.2f}  over "
        f"{len(questions)} questions at {length_config!r}, MACs "
        f"share {result['macs_share_at_384']:.2f} at 384 tokens, {result['mean_macs_share_over_rows']:.2f} over these "
        f"rows; {seconds:.0f} s. Wrote {arguments.output}"
    )


if __name__ == "__main__":
    main()
