import json
import random
import sys
from collections import Counter
from statistics import NormalDist
from unittest import mock

import datasets
import numpy as np
import pytest
import torch

from conftest import ROOT, squad_file, tiny_config, trains
from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from recipe import answerable
from recipe.data import NO_ANSWERS, load_tokenizer

pytestmark = trains
WORDS = "Ann Bob lives lived in near Berlin Paris Oslo , . the old".split()  # a token each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a model that is random, and sure of itself."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = QuaLAMiniLMForQuestionAnswering(
        tiny_config(vocab_size=30522, num_hidden_layers=1, max_position_embeddings=512)
    )
    torch.nn.init.normal_(model.bert.embeddings.word_embeddings.weight)
    model.save_pretrained(path)
    load_tokenizer(ROOT).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tables():
    draw, result = random.Random(0), {}
    for name in ("afriqa-en", *answerable.NEAR_MISSES):
        rows = []
        for title in range(12):
            context = " ".join(draw.choices(WORDS, k=120))
            for number in range(4):
                start = draw.choice([i for i in range(len(context)) if context.startswith("lives", i)])
                answers = {"text": ["lives"], "answer_start": [start]}
                if number == 3 and name in answerable.NEAR_MISSES:
                    answers = {"text": [], "answer_start": []}
                question = f"Who {number} lives in {name} {title}?"
                rows.append(
                    {"id": str(number), "title": f"{title}", "question": question, "context": context}
                    | {"answers": answers}
                )
        result[name] = datasets.Dataset.from_list(rows)
    return result


def adversarial_file(folder, tables):
    """SQuAD JSON of one of the tables, in version 2.0's manner."""
    articles = {}
    for row in tables["written-wiki"]:
        asked = f"{row['question']} Or not?", row["answers"]["text"]
        articles.setdefault(row["title"], []).append((row["context"], [asked]))
    return squad_file(folder / "adversarial.json", articles)


def loss_of_thresholds(articles, together, samples=200):
    """What thresholds lose that were settled by so many articles of ten questions each, whose evidence is standard
    normal, a part of its variance the same within an article."""
    draw, lost = np.random.default_rng(0), []
    for _ in range(samples):
        own = draw.normal(size=(articles, 10)) * np.sqrt(1 - together)
        evidence = (own + draw.normal(size=(articles, 1)) * np.sqrt(together)).ravel()
        threshold = answerable.threshold_of(evidence, np.repeat(np.arange(articles), 10).astype(str))
        lost.append(NormalDist().cdf(threshold))
        assert threshold == round(threshold, 2)
    return np.array(lost)


@pytest.mark.parametrize("together", [0.0, 0.5, 0.9])
def test_one_threshold_in_a_hundred_loses_more_than_it_may(together):
    lost = loss_of_thresholds(100, together)
    assert (lost > 0.05).mean() <= 0.03
    assert np.median(lost) > 0.005  # nor is it all caution


def test_the_threshold_of_one_article_loses_at_most_one_in_twenty_of_it():
    evidence = np.random.default_rng(0).normal(size=137)
    assert answerable.threshold_of(evidence, ["one"] * 137) == np.floor(np.sort(evidence)[6] * 100) / 100
    assert answerable.threshold_of(np.array([-2.345, 7.0]), ["one", "two"]) == -2.35


def test_the_balanced_threshold_is_that_of_the_best_mean():
    draw = np.random.default_rng(0)
    answered = draw.random(300) < 0.7
    evidence, f1 = draw.normal(np.where(answered, 4, 0), 3), draw.choice([0.0, 40.0, 100.0], 300)

    def mean(threshold):
        f1_with_none = [
            (0.0 if none else each) if has_one else 100.0 * none
            for each, has_one, none in zip(f1, answered, evidence < threshold)
        ]
        return sum(
            np.mean([each for each, has in zip(f1_with_none, answered) if has == kind]) for kind in (True, False)
        )

    threshold = answerable.balanced_threshold_of(evidence, f1, answered)
    assert mean(threshold) == pytest.approx(max(map(mean, np.arange(-10, 15, 0.01))))
    for all_or_none in (np.ones(300, dtype=bool), np.zeros(300, dtype=bool)):
        assert answerable.balanced_threshold_of(evidence, f1, all_or_none) is None


def test_questions_of_the_adversarial_kind_settle_the_balanced_threshold_alone():
    """By hand: one of the fitting half's articles, whose answers' evidence is 5 and more, adversarial questions' 3."""

    def asked(kind, article, fits=True):
        answers = {"text": ["a"], "answer_start": [0]} if kind in ("answered", "twin") else NO_ANSWERS
        return answerable.Asked(kind, fits, "?", "a b", answers, (0, 3), article)

    of_each = [(asked("answered", "x"), 5.0)] * 9 + [(asked("answered", "y"), 2.0)] * 9
    of_each += [(asked("near-miss", "x"), -8.0)] * 9 + [(asked("answered", "z", fits=False), 4.0)] * 8
    of_each += [(asked("answered", "z", fits=False), 1.0)] * 2 + [(asked("near-miss", "z", fits=False), 1.0)]
    adversarial = [(asked("adversarial", "x"), 3.0)] * 9 + [(asked("twin", "x"), 0.0)] * 9
    others = zip(("adversarial", "twin", "twin"), (3.0, 1.0, 9.0))
    adversarial += [(asked(kind, "z", fits=False), evidence) for kind, evidence in others]

    def settle(rows):
        found = iter([("a", evidence) for _, evidence in rows])
        with mock.patch.object(answerable, "best", lambda *_: next(found)):
            return answerable.fitted([each for each, _ in rows], [()] * len(rows))

    own, balanced, measure = settle(of_each + adversarial)
    assert own == settle(of_each)[0] and settle(of_each)[1] is None
    assert own["no_answer_threshold"] == 2.0 and balanced == 5.0
    result = measure(2.0, [1.0, 0.0])
    assert result["right_lost"] == 0.2 and sum(each["questions"] for each in result["bins"]) == 11
    assert result["no_answer"] == {
        "answered": 0.2,
        "near-miss": 1.0,
        "off-topic": None,
        "adversarial": 0.0,
        "twin": 0.5,
    }


def test_the_calibration_is_the_likeliest():
    draw = np.random.default_rng(0)
    evidence = draw.normal(5, 10, 4000)
    answered = draw.random(4000) < 1 / (1 + np.exp(-(0.31 * evidence - 1.2)))
    slope, intercept = answerable.calibration_of(evidence, answered)
    assert (slope, intercept) == pytest.approx((0.31, -1.2), abs=0.1)

    def likelihood(slope, intercept):
        return -np.logaddexp(0, np.where(answered, -1, 1) * (slope * evidence + intercept)).sum()

    best = likelihood(slope, intercept)
    assert all(
        best > likelihood(slope + change, intercept + other)
        for change, other in [(0.01, 0), (-0.01, 0), (0, 0.05), (0, -0.05)]
    )
    sure = 1 / (1 + np.exp(-(slope * evidence + intercept)))
    assert answerable.calibration_error(answerable.calibration_bins(sure, answered)) < 0.03
    # Where a threshold parts them, the likeliest slope is infinite.
    slope, intercept = answerable.calibration_of(evidence, evidence > 2)
    assert 1 < slope < 1e6 and abs(intercept) < 1e6


def test_the_calibration_error_of_bins_by_hand():
    sure = np.repeat([0.1, 0.9], 15)
    answered = np.array([False] * 15 + [True] * 12 + [False] * 3)
    bins = answerable.calibration_bins(sure, answered)
    assert [each["questions"] for each in bins] == [2] * 15
    expected = [abs(s - a) for s, a in zip(sure.reshape(15, 2).mean(1), answered.reshape(15, 2).mean(1))]
    assert answerable.calibration_error(bins) == pytest.approx(np.mean(expected))


def test_a_user_s_own_questions_settle_them_too(tmp_path, folder, tables, monkeypatch):
    tables["written-wiki"].save_to_disk(tmp_path / "windows" / "validation" / "mine")
    arguments = ["recipe.answerable", "--model", str(folder), "--windows", str(tmp_path / "windows")]
    arguments += ["--length_configs", "full", "--logits", str(tmp_path / "logits")]
    arguments += ["--output", str(tmp_path / "out.json"), "--figure", str(tmp_path / "out.png")]
    monkeypatch.setattr(answerable, "EXAMPLES", [])
    monkeypatch.setattr(answerable, "RIGHT", 0)
    monkeypatch.setattr(sys, "argv", arguments)
    answerable.main()
    full = json.loads((tmp_path / "out.json").read_text())["length_configs"]["full"]
    assert full["among_others"] is None and all(full["questions"][kind] for kind in answerable.USUAL)
    assert json.loads((tmp_path / "out.json").read_text())["balanced_threshold"] is None
    few = {"mine": tables["written-wiki"].select(range(4))}  # of one title
    with pytest.raises(ValueError, match="3 have an answer in their text and 1 have none, expected"):
        answerable.ask(few, 10, seed=0)


def test_titles_are_of_one_half_and_both_halves_are_measured_apart(tables):
    asked = answerable.ask(tables, 60, seed=1)
    by_kind = {kind: [each for each in asked if each.kind == kind] for kind in answerable.KINDS}
    counts = {"answered": 60, "near-miss": 24, "off-topic": 30, "adversarial": 0, "twin": 0}
    assert {kind: len(each) for kind, each in by_kind.items()} == counts
    assert all(each.answers["text"] for each in by_kind["answered"])
    assert not any(each.answers["text"] for kind in ("near-miss", "off-topic") for each in by_kind[kind])
    halves = {}
    for each in asked:
        halves.setdefault(each.context, set()).add(each.fits)
    assert all(len(half) == 1 for half in halves.values())
    assert {True, False} == {each.fits for each in by_kind["near-miss"]}
    more = answerable.ask(tables, 60, seed=1, adversarial=tables["written-wiki"])
    assert more[: len(asked)] == asked
    kinds = Counter((each.kind, bool(each.answers["text"])) for each in more[len(asked) :])
    assert kinds == {("adversarial", False): 12, ("twin", True): 36}
    assert {each.article: each.fits for each in asked if each.kind == "near-miss"}.items() <= {
        each.article: each.fits for each in more[len(asked) :]
    }.items()
    answered = {(each.question, each.context) for each in by_kind["answered"]}
    assert not any((each.question, each.context) in answered for each in by_kind["off-topic"])
    alone = datasets.Dataset.from_list([{"title": "one", "context": str(i)} for i in range(200)])
    assert 60 < sum(answerable.in_fitting_half(alone)) < 140


def test_windows_in_a_row_are_those_of_the_text_that_they_make_up(folder, tables):
    """Where they begin with a word; what lets one text stand for the shorter ones in it."""
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(folder)
    qa = QuestionAnsweringPipeline(model=model.eval(), tokenizer=load_tokenizer(folder))
    asked = answerable.among_others(tables["written-documents"], 5, 23, qa, seed=0)
    assert len(asked) == 5
    for each in asked:
        start, end = each.place
        assert each.context[start:end] in tables["written-documents"]["context"] and not each.fits
        windows = qa.preprocess(each._asdict())
        assert 23 <= len(windows) <= 30
        tokens = windows[0].tokens
        some = windows[3:7]
        first, last = tokens.starts[some[0].span.start], tokens.ends[some[-1].span.stop - 1]
        again = qa.preprocess({"question": each.question, "context": each.context[first:last]})
        for window, other in zip(some, again, strict=True):
            assert window.model_inputs()["input_ids"].tolist() == other.model_inputs()["input_ids"].tolist()


def test_a_run_settles_measures_draws_and_records_and_goes_on_from_kept_logits(tmp_path, folder, tables, monkeypatch):
    for name, table in tables.items():
        table.save_to_disk(tmp_path / "windows" / "validation" / name)
    arguments = ["recipe.answerable", "--model", str(folder), "--windows", str(tmp_path / "windows")]
    arguments += ["--questions", "40", "--among", "2", "--length_configs", "full", "[0.5]"]
    arguments += ["--output", str(tmp_path / "out.json"), "--figure", str(tmp_path / "out.png")]
    arguments += ["--logits", str(tmp_path / "logits"), "--adversarial", str(adversarial_file(tmp_path, tables))]
    monkeypatch.setattr(answerable, "EXAMPLES", [("Who?", "Ann lives in Berlin.", "Ann")])
    monkeypatch.setattr(answerable, "RIGHT", 0)
    monkeypatch.setattr(answerable, "calibration_of", lambda *_: [0.5, -1.0])  # a random model's may fall
    before = (folder / "config.json").read_text()
    monkeypatch.setattr(sys, "argv", arguments)
    answerable.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert (folder / "config.json").read_text() == before and (tmp_path / "out.png").stat().st_size > 1000
    assert set(found["length_configs"]) == {"full", "[0.5]"}
    full = found["length_configs"]["full"]
    assert full["by_its_own"]["no_answer_threshold"] == found["no_answer_threshold"]
    assert isinstance(found["balanced_threshold"], float)
    usual = sum(full["questions"][kind] for kind in answerable.USUAL)
    assert len(full["bins"]) <= 15 and sum(e["questions"] for e in full["bins"]) == usual
    assert full["questions"]["adversarial"] and full["questions"]["twin"] and 0 <= full["no_answer"]["twin"] <= 1
    for size in full["among_others"]["sizes"]:
        assert 0 <= size["right_and_above_threshold"] <= size["right"] <= 1

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(answerable, "EXAMPLES", [])
    monkeypatch.setattr(QuestionAnsweringPipeline, "forward", refuse)
    monkeypatch.setattr(sys, "argv", [*arguments, "--record"])
    answerable.main()
    again = json.loads((tmp_path / "out.json").read_text())
    assert {name: again[name] for name in ("no_answer_threshold", "answerable_calibration")} == {
        name: found[name] for name in ("no_answer_threshold", "answerable_calibration")
    }
    config = QuaLAMiniLMConfig.from_pretrained(folder)
    assert config.no_answer_threshold == found["no_answer_threshold"]
    assert config.answerable_calibration == found["answerable_calibration"]
