"""Draws a passage once a layer, the tokens that the layer hands on dark and the others pale:
`python -m recipe.survivors --question "..." --context "..." --length_config balanced --output assets/survivors.png`.
"""

import argparse
import bisect
import itertools
import textwrap

import matplotlib.pyplot as plt
import torch

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from recipe import ROOT
from recipe.data import load_tokenizer
from recipe.presets import parse_length_config
from recipe.results import save_figure

COLUMNS = 100
KEPT, DROPPED, ANSWER = "black", "0.82", "tab:red"
INCHES_A_LINE, INCHES_A_COLUMN, FONT_SIZE = 0.15, 0.072, 8.5


def surviving_tokens(model, tokenizer, question, context, length_config=None):
    """Which tokens of a passage each layer hands on.

    Args:
        model ([`QuaLAMiniLMForQuestionAnswering`]), tokenizer (a fast one).
        question, context (`str`): together one window of the model.
        length_config: see [`QuaLAMiniLMConfig.token_lengths`].

    Returns:
        spans: `(start, end)` characters of each token of `context`; and for each layer a `list` of `bool`, one a token.
    """
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=384,
        return_token_type_ids=model.config.type_vocab_size > 1,
        return_tensors="pt",
    )
    with torch.inference_mode():
        kept = model(**encoded, length_config=length_config, output_kept_tokens=True).kept_tokens
    tokens = [i for i, sequence in enumerate(encoded.sequence_ids(0)) if sequence == 1]
    layers = [set(layer[0].tolist()) for layer in kept]
    return [encoded.token_to_chars(0, i) for i in tokens], [[i in layer for i in tokens] for layer in layers]


def draw_survivors(context, spans, layers, answer, path):
    """Writes the picture, a panel a layer, the answer's tokens red where they survive.

    Args:
        context, spans, layers: see [`surviving_tokens`].
        answer (`tuple`): its start and end, characters of `context`.
        path: of a file in a format that matplotlib writes.
    """
    lines = textwrap.wrap(context, COLUMNS, drop_whitespace=False, replace_whitespace=False, expand_tabs=False)
    starts = list(itertools.accumulate(map(len, lines[:-1]), initial=0))
    height = (len(lines) + 1.5) * len(layers)
    figure = plt.figure(figsize=((COLUMNS + 2) * INCHES_A_COLUMN, height * INCHES_A_LINE))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, COLUMNS + 1), ylim=(height, -0.5))
    axes.axis("off")
    for i, layer in enumerate(layers):
        top = i * (len(lines) + 1.5)
        title = f"after layer {i + 1}: {sum(layer)} of {len(layer)} tokens"
        axes.text(0, top + 0.9, title, fontsize=FONT_SIZE - 1, color="tab:blue", va="baseline")
        for (start, end), kept in zip(spans, layer):
            in_answer = answer[0] <= start < answer[1]
            color = (ANSWER if in_answer else KEPT) if kept else DROPPED
            row = bisect.bisect_right(starts, start) - 1
            axes.text(
                start - starts[row],
                top + row + 1.9,
                context[start:end].replace("$", r"\$"),
                fontsize=FONT_SIZE,
                family="monospace",
                color=color,
                va="baseline",
            )
    save_figure(figure, path, dpi=150)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder of the model (the shipped one)")
    parser.add_argument("--question", required=True)
    parser.add_argument("--context", required=True, help="a passage that fits into 384 tokens with the question")
    parser.add_argument("--length_config", default="balanced", help="a preset's name, or JSON: [0.9, ...] (balanced)")
    parser.add_argument("--output", required=True, help="picture to write")
    arguments = parser.parse_args()
    length_config = parse_length_config(arguments.length_config)
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(arguments.model).eval()
    tokenizer = load_tokenizer(arguments.model)
    question, context = arguments.question, arguments.context
    answer = QuestionAnsweringPipeline(model=model, tokenizer=tokenizer)(
        question=question, context=context, length_config=length_config
    )
    spans, layers = surviving_tokens(model, tokenizer, question, context, length_config)
    draw_survivors(context, spans, layers, (answer["start"], answer["end"]), arguments.output)
    print(f"{answer['answer']}\nWrote {arguments.output}")


if __name__ == "__main__":
    main()
