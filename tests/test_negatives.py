import random
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch

from conftest import squad_file, tiny_folder, trains
from recipe import negatives
from recipe.data import read_questions
from recipe.negatives import OPPOSITE, asked_otherwise, changed, elsewhere, fooling
from recipe.windows import TRAIN, validation_questions

pytestmark = trains
CONTEXT = "In 1851 Anna Brodie built the largest lighthouse near Bergen. Carl Nilsen sold it in 1872 for 40 crowns."


def row(question, *answers, context=CONTEXT):
    return {
        "question": question,
        "context": context,
        "answers": {"text": list(answers), "answer_start": [context.index(each) for each in answers]},
    }


def outcomes(question, *answers, context=CONTEXT):
    return {asked_otherwise(row(question, *answers, context=context), random.Random(seed)) for seed in range(200)}


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Whom had Carl Nilsen paid?", "40 crowns", {"Whom had Anna Brodie paid?", "Whom had Bergen paid?"}),
        ("What happened in 1851?", "the largest lighthouse", {"What happened in 1872?"}),
        ("Who built the largest lighthouse?", "Anna Brodie", {"Who built the smallest lighthouse?"}),
        ("Who ran it?", "Carl Nilsen", {None}),
    ],
)
def test_a_question_asks_about_what_else_its_paragraph_has(question, answer, expected):
    negated = {question.replace("had", "hadn't")} if "had" in question else set()
    built = {"Who destroyed the largest lighthouse?"} if "built" in question else set()
    assert outcomes(question, answer) == expected | negated | built


def test_neither_the_answer_nor_what_the_question_has_is_put_in():
    assert outcomes("For whom in 1851?", "1872") == {None}
    assert outcomes("Was 1851 before 1872?", "Bergen") == {"Was 1851 after 1872?"}


def test_a_question_is_negated_once():
    assert outcomes("Who did it?", "Anna Brodie") == {None, "Who didn't it?"}
    assert outcomes("Who didn't do it?", "Anna Brodie") == {None}


def test_opposites_are_other_words():
    assert all(word != other and word == word.casefold() for word, other in OPPOSITE.items())


def test_a_question_goes_to_the_paragraph_that_shares_its_rare_words(tmp_path):
    paragraphs = {
        "Own": [("The ferry to Skye costs 12 euros.", [("What does the ferry to Skye cost?", ["12 euros"])])],
        "Near": [("A ferry to Skye sails at noon.", [("When?", ["noon"])])],
        "Far": [("The bread costs more than the cake.", [("What does?", ["The bread"])])],
        "Answers": [("The ferry to Skye did once cost 12 euros.", [("Which ferry?", ["The ferry"])])],
    }
    table = read_questions(squad_file(tmp_path / "squad.json", paragraphs))
    moved = {each["question"]: each for each in elsewhere(table, seed=0)}
    found = moved["What does the ferry to Skye cost?"]
    assert found["context"] == "A ferry to Skye sails at noon." and not found["answers"]["text"]
    assert moved["Which ferry?"]["context"] != "The ferry to Skye costs 12 euros."  # it holds the answer


def test_changed_questions_keep_the_answers_that_the_model_may_fall_for(tmp_path):
    questions = [("What happened in 1851?", ["the largest lighthouse"]), ("Who ran it?", ["Carl Nilsen"])]
    (found,) = changed(read_questions(squad_file(tmp_path / "squad.json", {"One": [(CONTEXT, questions)]})), seed=0)
    assert found["question"] == "What happened in 1872?" and found["answers"]["text"] == ["the largest lighthouse"]


def test_a_model_is_fooled_by_what_it_answers():
    """By hand: in each window it answers with the third token, but where a 9 stands there, with [CLS]."""

    def model(input_ids, **_):
        logits = torch.zeros(input_ids.shape)
        logits[:, 2] = 5.0
        logits[:, 0] = 10.0 * (input_ids[:, 2] == 9)
        return SimpleNamespace(start_logits=logits, end_logits=logits)

    stub = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(type_vocab_size=2))
    stub = type("Stub", (), {"__call__": lambda self, **inputs: model(**inputs), **vars(stub)})()

    def window(third, place):
        return {"input_ids": [101, 5, third, 7, 102], "length": 5, "question_length": 2, "starts": [place]} | {
            "ends": [place]
        }

    rows = [window(6, 2), window(6, 3), window(6, 0), window(9, 2), window(9, 0)]
    assert fooling(stub, rows, pad_token_id=0, batch_size=2) == [0, 2]


def test_the_command_writes_windows_that_train(tmp_path, city_windows, city_file, monkeypatch, capsys):
    rows = datasets.load_from_disk(city_windows / TRAIN)
    answer = {f"{name}_{kind}": [0] for name in ("start", "end") for kind in ("tokens", "log_probabilities")}
    from recipe.answers import FEATURES

    datasets.Dataset.from_list([answer] * len(rows), features=FEATURES).save_to_disk(tmp_path / "answers")
    options = [
        "--model",
        tiny_folder(tmp_path / "model"),
        "--windows",
        city_windows,
        "--data",
        city_file,
        "--long",
        city_file,
    ]
    options += ["--answers", tmp_path / "answers", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["negatives", *map(str, options)])
    negatives.main()
    found = datasets.load_from_disk(tmp_path / "out" / TRAIN)
    assert set(found["id"]) <= set(rows["id"])
    told = {(row["id"], tuple(row["input_ids"])) for row in rows}
    new = [row for row in found if (row["id"], tuple(row["input_ids"])) not in told]
    assert new and all(row["starts"] == row["ends"] == row["start_tokens"] == [0] for row in new)
    assert len(validation_questions(tmp_path / "out")) == len(validation_questions(city_windows))
    assert f"Wrote {len(new)} windows that fooled the model" in capsys.readouterr().out
