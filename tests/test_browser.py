"""The page of `make page` in a real Chromium, from a file server on the loopback, and the same model in Node."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from playwright.sync_api import expect

from conftest import ROOT, TIMEOUT, once
from qualaminilm.graph_qualaminilm import GRAPH_FILE
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from recipe import export
from recipe.browser import write_page
from recipe.data import load_tokenizer
from recipe.page_speed import served
from tests.javascript import BROWSER, NODE, call, in_code_units, needs_node_packages, read_cases

QUESTION, CONTEXT = "Where do I live?", "My name is Wolfgang and I live in Berlin."
pytestmark = [once, needs_node_packages]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the page."""
    folder = tmp_path_factory.mktemp("page") / "page"
    write_page(folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def qa():
    """Python with the same graph: `auto` may take long windows to torch, whose int8 rounds otherwise."""
    in_graph = QuaLAMiniLMForQuestionAnswering.from_pretrained(ROOT, engine="onnxruntime").eval()
    return QuestionAnsweringPipeline(model=in_graph, tokenizer=load_tokenizer(ROOT))


def test_the_graph_has_no_default_and_node_feeds_it(built):
    """Which onnxruntime-node would take in place of what it is given."""
    full, fastest = call([["logits", QUESTION, CONTEXT, preset] for preset in ("full", "fastest")], built / "model")
    assert len(full[0]) == len(fastest[0]) and full != fastest


def test_a_graph_with_a_default_is_refused(built, tmp_path):
    folder = shutil.copytree(built / "model", tmp_path / "model")
    shutil.copy(ROOT / GRAPH_FILE, folder / "model.onnx")
    (error,) = call([["answer", QUESTION, CONTEXT, {"length_config": "fast"}]], folder)
    assert isinstance(error, ValueError) and "no length_config" in str(error)


def test_what_the_page_lacks_is_named(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileNotFoundError, match="model_int8.onnx is missing: python -m recipe.export"):
        write_page(tmp_path / "page", tmp_path)
    with pytest.raises(FileExistsError):
        write_page(tmp_path / "there", tmp_path)
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("preset", ["full", "fast"])
def test_node_answers_as_python(built, qa, preset):
    """Some of the cases, of every kind; python -m tests.compare_javascript counts all."""
    cases = read_cases()[::20]
    options = {"length_config": preset, "handle_impossible_answer": True, "return_answerable": True}
    calls = [["answer", case["question"], case["context"], options] for case in cases]
    alike = 0
    for case, found in zip(cases, call(calls, built / "model"), strict=True):
        answer = qa(question=case["question"], context=case["context"], **options)
        (expected,) = in_code_units(case["context"], [answer])
        alike += found == {
            name: found[name] if name in ("score", "answerable") else expected[name] for name in expected
        }
        assert abs(found["score"] - expected["score"]) < 0.1 or found["answer"] != expected["answer"]
    assert alike >= len(cases) - 1


def example(*arguments):
    return subprocess.run(
        [NODE, "example.js", *map(str, arguments)], cwd=BROWSER, capture_output=True, text=True, encoding="utf-8"
    )


def test_the_example_in_node(built):
    done = example(built / "model", QUESTION, "I'm Wolfgang 🐺 and I live in Berlin.", "fast")
    answer = json.loads(done.stdout)
    assert answer["answer"] == "Berlin" and (answer["start"], answer["end"]) == (30, 36)
    done = example(built / "model", QUESTION, " ")
    assert done.returncode == 1 and done.stderr.startswith("`context` holds no text") and "at " not in done.stderr


def test_the_module_goes_by_the_package_s_name():
    script = 'import("qualaminilm").then(({ QuestionAnswering }) => console.log(QuestionAnswering.name))'
    done = subprocess.run([NODE, "-e", script], cwd=BROWSER, capture_output=True, text=True)
    assert done.stdout == "QuestionAnswering\n", done.stderr


PIPELINE = """
const { env, pipeline } = require("@huggingface/transformers");
env.allowRemoteModels = false;
const [folder, ...asked] = process.argv.slice(1);
(async () => console.log(JSON.stringify(await (await pipeline("question-answering", folder))(...asked))))();
"""


def test_transformers_js_answers(qa, tmp_path):
    """As transformers.js does, without places and lower-cased; the score shows that token types arrive."""
    folder = tmp_path / "exported"
    loaded = QuaLAMiniLMForQuestionAnswering.from_pretrained(ROOT)
    export.export(loaded, load_tokenizer(ROOT), None, "transformers.js", folder)
    done = subprocess.run(
        [NODE, "--input-type=commonjs", "-e", PIPELINE, folder, QUESTION, CONTEXT],
        cwd=BROWSER,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = qa(question=QUESTION, context=CONTEXT, align_to_words=False)
    assert json.loads(done.stdout) == {"answer": "berlin", "score": pytest.approx(expected["score"], abs=0.01)}


@pytest.fixture(scope="module")
def address(built):
    with served(built) as where:
        yield where


@pytest.fixture(scope="module")
def opened(browser, address):
    """The page once it has answered its first question, its context, which can be cut off, and what it asked for."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(TIMEOUT * 1000)
    requests, faults = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: faults.append(error))
    # What reads PDFs comes last.
    with page.expect_response("**/pdf.worker.min.mjs"):
        page.goto(address)
    expect(page.locator("#answer")).not_to_be_empty()
    yield SimpleNamespace(page=page, context=context, requests=requests, faults=faults)
    context.close()


@pytest.fixture
def page(opened):
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    return opened.page


def ask(page, question, context, preset="full"):
    page.get_by_label("Question").fill(question)
    page.get_by_label("Text", exact=True).fill(context)
    page.get_by_label("Preset").select_option(preset)
    page.get_by_role("button", name="Answer").click()


def expect_answer(page, text):
    expect(page.locator("#result:not([hidden]) #answer")).to_have_text(text)


def test_an_answer_appears_in_the_text(page):
    ask(page, QUESTION, CONTEXT)
    expect_answer(page, "Berlin")
    expect(page.locator("#passage")).to_have_text(CONTEXT)
    expect(page.locator("#passage mark")).to_have_text("Berlin")
    expect(page.locator("#measures")).to_contain_text(" ms")
    expect(page.locator("#message")).to_be_empty()


def test_the_speed_of_the_page_is_measured(built, tmp_path):
    command = ["-m", "recipe.page_speed", "--page", built, "--model", ROOT, "--turns", 1, "--output", tmp_path / "o"]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)
    measured = json.loads((tmp_path / "o").read_text())
    assert measured["seconds_to_first_answer"] > 0 and next(iter(measured["presets"])) == "full"
    for row in measured["presets"].values():
        assert row["times_native"] == pytest.approx(row["ms"] / row["native_ms"])
        assert row["of_full"] == pytest.approx(row["ms"] / measured["presets"]["full"]["ms"])


LOGITS = """async ([question, context]) => {
    const ort = await import("/onnxruntime-web/ort.wasm.bundle.min.mjs");
    const { QuestionAnswering } = await import("/qualaminilm/qualaminilm.js");
    const read = async (name) => new Uint8Array(await (await fetch(`/model/${name}`)).arrayBuffer());
    const qa = await QuestionAnswering.load(ort, read);
    const [window] = qa.reading.windows(question, qa.reading.tokens(context));
    const logits = (preset) => qa.logits(window, qa.lengthConfigs.tokenLengths(preset));
    return [await logits("full"), await logits("fastest")].map((each) => Array.from(each[0]));
}"""


def test_the_browser_feeds_the_length_config(page, built):
    full, fastest = page.evaluate(LOGITS, [QUESTION, CONTEXT])
    assert full != fastest
    ((in_node, _),) = call([["logits", QUESTION, CONTEXT, "full"]], built / "model")
    assert full == pytest.approx(in_node, abs=0.5)


def test_another_preset_answers_anew(page):
    ask(page, QUESTION, CONTEXT)
    expect_answer(page, "Berlin")
    page.evaluate("document.getElementById('answer').textContent = 'old'")
    page.get_by_label("Preset").select_option("fastest")
    expect_answer(page, "Berlin")


@pytest.mark.parametrize(
    "question, context, message",
    [
        ("", CONTEXT, "Type a question first."),
        (QUESTION, " \n", "Type a text first."),
        (QUESTION, "\u200b", "`context` holds no text"),
        ("why " * 384, CONTEXT, "`question` is 384 tokens long"),
    ],
)
def test_bad_input_gets_a_message(page, opened, question, context, message):
    ask(page, question, context)
    expect(page.locator("#message")).to_contain_text(message)
    expect(page.locator("#result")).to_be_hidden()
    ask(page, QUESTION, CONTEXT)
    expect_answer(page, "Berlin")
    expect(page.locator("#message")).to_be_empty()
    assert not opened.faults


def test_a_text_that_does_not_say_is_shown_as_that(browser, address, built):
    """Of a model that wants more evidence than there is."""
    config = json.loads((built / "model" / "config.json").read_text()) | {"no_answer_threshold": 1e6}
    page = browser.new_page()
    page.route("**/model/config.json", lambda route: route.fulfill(json=config))
    page.goto(address)
    expect_answer(page, "Not in the text")
    expect(page.locator("#passage")).to_contain_text("Structural engineering dates back")
    assert page.locator("mark").count() == 0
    page.close()


def test_html_in_a_text_is_text(page):
    context = 'I live <img src="x" onerror="document.title = 1"> in <b>Berlin</b> & {{value}} ${value}.'
    ask(page, QUESTION, context)
    expect(page.locator("#passage")).to_have_text(context)
    assert page.locator("#passage").locator("img, b").count() == 0
    expect(page).to_have_title("QuaLA-MiniLM")


def pdf(text="", trailer=b""):
    """A PDF of one page with a line of text."""
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    content, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(content)
    content += b"xref\n0 5\n0000000000 65535 f \n" + table
    return content + b"trailer\n<< /Size 5 /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (trailer, start)


ENCRYPTED = b"/ID [<00> <00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (
    b"11" * 32,
    b"22" * 32,
)
FILES = {
    "ein Märchen.txt": "I live in Köln.".encode(),
    "latin.txt": "I live in Köln.".encode("latin-1"),
    "notes.MD": b"\xff\xfe" + "# Home\n\nI live in Köln.".encode("utf-16-le"),
    "page.html": b"<title>Oslo</title><script>Lima</script><p>I live<br>in <b>K&ouml;ln</b>.</p>",
    "paper.pdf": pdf("I live in Cologne."),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_with_no_network(page, opened, name):
    opened.context.set_offline(True)
    page.locator("#file").set_input_files([{"name": name, "mimeType": "", "buffer": FILES[name]}])
    expect(page.get_by_role("status")).to_contain_text(f"{name} is read")
    text = page.get_by_label("Text", exact=True).input_value()
    assert " ".join(text.removeprefix("# Home").split()) in ("I live in Köln.", "I live in Cologne.")
    page.get_by_label("Question").fill(QUESTION)
    page.keyboard.press("Enter")
    expect_answer(page, "Cologne" if name == "paper.pdf" else "Köln")
    opened.context.set_offline(False)


def test_a_file_read_meanwhile_drops_the_answer_to_the_text_before(page):
    ask(page, QUESTION, "word " * 20_000 + CONTEXT)
    expect(page.locator("#progress")).to_be_visible()
    page.get_by_role("button", name="Answer").click()  # remembered, and dropped as well
    page.locator("#file").set_input_files([{"name": "a.txt", "mimeType": "", "buffer": b"I live in Lima."}])
    expect(page.get_by_role("status")).to_contain_text("a.txt is read")
    expect(page.locator("#progress")).to_be_hidden()
    expect(page.get_by_role("status")).to_contain_text("a.txt is read")
    expect(page.locator("#result")).to_be_hidden()
    page.keyboard.press("Enter")
    expect_answer(page, "Lima")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a b.docx", b"x", "a b.docx is of a kind that is not read"),
        ("empty.txt", b" \n", "empty.txt holds no text"),
        ("torn.pdf", b"%PDF-1.4\nnothing", "torn.pdf cannot be read: it is no whole PDF"),
        ("secret.pdf", pdf("I live here.", ENCRYPTED), "secret.pdf cannot be read: it is encrypted"),
        ("scan.pdf", pdf(), "scan.pdf holds no text: is it a scan"),
    ],
)
def test_a_file_that_cannot_be_read_gets_a_line(page, name, content, message):
    page.locator("#file").set_input_files([{"name": name, "mimeType": "", "buffer": content}])
    expect(page.locator("#message")).to_contain_text(message)
    ask(page, QUESTION, CONTEXT)
    expect_answer(page, "Berlin")


def test_a_huge_file_is_not_read(page, tmp_path):
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(300_000_000)
    page.locator("#file").set_input_files(tmp_path / "huge.txt")
    expect(page.locator("#message")).to_have_text("huge.txt has 300 MB, at most 20 MB are read")


def test_a_file_can_be_dropped(page):
    transfer = page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["I live in Lima."], "dropped.txt"));
            return transfer;
        }"""
    )
    page.locator("h1").dispatch_event("drop", {"dataTransfer": transfer})
    expect(page.get_by_label("Text", exact=True)).to_have_value("I live in Lima.")


def test_the_keyboard_is_enough(page):
    ask(page, QUESTION, CONTEXT)
    expect_answer(page, "Berlin")
    page.get_by_label("Question").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("What is my name?")
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # it shows
    assert reached == ["file", "context", "preset", "Answer"]
    page.keyboard.press("Space")
    expect_answer(page, "Wolfgang")


def test_nothing_scrolls_sideways_on_a_phone(page):
    page.set_viewport_size({"width": 320, "height": 600})
    word = "https://example.org/" + "x" * 200
    ask(page, "What is the address?", f"The address is {word}, and it is long.")
    expect(page.locator("#passage")).to_contain_text(word)
    edges = "[...document.querySelectorAll('main *')].map((element) => element.getBoundingClientRect().right)"
    assert max(page.evaluate(edges)) <= 320 == page.evaluate("document.documentElement.scrollWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_dark_where_the_machine_is(page, scheme):
    page.emulate_media(color_scheme=scheme)
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert color == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 24, 39)"}[scheme]


def test_nothing_leaves_the_machine(page, opened, address):
    assert len(opened.requests) > 10 and all(url.startswith((address, "data:", "blob:")) for url in opened.requests)
    assert not opened.faults
    with pytest.raises(Exception, match="Content Security Policy|Failed to fetch"):
        page.evaluate("fetch('http://127.0.0.2:9/')")
