import importlib.util
import json

import pytest
from transformers import pipeline

from conftest import ROOT

BODY = {"inputs": {"question": "Where do I live?", "context": "My name is Wolfgang and I live in Berlin."}}


@pytest.fixture(scope="module")
def handler():
    """The class as an endpoint finds it: in the file handler.py of the repository, called with its folder."""
    spec = importlib.util.spec_from_file_location("handler", ROOT / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(ROOT))


def respond(handler, body):
    """JSON in, JSON out."""
    return json.loads(json.dumps(handler(json.loads(json.dumps(body)))))


def test_a_request_is_answered_as_the_pipeline_does(handler):
    qa = pipeline("question-answering", model=str(ROOT), trust_remote_code=True)
    assert respond(handler, BODY) == qa(**BODY["inputs"])
    for parameters in ({"length_config": "fastest"}, {"top_k": 3, "max_answer_len": 4}):
        assert respond(handler, BODY | {"parameters": parameters}) == qa(**BODY["inputs"], **parameters)
    assert respond(handler, BODY)["answer"] == "Berlin"
    sure = respond(handler, BODY | {"parameters": {"return_answerable": True}})
    assert 0 <= sure.pop("answerable") <= 1 and sure == respond(handler, BODY)
    none = {"handle_impossible_answer": True, "no_answer_threshold": 1e6}
    assert respond(handler, BODY | {"parameters": none})["answer"] == ""


def test_several_inputs_get_a_list(handler):
    other = {"question": "What is my name?", "context": "My name is Wolfgang."}
    answers = respond(handler, {"inputs": [BODY["inputs"], other]})
    assert [answer["answer"] for answer in answers] == ["Berlin", "Wolfgang"]
    assert [answer["answer"] for answer in respond(handler, {"inputs": [other]})] == ["Wolfgang"]
    (ranked,) = respond(handler, {"inputs": [other], "parameters": {"top_k": 2}})
    assert len(ranked) == 2 and ranked[0]["answer"] == "Wolfgang"
    (only,) = respond(handler, {"inputs": {"question": "Where?", "context": "Turku"}, "parameters": {"top_k": 2}})
    assert only["answer"] == "Turku"


@pytest.mark.parametrize(
    "body, message",
    [
        (None, "inputs is None, expected"),
        ([], "inputs is None, expected"),
        ({}, "inputs is None, expected"),
        ({"inputs": []}, r"inputs is \[\], expected"),
        ({"inputs": "Where?"}, "inputs is 'Where\\?', expected"),
        ({"inputs": {"question": "Where?"}}, "inputs is .*, expected"),
        ({"inputs": [BODY["inputs"], 3]}, "inputs is .*, expected"),
        ({"inputs": {"question": "", "context": "Here."}}, "`question` cannot be empty"),
        ({"inputs": {"question": 5, "context": "Here."}}, "question is 5, expected a text"),
        ({"inputs": {"question": "Where?", "context": None}}, "context is None, expected a text"),
        ({"inputs": {"question": ["Where?"], "context": ["Here."]}}, r"question is \['Where\?'\], expected a text"),
        (BODY | {"parameters": [1]}, r"parameters is \[1\], expected an object"),
        (BODY | {"parameters": {"trust_remote_code": True}}, "parameters has 'trust_remote_code', expected some of"),
        (
            BODY | {"parameters": {"padding": True}},
            "parameters has 'padding', expected some of align_to_words, batch_size",
        ),
        (BODY | {"parameters": {"question": "Who?"}}, "parameters has 'question', expected some of"),
        ({"inputs": [BODY["inputs"], {"question": "Where?", "context": " "}]}, "row 1: `context` holds no text"),
        (BODY | {"parameters": {"top_k": 0}}, "top_k parameter should be an int >= 1"),
        (BODY | {"parameters": {"no_answer_threshold": "0"}}, "no_answer_threshold is '0', expected a number"),
        (BODY | {"parameters": {"length_config": "quick"}}, "length_config is 'quick', which is no preset"),
    ],
)
def test_bad_requests_are_named(handler, body, message):
    with pytest.raises(ValueError, match=message):
        respond(handler, body)
