"""A page to ask questions on: `make demo`, then open the address that it prints."""

import html
import itertools
import time

import gradio as gr

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from recipe import ROOT
from recipe.data import load_tokenizer
from recipe.survivors import surviving_tokens

QUESTION = "Why were pyramids built rather than other shapes?"
CONTEXT = (
    "Structural engineering dates back to 2700 B.C.E. when the step pyramid for Pharaoh Djoser was built by Imhotep, "
    "the first engineer in history known by name. Pyramids were the most common major structures built by ancient "
    "civilizations because the structural form of a pyramid is inherently stable and can be almost infinitely scaled "
    "(as opposed to most other structural forms, which cannot be linearly increased in size in proportion to increased "
    "loads)."
)
WINDOW = 384  # tokens of the pipeline's windows
# White on Gradio's own orange is hard to read.
THEME = gr.themes.Default(primary_hue="indigo", font=("system-ui", "sans-serif"))
# Pale at half opacity is still readable: a contrast of 3, what WCAG asks of graphics.
STYLE = """
[role=alert] { color: var(--error-text-color); font-weight: 600; }
.shown { overflow-wrap: anywhere; }
.passage { line-height: 1.6; white-space: pre-wrap; }
.shown mark { background: #fde68a; }
.shown mark, .shown mark .dropped { color: #111827; }
.dropped { opacity: 0.5; }
:focus-visible { outline: 2px solid currentColor !important; outline-offset: 2px; }
"""
LOOK = {"theme": THEME, "css": STYLE, "footer_links": []}  # of [`gradio.Blocks.launch`]
# Gradio names every radio apart, anew at each choice. Of one name they are a group: one stop of Tab, and the arrow keys
# move its choice. Given at each key, before the browser acts on it.
GROUP_RADIOS = """() => document.addEventListener("keydown", () => {
    for (const radio of document.querySelectorAll("[type=radio]")) radio.name = radio.closest("fieldset").id;
}, true)"""


def passage_html(context, answer, dropped=frozenset()):
    """The passage as HTML.

    Args:
        context (`str`): the passage.
        answer (`tuple`): start and end of the characters to mark.
        dropped (`set`): the characters to draw pale.
    """
    parts = []
    for (marked, pale), run in itertools.groupby(
        range(len(context)), key=lambda i: (answer[0] <= i < answer[1], i in dropped)
    ):
        text = html.escape("".join(context[i] for i in run))
        text = f'<span class="dropped">{text}</span>' if pale else text
        parts.append(f"<mark>{text}</mark>" if marked else text)
    return f'<p class="passage">{"".join(parts)}</p>'


def layers_html(context, answer, spans, layers):
    """The passage once a layer, the tokens that the layer dropped pale; see [`surviving_tokens`]."""
    parts = []
    for number, layer in enumerate(layers, 1):
        kept, dropped = set(), set()
        for (start, end), survives in zip(spans, layer):
            (kept if survives else dropped).update(range(start, end))
        # Several tokens may share a character, a Korean syllable for one; it is pale when all of them are dropped.
        parts.append(
            f"<h3>After layer {number}: {sum(layer)} of {len(layer)} tokens</h3>"
            + passage_html(context, answer, dropped - kept)
        )
    return "".join(parts)


def message_html(text):
    return f'<p role="alert">{html.escape(text)}</p>'


class Page:
    """The page and what it shows, all of it the shipped model's."""

    def __init__(self):
        self.model = QuaLAMiniLMForQuestionAnswering.from_pretrained(ROOT).eval()
        self.tokenizer = load_tokenizer(ROOT)
        self.pipeline = QuestionAnsweringPipeline(model=self.model, tokenizer=self.tokenizer)
        # A first call is slower than all that follow: not the one whose time is shown.
        self.pipeline(question=QUESTION, context=CONTEXT)

    def compare(self, question, context, *presets):
        """HTML of a message, empty where all went well, and of each preset's answer."""
        for name, text in (("question", question), ("passage", context)):
            if not text.strip():
                return message_html(f"Type a {name} first."), *("" for _ in presets)
        try:
            return "", *[self.answer(question, context, preset) for preset in presets]
        except ValueError as error:
            return message_html(str(error)), *("" for _ in presets)

    def answer(self, question, context, preset):
        """HTML of a preset's answer, marked in its passage, or that there is none, and of the tokens that each layer
        kept."""
        started = time.perf_counter()
        answer = self.pipeline(
            question=question,
            context=context,
            length_config=preset,
            handle_impossible_answer=True,
            return_answerable=True,
        )
        milliseconds = (time.perf_counter() - started) * 1e3
        heading, sure = "The passage does not say", f"{answer['answerable']:.0%} sure that it answers the question"
        if answer["answer"]:
            heading, sure = answer["answer"], f"confidence {answer['score']:.0%}, {sure}"
        place = answer["start"], answer["end"]
        length = len(self.tokenizer(question, context, verbose=False)["input_ids"])
        if length <= WINDOW:
            layers = layers_html(
                context, place, *surviving_tokens(self.model, self.tokenizer, question, context, preset)
            )
        else:
            layers = (
                f"<p>Question and passage are {length} tokens, read in several windows. The layers are drawn for texts "
                f"of one window, up to {WINDOW} tokens.</p>"
            )
        return (
            f"<h2>{html.escape(heading)}</h2><p>{sure}, {milliseconds:.0f} ms</p>"
            + passage_html(context, place)
            + layers
        )

    def build(self):
        """The page, a [`gradio.Blocks`]."""
        presets = list(self.model.config.length_presets)
        with gr.Blocks(title="QuaLA-MiniLM", analytics_enabled=False) as blocks:
            gr.Markdown(
                "# Ask a passage\nThe answer is a slice of the passage, if it has one. Two presets answer side by "
                "side: below each answer, the passage once a layer, the tokens pale that the layer dropped."
            )
            question = gr.Textbox(QUESTION, label="Question", elem_id="question")
            context = gr.Textbox(CONTEXT, label="Passage", lines=6, max_lines=20, elem_id="passage")
            button = gr.Button("Answer", variant="primary", elem_id="answer")
            message = gr.HTML(elem_id="message")
            choosers, answers = [], []
            with gr.Row():
                for side, preset in (("first", presets[0]), ("second", presets[-1])):
                    with gr.Column():
                        label = f"{side.capitalize()} preset"
                        choosers.append(gr.Radio(presets, value=preset, label=label, elem_id=f"{side}-preset"))
                        answers.append(gr.HTML(elem_id=f"{side}-answer", elem_classes="shown"))
            # Arrow keys run through the presets faster than they answer: the last one must not get lost.
            gr.on(
                [button.click, question.submit, *(chooser.change for chooser in choosers), blocks.load],
                self.compare,
                [question, context, *choosers],
                [message, *answers],
                show_progress="minimal",
                trigger_mode="always_last",
            )
            blocks.load(js=GROUP_RADIOS)
        return blocks


def main():
    Page().build().launch(**LOOK)


if __name__ == "__main__":
    main()
