"""The blocks of docs/clients.md that need no more than the tests have; scripts of tests/clients run the others."""

import json
import sys

import datasets
import pandas
import pytest
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from conftest import ROOT, TRANSFORMERS_5, tiny_folder
from tests.clients.document import blocks, run

ROWS = [{"id": i, "question": "Where is it?", "context": f"It is in {place}."} for i, place in enumerate("ABC")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def qa(folder):
    return pipeline("question-answering", model=str(folder), trust_remote_code=True)


@pytest.fixture
def with_model_object(folder, monkeypatch):
    """The names of the block for a model object, whose preset the tiny model lacks."""
    (code,) = blocks("A model object")
    assert code.count('"fast"') == 1
    monkeypatch.chdir(folder)
    return run(code.replace('"fast"', "[0.5, 0.5]"))


def test_a_model_object_gets_our_pipeline(with_model_object, qa):
    found = with_model_object["qa"]
    assert type(found).__module__.endswith("pipeline_qualaminilm")
    assert found(ROWS[0]) == qa(ROWS[0], length_config=[0.5, 0.5])


def test_without_the_two_arguments_it_is_not_found(with_model_object):
    """What the document says of both lines; should another version find it, the document may say less."""
    given = {name: with_model_object[name] for name in ("model", "tokenizer")}
    if not TRANSFORMERS_5:
        assert type(pipeline("question-answering", **given)).__module__.startswith("transformers.pipelines")
        return
    tasks = dict(PIPELINE_REGISTRY.supported_tasks)
    try:
        PIPELINE_REGISTRY.register_pipeline("question-answering", with_model_object["ours"])
        with pytest.raises(KeyError, match="question-answering"):
            pipeline("question-answering", **given)
    finally:
        PIPELINE_REGISTRY.supported_tasks.clear()
        PIPELINE_REGISTRY.supported_tasks.update(tasks)


def test_data_sets_are_mapped_streamed_and_keyed(qa, capsys):
    mapped, streamed, keyed = blocks("datasets")
    assert streamed.count('"fast"') == 1
    streamed = streamed.replace('"fast"', "[0.5, 0.5]")
    rows = datasets.Dataset.from_list(ROWS)
    alone = [qa(row) for row in ROWS]
    answered = run(mapped, qa=qa, rows=rows)["answered"]
    assert list(answered["answer"]) == [answer["answer"] for answer in alone]
    run(streamed, qa=qa, rows=rows)
    tight = [f"{row['id']} {qa(row, length_config=[0.5, 0.5])['answer']}" for row in ROWS]
    assert capsys.readouterr().out.splitlines() == tight
    assert run(keyed, qa=qa, rows=rows)["found"] == alone


def test_a_data_frame_s_rows_are_answered(qa):
    (code,) = blocks("pandas")
    frame = pandas.DataFrame(ROWS)
    run(code, qa=qa, frame=frame)
    assert list(frame["answer"]) == [qa(row)["answer"] for row in ROWS]
    frame.loc[1, "context"] = None
    with pytest.raises(ValueError, match="row 1: `context`"):
        run(code, qa=qa, frame=frame)


def test_the_endpoint_s_body_is_answered(monkeypatch):
    (body,) = blocks("A Hub Inference Endpoint", "json")
    (code,) = blocks("A Hub Inference Endpoint")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "handler", raising=False)
    answers = run(code, body=json.loads(body))["answers"]
    assert len(answers) == 2 and answers[0]["answer"] == "Berlin"
