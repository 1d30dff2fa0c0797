"""When a text has no answer, and how sure that is: `python -m recipe.answerable --windows FOLDER --logits FOLDER`.

A text does not answer where its best answer's evidence is below a threshold, and the evidence makes, by a logistic
function, how sure the model is that there is an answer. One half of validation's titles, by a hash, settles both; all
figures are measured on the other half, with the one threshold. There, documents are also put among others, so that
their questions have many windows to be answered wrongly from. A second threshold, `balanced_threshold`, is for SQuAD
v2.0 alone, where half of the questions have no answer, by design hard to tell from one that has: questions of that
kind, and twins that are answered, are named by `--adversarial`.

Logits are kept as they come: a run that was stopped goes on, and what another rule would give costs no model.
"""

import argparse
import hashlib
import itertools
import json
import random
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.files_qualaminilm import whole_file, write_whole
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from qualaminilm.spans_qualaminilm import ranked
from recipe import ROOT
from recipe.data import NO_ANSWERS, file_sha256, groups, load_tokenizer, read_questions
from recipe.evaluate import scores_by_question
from recipe.presets import parse_length_config
from recipe.results import describe_engine, describe_run, save_figure, write_json
from recipe.test_sets import refuse_test_sets
from recipe.windows import validation_tables

NEAR_MISSES = ("written-wiki", "written-documents")  # whose unanswerable questions are almost answered
DOCUMENTS = "written-documents"  # what is put among others, where it is there
USUAL = ("answered", "near-miss", "off-topic")  # what is asked of texts, and settles what is for all
KINDS = (*USUAL, "adversarial", "twin")
MOST_LOST = 0.05  # of right answers, which the threshold may turn into ""
SURE = 0.99  # that no more are lost on articles that did not settle it
SAMPLES = 1000
RIGHT = 50  # percent of F1, from which an answer is right
SIZES = (2, 5, 8, 23)  # windows
BINS = 15
WINDOW, SHARED = 384, 128  # tokens of the pipeline's windows
PART = 32  # questions, whose logits are a file
FILL = "The weather was mild and the streets were quiet. " * 45
SHOP = (
    "Mr Pell keeps the shop on the quay and opens it at eight. The boats lie still, the nets are dry, and nobody is in "
    "a hurry. Children play with a dog near the old crane. "
) * 40
EXAMPLES = (
    (
        "What does the bicycle cost?",
        f"The bicycle costs 480 euros with lights and a lock. {FILL}A ticket for the ferry costs 12 euros. ",
        "480 euros",
    ),
    (
        "How many tablets should adults take?",
        f"Adults should take two tablets a day. {FILL}The package holds 30 pieces. ",
        "two",
    ),
    (
        "Who keeps the lighthouse?",
        f"{SHOP}The lighthouse is kept by Anselm Brodie, who came from Skye. {SHOP}",
        "Anselm Brodie",
    ),
)


class Asked(NamedTuple):
    """A question put to a text.

    Attributes:
        kind (`str`): of `KINDS`.
        fits (`bool`): whether it is of the half that settles threshold and calibration.
        question, context (`str`); answers (`dict`): as in SQuAD.
        place (`tuple`): the characters of `context` that are the question's document.
        article (`str`): what the question is split by, see [`groups`].
    """

    kind: str
    fits: bool
    question: str
    context: str
    answers: dict
    place: tuple
    article: str


def ask(tables, count, seed, adversarial=None):
    """Questions of `KINDS`, a list of [`Asked`]: `count` that have an answer, drawn from all tables; half of these put
    to a document of another title; at most `count` that their document almost answers; and those of the table
    `adversarial`, on documents of validation, which are so by design, or are answered.

    Raises:
        ValueError: one of the halves has no question with an answer, or none without.
    """
    rows = [row | {"table": name} for name, table in tables.items() for row in split_rows(table)]
    draw = random.Random(seed)
    draw.shuffle(rows)
    answered = [row for row in rows if row["answers"]["text"]][:count]
    sources = tables.keys() & set(NEAR_MISSES) or tables.keys()  # of a user's own data any
    near_misses = [row for row in rows if not row["answers"]["text"] and row["table"] in sources][:count]
    asked = [as_asked(kind, row) for kind, of_kind in zip(KINDS, (answered, near_misses)) for row in of_kind]
    for row in answered[: count // 2]:
        others = [each for each in answered if each["fits"] == row["fits"] and each["title"] != row["title"]]
        if others:
            elsewhere = {"context": draw.choice(others)["context"], "answers": NO_ANSWERS}
            asked.append(as_asked("off-topic", row | elsewhere))
    if len({(each.fits, each.kind == "answered") for each in asked}) < 4:
        none = len(asked) - len(answered)
        raise ValueError(
            f"of the validation questions {len(answered)} have an answer in their text and {none} have none, expected "
            f"enough of both for two halves"
        )
    asked += [as_asked("twin" if row["answers"]["text"] else "adversarial", row) for row in split_rows(adversarial)]
    return asked


def split_rows(table):
    """The rows of a table, or of `None`, each with its article and whether that is of the fitting half."""
    if table is None:
        return []
    of_each = zip(table, in_fitting_half(table), groups(table), strict=True)
    return [row | {"fits": fits, "article": article} for row, fits, article in of_each]


def as_asked(kind, row):
    place = 0, len(row["context"])
    return Asked(kind, row["fits"], row["question"], row["context"], row["answers"], place, row["article"])


def in_fitting_half(table):
    """Whether each question is of the half that settles threshold and calibration, by a hash of its group's name."""
    return [hashlib.sha256(f"answerable {group}".encode()).digest()[0] % 2 == 0 for group in groups(table)]


def among_others(table, count, most_windows, pipeline, seed):
    """`count` answered questions of the measuring half, each document among so many others that there are at least
    `most_windows` windows: a list of [`Asked`]."""
    draw = random.Random(seed)
    rows = [row for row, fits in zip(table, in_fitting_half(table)) if row["answers"]["text"] and not fits]
    documents = {row["title"]: row["context"] for row in table}
    lengths = {title: len(pipeline.reading.tokens(text).ids) for title, text in documents.items()}
    asked = []
    for row in draw.sample(rows, min(count, len(rows))):
        others = [title for title in documents if title != row["title"]]
        before, after, tokens = [], [], lengths[row["title"]]
        for title in itertools.cycle(draw.sample(others, len(others))):
            draw.choice((before, after)).append(documents[title])
            tokens += lengths[title]
            if tokens > most_windows * (WINDOW - SHARED):
                break
        start = sum(len(text) + 2 for text in before)
        context = "\n\n".join([*before, row["context"], *after])
        place = start, start + len(row["context"])
        asked.append(Asked("answered", False, row["question"], context, row["answers"], place, row["title"]))
    return asked


def logits_of(pipeline, asked, length_config, folder):
    """Yields the windows of each question and their logits, lists; what stands in `folder` is not computed again."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in tqdm(range(0, len(asked), PART), desc=f"Answering at {length_config}", unit="part"):
        part = asked[first : first + PART]
        windows = [pipeline.preprocess(each._asdict()) for each in part]
        flat = [window for of_text in windows for window in of_text]
        file = folder / f"{first:06d}.npy"
        if not file.exists():
            # Shortest first, eight at a time.
            order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
            found = [None] * len(flat)
            for i in range(0, len(order), 8):
                batch = order[i : i + 8]
                of_batch = pipeline.forward([flat[place] for place in batch], length_config=length_config)
                for place, logits in zip(batch, of_batch):
                    found[place] = logits
            with whole_file(file) as stream:
                np.save(stream, np.concatenate(found, axis=1))
        ends = np.cumsum([len(window.scored()) for window in flat])
        logits = iter(np.split(np.load(file), ends[:-1], axis=1))
        for of_text in windows:
            yield of_text, [next(logits) for _ in of_text]


def best(context, windows, logits):
    """The answer's text and the logarithm of its evidence."""
    log_evidence, _, _, start, end = next(ranked(context, windows, logits, 15, True))
    return context[start:end], log_evidence


def f1_of(asked, texts):
    """The F1 of each answer, in percent, float64 (questions,)."""
    return scores_by_question({"answers": [each.answers for each in asked]}, texts)[0]


def is_right(asked, texts):
    """Whether each answer is right: a bool array."""
    return f1_of(asked, texts) >= RIGHT


def threshold_of(evidence, articles, seed=0):
    """The largest threshold, to two decimals, that is `SURE` to lose at most `MOST_LOST` of right answers, so far as
    these tell: of so many samples of as many articles, drawn with replacement (Efron, 1979), it loses no more.

    Args:
        evidence (`(questions,)`): of right answers.
        articles (a sequence of `str`): which each is about; what one article's questions have in common is no news.

    Raises:
        ValueError: there are none.
    """
    if not len(evidence):
        raise ValueError("no question is answered right, which a threshold is chosen by")
    draw, order = np.random.default_rng(seed), np.argsort(evidence)
    names, article = np.unique(articles, return_inverse=True)
    thresholds = []
    for _ in range(SAMPLES):
        times = np.bincount(draw.integers(len(names), size=len(names)), minlength=len(names))[article[order]]
        below = times.cumsum()
        thresholds.append(evidence[order][np.searchsorted(below, MOST_LOST * below[-1], side="right")])
    return float(np.floor(np.quantile(thresholds, 1 - SURE, method="lower") * 100) / 100)


def balanced_threshold_of(evidence, f1, answered):
    """The threshold, to two decimals, of the best mean F1 where as many questions have an answer as have none, as in
    SQuAD v2.0's development set.

    Args:
        evidence (`(questions,)`); f1 (same shape): of the best answer, in percent.
        answered (bool, same shape): which questions have an answer; if all or none have, the result is `None`.
    """
    if answered.all() or not answered.any():
        return None
    none, thresholds = evidence[~answered], np.unique(np.floor(evidence * 100) / 100)
    of_none = [100 * (none < threshold).mean() for threshold in thresholds]
    of_answered = [(f1 * (evidence >= threshold))[answered].mean() for threshold in thresholds]
    return float(thresholds[np.add(of_none, of_answered).argmax()])


def calibration_of(evidence, answered, steps=100):
    """Slope and intercept of the logistic function of `evidence` that is likeliest to give `answered` (bool), to four
    digits; by Newton's method. A prior as weak as one question in all keeps it finite where the two are separable."""
    scale = np.abs(evidence).max()
    features = np.stack([evidence / scale, np.ones(len(evidence))], 1)
    weights, prior = np.zeros(2), np.eye(2) / scale**2
    for _ in range(steps):
        sure = 1 / (1 + np.exp(-np.clip(features @ weights, -500, 500)))
        gradient = features.T @ (answered - sure) - prior @ weights
        step = np.linalg.solve((features * (sure * (1 - sure))[:, None]).T @ features + prior, gradient)
        weights += step
        if np.abs(step).max() < 1e-9:
            break
    return [float(f"{weights[0] / scale:.4g}"), float(f"{weights[1]:.4g}")]


def calibration_bins(answerable, answered):
    """Of `BINS` bins of as many questions each, by `answerable`: its mean, the share answered, how many there are."""
    order = np.argsort(answerable, kind="stable")
    return [
        {"answerable": float(answerable[bin].mean()), "answered": float(answered[bin].mean()), "questions": len(bin)}
        for bin in np.array_split(order, BINS)
        if len(bin)
    ]


def calibration_error(bins):
    questions = sum(each["questions"] for each in bins)
    return sum(each["questions"] * abs(each["answerable"] - each["answered"]) for each in bins) / questions


def measured(threshold, calibration, evidence, kinds, right):
    """What a threshold and a calibration do to questions: `kinds` of them, whether each is answered `right`."""
    usual, answered = np.isin(kinds, USUAL), kinds == "answered"
    answerable = 1 / (1 + np.exp(-(calibration[0] * evidence + calibration[1])))
    bins = calibration_bins(answerable[usual], answered[usual])
    none = evidence < threshold
    return {
        "questions": {kind: int((kinds == kind).sum()) for kind in KINDS},
        "right": share(right[answered]),
        "right_lost": share(none[right & answered]),
        "no_answer": {kind: share(none[kinds == kind]) for kind in KINDS},
        "calibration_error": calibration_error(bins),
        "bins": bins,
    }


def share(array):
    return float(array.mean()) if len(array) else None


def fitted(asked, logits):
    """Threshold and calibration that fit the fitting half of the questions, a dict; the threshold of
    [`balanced_threshold_of`] there; and a function of any threshold and calibration, what they do to the other half."""
    texts, evidence = zip(*(best(each.context, *of) for each, of in zip(asked, logits, strict=True)))
    kinds, fits = np.array([each.kind for each in asked]), np.array([each.fits for each in asked])
    articles, usual = np.array([each.article for each in asked]), np.isin(kinds, USUAL)
    f1, evidence, answered = f1_of(asked, texts), np.array(evidence), kinds == "answered"
    right, adversarial = f1 >= RIGHT, kinds == "adversarial"
    # Of the articles whose paragraphs such questions were put to, as in SQuAD v2.0.
    of_v2 = fits & (adversarial | answered & np.isin(articles, articles[adversarial]))
    own = {
        "no_answer_threshold": threshold_of(*(each[fits & right & answered] for each in (evidence, articles))),
        "answerable_calibration": calibration_of(evidence[fits & usual], answered[fits & usual]),
    }
    balanced = balanced_threshold_of(evidence[of_v2], f1[of_v2], answered[of_v2])
    return own, balanced, partial(measured, evidence=evidence[~fits], kinds=kinds[~fits], right=right[~fits])


def measured_among(asked, logits_of_each, threshold, seed):
    """Of the questions that are right alone, how many are where their document stands among others, by the number of
    windows. Windows that follow each other are those of the text that they make up, but for a word that is cut at its
    start, so that one text has all sizes.

    Args:
        logits_of_each: of questions and a name to keep their logits by, to what [`logits_of`] yields.
    """
    alone = [as_alone(each) for each in asked]
    texts = [best(each.context, *of)[0] for each, of in zip(alone, logits_of_each(alone, "alone"))]
    right_alone = is_right(alone, texts)
    draw, found = random.Random(seed), {size: [] for size in SIZES}
    logits = logits_of_each(asked, "among")
    for each, is_right_alone, (windows, of_windows) in zip(asked, right_alone, logits, strict=True):
        if not is_right_alone:
            continue
        start, end = each.place
        starts = [int(window.tokens.starts[window.span.start]) for window in windows]
        ends = [int(window.tokens.ends[window.span.stop - 1]) for window in windows]
        mine = [i for i in range(len(windows)) if starts[i] < end and ends[i] > start]
        for size in SIZES:
            size_here = max(size, len(mine))
            first = draw.randint(max(0, mine[-1] - size_here + 1), min(mine[0], len(windows) - size_here))
            some = slice(first, first + size_here)
            found[size].append((each, size_here, *best(each.context, windows[some], of_windows[some])))
    sizes_measured = []
    for asked_here, sizes, texts, evidence in (zip(*rows) for rows in found.values() if rows):
        right = is_right(asked_here, texts)
        sizes_measured.append(
            {
                "windows": float(np.mean(sizes)),
                "right": share(right),
                "right_and_above_threshold": share(right & (np.array(evidence) >= threshold)),
            }
        )
    return {"questions": len(alone), "right_alone": int(right_alone.sum()), "sizes": sizes_measured}


def draw_bins(results, path):
    """Draws how often a text answers, by how sure the model is of it."""
    figure, axes = plt.subplots(figsize=(4.2, 4.2))
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for name, result in results.items():
        points = [(each["answerable"], each["answered"]) for each in result["bins"]]
        label = f"{name}, calibration error {result['calibration_error']:.3f}"
        axes.plot(*zip(*points), marker="o", markersize=4, linewidth=1, label=label)
    axes.set(xlabel="answerable", ylabel="share of texts that answer", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="upper left")
    figure.tight_layout()
    save_figure(figure, path, dpi=150)
    plt.close(figure)


def record(folder, threshold, calibration):
    """Writes threshold and calibration into the folder's config.json.

    Raises:
        ValueError: the configuration does not accept them.
    """
    settled = {"no_answer_threshold": threshold, "answerable_calibration": calibration}
    QuaLAMiniLMConfig.from_pretrained(folder, **settled)
    path = Path(folder) / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) | settled
    write_whole(path, (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


def command_line():
    """The command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder of the model (the shipped one)")
    parser.add_argument("--windows", type=Path, required=True, help="folder that recipe.windows wrote")
    parser.add_argument("--logits", type=Path, required=True, help="folder to keep logits in")
    parser.add_argument(
        "--questions", type=int, default=4000, help="with an answer; half as many off topic (%(default)s)"
    )
    parser.add_argument(
        "--adversarial", help="SQuAD JSON in version 2.0's manner, on validation's articles: settles balanced_threshold"
    )
    parser.add_argument("--among", type=int, default=150, help="questions put to documents among others (150)")
    parser.add_argument(
        "--length_configs", nargs="+", default=["full", "fast"], help="presets; the first settles (full fast)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument(
        "--output", default=str(ROOT / "results" / "answerable.json"), help="results file to write (%(default)s)"
    )
    parser.add_argument(
        "--figure", default=str(ROOT / "assets" / "answerable.png"), help="picture of the calibration (%(default)s)"
    )
    parser.add_argument("--record", action="store_true", help="write threshold and calibration into config.json")
    return parser


def main():
    arguments = command_line().parse_args()
    refuse_test_sets("--adversarial", [arguments.adversarial] if arguments.adversarial else [])
    tables = validation_tables(arguments.windows)
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model, dtype=torch.float32).eval()
    pipeline = QuestionAnsweringPipeline(model=model, tokenizer=load_tokenizer(arguments.model))
    weights = file_sha256(Path(arguments.model) / "model.safetensors")

    adversarial = read_questions(arguments.adversarial) if arguments.adversarial else None
    asked = ask(tables, arguments.questions, arguments.seed, adversarial)
    among = []
    if DOCUMENTS in tables:
        among = among_others(tables[DOCUMENTS], arguments.among, max(SIZES), pipeline, arguments.seed)
    results, settled = {}, None
    for name in arguments.length_configs:
        length_config = parse_length_config(name)

        def logits(of, what, length_config=length_config):
            identity = repr((weights, length_config, [each[2:4] for each in of]))
            known_by = hashlib.sha256(identity.encode()).hexdigest()[:16]
            return logits_of(pipeline, of, length_config, arguments.logits / f"{what}-{known_by}")

        own, balanced, measure = fitted(asked, logits(asked, "asked"))
        if settled is None:
            settled, balanced_threshold = own, balanced
        results[name] = measure(*settled.values())
        results[name]["by_its_own"] = own | measure(*own.values())
        del results[name]["by_its_own"]["bins"]
        threshold = settled["no_answer_threshold"]
        results[name]["among_others"] = measured_among(among, logits, threshold, arguments.seed) if among else None
        results[name]["examples"] = [
            {"question": question, "expected": expected}
            | pipeline(question=question, context=context, length_config=length_config)
            for question, context, expected in EXAMPLES
        ]
        print(summary(name, results[name]))
    write_json(
        arguments.output,
        {
            **settled,
            "balanced_threshold": balanced_threshold,
            "length_configs": results,
            "right_from_f1": RIGHT,
            "weights_sha256": weights,
            "engine": describe_engine(model),
            **describe_run("recipe.answerable", matplotlib, datasets),
        },
    )
    draw_bins(results, arguments.figure)
    print(f"Wrote {arguments.output} and {arguments.figure}")
    if arguments.record:
        record(arguments.model, *settled.values())
        print(f"Wrote {settled} into config.json of {arguments.model}")


def as_alone(asked):
    """The question put to its document alone."""
    start, end = asked.place
    return asked._replace(context=asked.context[start:end], place=(0, end - start))


def summary(name, result):
    none, among = result["no_answer"], result["among_others"] or {"sizes": []}
    lines = [
        f"{name}: right {percent(result['right'])}, of which {percent(result['right_lost'])} are lost; no answer to "
        f"{percent(none['near-miss'])} of near-miss, {percent(none['off-topic'])} of off-topic and "
        f"{percent(none['adversarial'])} of adversarial questions, and to {percent(none['twin'])} of these' twins; "
        f"calibration error {result['calibration_error']:.3f}",
        *(
            f"  at {size['windows']:.1f} windows {percent(size['right'])} of {among['right_alone']} right alone"
            for size in among["sizes"]
        ),
        *(f"  {each['question']} {each['answer']!r}, expected {each['expected']!r}" for each in result["examples"]),
    ]
    return "\n".join(lines)


def percent(share):
    return "none" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    main()
