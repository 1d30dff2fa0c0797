"""The page of `make demo`, as people meet it: the shipped model behind it, a real Chromium in front."""

import re
import sys

import pytest

pytest.importorskip("gradio", reason="the demo runs in .venv, which make test sets up")
from playwright.sync_api import expect

from conftest import TIMEOUT
from demo.app import LOOK, WINDOW, Page, layers_html, passage_html
from recipe.survivors import surviving_tokens

QUESTION, CONTEXT = "Where do I live?", "My name is Wolfgang and I live in Berlin."


@pytest.fixture(scope="module")
def shown():
    """What the page shows, without a server or a browser."""
    return Page()


def texts(pattern, html):
    return re.findall(pattern, html, re.DOTALL)


def test_a_passage_is_marked_paled_and_escaped():
    html = passage_html("a <b> & c", (5, 9), {0, 2, 3, 4, 6, 7})
    assert html == (
        '<p class="passage"><span class="dropped">a</span> <span class="dropped">&lt;b&gt;</span>'
        '<mark> </mark><mark><span class="dropped">&amp; </span></mark><mark>c</mark></p>'
    )
    assert passage_html("Here it is.", (5, 7)) == '<p class="passage">Here <mark>it</mark> is.</p>'


def test_layers_are_drawn_with_their_counts():
    spans = [(0, 2), (3, 5), (3, 5), (5, 6)]  # two tokens share "cd"
    html = layers_html("ab cde", (5, 6), spans, [[True, True, False, True], [False, False, False, True]])
    assert texts("<h3>(.*?)</h3>", html) == ["After layer 1: 3 of 4 tokens", "After layer 2: 1 of 4 tokens"]
    assert texts('<p class="passage">(.*?)</p>', html) == [
        "ab cd<mark>e</mark>",
        '<span class="dropped">ab</span> <span class="dropped">cd</span><mark>e</mark>',
    ]


@pytest.mark.parametrize(
    "question, context, message",
    [
        ("", CONTEXT, "Type a question first."),
        (" \n\t", CONTEXT, "Type a question first."),
        (QUESTION, "", "Type a passage first."),
        (QUESTION, "  \n", "Type a passage first."),
        (QUESTION, "\u200b", "`context` holds no text"),
        ("why " * WINDOW, CONTEXT, f"`question` is {WINDOW} tokens long, which leaves no room"),
    ],
)
def test_what_cannot_be_answered_gets_a_message(shown, question, context, message):
    alert, *answers = shown.compare(question, context, "full", "fast")
    assert alert.startswith(f'<p role="alert">{message}') and answers == ["", ""]


def test_a_long_passage_is_answered_without_the_layers(shown):
    sky = "The sky is blue. "
    context = sky * 60 + CONTEXT + " " + sky * 40
    length = len(shown.tokenizer(QUESTION, context, verbose=False)["input_ids"])
    alert, html = shown.compare(QUESTION, context, "full")
    assert alert == "" and texts("<mark>(.*?)</mark>", html) == ["Berlin"]
    assert "<h3>" not in html and f"Question and passage are {length} tokens" in html
    (confidence,) = texts(r"confidence (\d+)%", html)
    assert int(confidence) == round(100 * shown.pipeline(question=QUESTION, context=context)["score"])


def test_a_passage_that_does_not_say_is_shown_as_that(shown, monkeypatch):
    """Unmarked, the layers as ever."""
    monkeypatch.setattr(shown.pipeline.reading, "no_answer_threshold", 1e6)
    monkeypatch.setattr(shown.pipeline.reading, "answerable_calibration", (1.0, -1e6))
    alert, html = shown.compare(QUESTION, CONTEXT, "full")
    assert alert == "" and texts("<h2>(.*?)</h2>", html) == ["The passage does not say"]
    assert texts(r"<p>(\d+% sure that it answers the question), \d+ ms</p>", html) == [
        "0% sure that it answers the question"
    ]
    assert "<mark>" not in html and "confidence" not in html and html.count("<h3>") == 6


@pytest.fixture(scope="module")
def server(shown):
    """The address of the running page, and the hosts that this process looks up or connects to."""
    hosts = set()

    def watch(event, arguments):
        if event == "socket.getaddrinfo":
            hosts.add(arguments[0])
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            hosts.add(arguments[1][0])

    sys.addaudithook(watch)
    blocks = shown.build()
    _, address, _ = blocks.launch(**LOOK, prevent_thread_lock=True, quiet=True)
    yield address, hosts
    blocks.close()


@pytest.fixture
def page(browser, server):
    """A tab on the page, once it has answered its first question."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(TIMEOUT * 1000)
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(server[0])
    expect(page.locator("#second-answer h2")).not_to_be_empty()
    yield page
    page.close()


def ask(page, question, context):
    page.get_by_label("Question").fill(question)
    page.get_by_label("Passage").fill(context)
    page.get_by_role("button", name="Answer").click()


def headings(shown, preset):
    """What stands above each layer for the question that the tests ask."""
    _, layers = surviving_tokens(shown.model, shown.tokenizer, QUESTION, CONTEXT, preset)
    return [f"After layer {i}: {sum(layer)} of {len(layer)} tokens" for i, layer in enumerate(layers, 1)]


def test_an_answer_appears_in_the_passage(page):
    ask(page, QUESTION, CONTEXT)
    for side in ("#first-answer", "#second-answer"):
        expect(page.locator(f"{side} h2")).to_have_text("Berlin")
        passage = page.locator(f"{side} .passage").first
        expect(passage).to_have_text(CONTEXT)
        expect(passage.locator("mark")).to_have_text("Berlin")
        expect(page.locator(side)).to_contain_text(
            re.compile(r"confidence \d+%, \d+% sure that it answers the question, \d+ ms")
        )
    expect(page.locator("#message")).to_be_empty()


def test_another_preset_draws_another_picture(page, shown):
    ask(page, QUESTION, CONTEXT)
    first, second = page.locator("#first-answer h3"), page.locator("#second-answer h3")
    expect(second).to_have_text(headings(shown, "fastest"))
    assert headings(shown, "fastest") != headings(shown, "balanced")
    page.locator("#second-preset").get_by_label("balanced").check()
    expect(second).to_have_text(headings(shown, "balanced"))
    expect(first).to_have_text(headings(shown, "full"))
    assert page.locator("#first-answer .dropped").count() == 0
    color = "node => getComputedStyle(node).opacity"
    assert float(page.locator("#second-answer .dropped").first.evaluate(color)) < 1


def test_an_empty_question_gets_a_message_and_no_trace(page, capfd):
    ask(page, "", CONTEXT)
    expect(page.get_by_role("alert")).to_have_text("Type a question first.")
    expect(page.locator("mark")).to_have_count(0)
    assert "Traceback" not in page.content() and "Traceback" not in "".join(capfd.readouterr())
    ask(page, QUESTION, CONTEXT)
    expect(page.locator("#first-answer h2")).to_have_text("Berlin")
    expect(page.get_by_role("alert")).to_have_count(0)


def tab_to(page, target):
    """Presses Tab until the target has the focus."""
    for _ in range(12):
        page.keyboard.press("Tab")
        if target.evaluate("node => node === document.activeElement"):
            assert target.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"  # it shows
            return
    raise AssertionError(f"Tab does not reach {target}")


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_is_enough(page, shown, key):
    for name, text in (("Question", QUESTION), ("Passage", CONTEXT)):
        tab_to(page, page.get_by_label(name))
        page.keyboard.press("Control+A")
        page.keyboard.type(text)
    tab_to(page, page.get_by_role("button", name="Answer"))
    page.keyboard.press(key)
    expect(page.locator("#second-answer h2")).to_have_text("Berlin")
    presets = page.locator("#second-preset")
    tab_to(page, presets.get_by_label("fastest"))
    # Faster than answers come.
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(presets.get_by_label("balanced")).to_be_checked()
    expect(page.locator("#second-answer h3")).to_have_text(headings(shown, "balanced"))


def test_nothing_scrolls_sideways_on_a_phone(page):
    page.set_viewport_size({"width": 375, "height": 700})
    word = "https://example.org/" + "x" * 200
    ask(page, "What is the address?", f"The address is {word}, and it is long.")
    expect(page.locator("#second-answer .passage").first).to_contain_text(word)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # Nor is anything cut off.
    edges = "[...document.querySelectorAll('.gradio-container *')].map(node => node.getBoundingClientRect().right)"
    assert max(page.evaluate(edges)) <= 375


def test_html_in_a_passage_is_text(page):
    context = 'I live <img src="x" onerror="document.title = 1"> in <b>Berlin</b> & {{value}} ${value}.'
    ask(page, QUESTION, context)
    passage = page.locator("#second-answer .passage").first
    expect(passage).to_have_text(context)
    expect(page.locator("#second-answer").locator("img, b")).to_have_count(0)
    expect(page).to_have_title("QuaLA-MiniLM")


def test_nothing_leaves_the_machine(page, server):
    address, hosts = server
    assert page.requests and all(url.startswith((address, "data:", "blob:")) for url in page.requests)
    assert hosts and hosts <= {"127.0.0.1", "localhost"}
