import itertools

import matplotlib
import pytest

matplotlib.use("Agg")

from conftest import ROOT
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.data import load_tokenizer
from recipe.survivors import draw_survivors, surviving_tokens

QUESTION = "What does the kettle lack?"
CONTEXT = "The kettle costs $5 or $9, boils a litre in two minutes and is quiet, but it has no lid, so all steams."


@pytest.fixture(scope="module")
def model():
    return QuaLAMiniLMForQuestionAnswering.from_pretrained(ROOT).eval()


def test_tokens_are_the_passages_and_survive_as_the_model_says(model):
    tokenizer = load_tokenizer(ROOT)
    spans, layers = surviving_tokens(model, tokenizer, QUESTION, CONTEXT, [1.0, 0.8, 0.6, 0.5, 0.3, 0.3])
    assert [CONTEXT[start:end].lower() for start, end in spans] == [
        token.removeprefix("##") for token in tokenizer.tokenize(CONTEXT)
    ]
    assert all(layers[0])
    for lower, upper in itertools.pairwise(layers):
        assert all(low or not up for low, up in zip(lower, upper))
    # Of the window's tokens a layer keeps its share, rounded up; the question's and three special ones are not drawn.
    window = len(spans) + len(tokenizer.tokenize(QUESTION)) + 3
    kept = [-(-share * window // 10) for share in (10, 8, 6, 5, 3, 3)]
    assert all(sum(layer) <= count for layer, count in zip(layers, kept))
    assert all(sum(layer) >= count - (window - len(spans)) for layer, count in zip(layers, kept))
    lid = next(i for i, (start, end) in enumerate(spans) if CONTEXT[start:end] == "lid")
    assert layers[-1][lid]


def test_the_picture_is_drawn(model, tmp_path):
    spans, layers = surviving_tokens(model, load_tokenizer(ROOT), QUESTION, CONTEXT, "balanced")
    draw_survivors(CONTEXT, spans, layers, (0, 10), tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert all(f"after layer {i}: {sum(layer)} of {len(layer)} tokens" in text for i, layer in enumerate(layers, 1))
