import random
from itertools import groupby

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, squad_file
from recipe.data import load_tokenizer, read_questions
from recipe.windows import MENTION, near_misses, off_topic, runs_of_words, split, validation_questions, windows

QUESTION, CONTEXT = "Where do I live?", "My name is Wolfgang and I live in Berlin. It is nice here, really."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "tests" / "folders" / "int8")


@st.composite
def answered(draw):
    """A context, and one of its answers: text and first character."""
    words = draw(
        st.lists(st.sampled_from("alpha Beta, (gamma) naïve 東京 1,000 it's".split()), min_size=3, max_size=80)
    )
    first = draw(st.integers(0, len(words) - 1))
    last = draw(st.integers(first, min(first + 5, len(words) - 1)))
    return " ".join(words), " ".join(words[first : last + 1]), len(" ".join(words[:first])) + (first > 0)


@given(st.lists(answered(), min_size=10, max_size=10))
@settings(max_examples=4, deadline=None)
def test_spans_decode_to_the_answers(rows):
    tokenizer = load_tokenizer(ROOT)
    questions = Dataset.from_list(
        [
            {"id": "1", "context": context, "question": "what?", "answers": {"text": [text], "answer_start": [start]}}
            for context, text, start in rows
        ]
    )
    # Each answer, as often as there are windows that hold it; the others point to [CLS].
    features = windows(questions, tokenizer, max_length=60)
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text, _ in rows]
    found = []
    for feature in features:
        assert feature["length"] == len(feature["input_ids"]) <= 60
        (a,), (b,) = feature["starts"], feature["ends"]
        if (a, b) == (0, 0):
            continue
        assert a >= feature["question_length"] == feature["input_ids"].index(tokenizer.sep_token_id) + 1
        found.append(feature["input_ids"][a : b + 1])
    assert [ids for ids, _ in groupby(found)] == [ids for ids, _ in groupby(answers)]


def test_a_window_that_does_not_answer_points_to_cls(tokenizer, tmp_path):
    paragraphs = [(CONTEXT, [(QUESTION, ["Berlin", "in Berlin"]), ("Who is she?", [])])]
    rows = list(windows(read_questions(squad_file(tmp_path / "squad.json", {"One": paragraphs})), tokenizer, 384))
    text = [tokenizer.decode(rows[0]["input_ids"][a : b + 1]) for a, b in zip(rows[0]["starts"], rows[0]["ends"])]
    assert text == ["berlin", "in berlin"]
    assert (rows[1]["starts"], rows[1]["ends"]) == ([0], [0])
    question = rows[0]["input_ids"][: rows[0]["question_length"]]
    assert tokenizer.decode(question) == "[CLS] where do i live? [SEP]"


def test_no_training_paragraph_shares_eight_words_with_validation(tmp_path):
    rng = random.Random(0)
    sentences = [" ".join(f"w{rng.randrange(999)}" for _ in range(9)) for _ in range(40)]
    articles = {
        f"Title {i}": [(f"{rng.choice(sentences)}. Ann lives in {i}.", [("Where?", [str(i)])])] for i in range(300)
    }
    table = read_questions(squad_file(tmp_path / "squad.json", articles))
    train, validation, dropped = split({"one": table})
    held_out = {run for context in validation["one"]["context"] for run in runs_of_words(context)}
    assert len(validation["one"]) and dropped and not set(train["one"]["title"]) & set(validation["one"]["title"])
    assert len(train["one"]) + len(validation["one"]) + dropped == 300
    assert not any(held_out & runs_of_words(context) for context in train["one"]["context"])


def test_off_topic_questions_stand_on_paragraphs_of_other_articles(tmp_path):
    articles = {f"Title {i}": [(f"Ann lives in {i}.", [(f"Where, {i}?", [str(i)])])] for i in range(50)}
    table = read_questions(squad_file(tmp_path / "squad.json", articles))
    rows = list(off_topic(table, 0.4, seed=0))
    assert len(rows) in range(15, 21) and not any(row["answers"]["text"] for row in rows)
    assert all(f"Ann lives in {row['question'][7:-1]}." != row["context"] for row in rows)


@pytest.mark.parametrize(
    "question, mentions",
    [
        (
            "When did Ada Lovelace's friend O'Brien leave Rome?",
            [("name", "Ada Lovelace"), ("name", "O'Brien"), ("name", "Rome")],
        ),
        ("In 1843, what cost 1,200.50 pounds?", [("year", "1843"), ("number", "1,200.50")]),
        ("Who comes on Tuesday, in May or at 7?", [("day", "Tuesday"), ("month", "May"), ("number", "7")]),
        ("Ada lives where?", []),
        ("Where is Élan\u2019s river?", [("name", "Élan")]),
    ],
)
def test_what_a_question_mentions(question, mentions):
    assert [(mention.lastgroup, mention[0]) for mention in MENTION.finditer(question)] == mentions


def test_near_misses_ask_about_what_their_paragraph_has_not(tmp_path):
    people = ["Ann Gray", "Bob", "Carla", "Dan"]
    articles = {
        f"Title {i}": [
            (
                f"{who} came to {i} in {1900 + i} and stayed.",
                [(f"When did {who} stay?", [str(i)]), ("Who stayed?", [who])],
            )
            for who in people[i % 2 :: 2]
        ]
        for i in range(40)
    }
    table = read_questions(squad_file(tmp_path / "squad.json", articles))
    rows = list(near_misses(table, 0.3, seed=0))
    assert len(rows) == 48 and not any(row["answers"]["text"] for row in rows)
    asked, of_same_article = dict(zip(table["id"], table["question"])), 0
    for row in rows:
        ((_, before),) = [(each.lastgroup, each[0]) for each in MENTION.finditer(asked[row["id"]])]
        ((kind, after),) = [(each.lastgroup, each[0]) for each in MENTION.finditer(row["question"])]
        assert kind == "name" and after not in row["context"]
        assert row["question"] == asked[row["id"]].replace(before, after)
        of_same_article += {before, after} in ({"Ann Gray", "Carla"}, {"Bob", "Dan"})
    assert of_same_article > 40  # which has one more person, and may be missed by chance
    assert len(near_misses(table, 1.0, seed=0)) == 80  # of the other half nothing stands in the question


def test_what_validates_is_read_with_its_source(city_windows):
    questions = validation_questions(city_windows)
    assert set(questions["source"]) == {"cities"} and questions["answers"][0]["text"]
