"""The page of `make page` in a headless Chromium: `python -m recipe.page_speed --output results/page.json`.

Seconds from opening it to the first answer, each time in a browser that knows nothing of it yet; and what a question to
a text of `TOKENS` tokens takes at each preset, beside the same question put to `reader.Reader` on one thread, which is
what the page has. Page and reader take turns. It needs Chromium and playwright, which `make test` sets up.
"""

import argparse
import functools
import http.server
import shutil
import statistics
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
from playwright.sync_api import sync_playwright
from tqdm import trange

from qualaminilm.files_qualaminilm import file_sha256
from qualaminilm.graph_qualaminilm import GRAPH_FILE
from qualaminilm.reader import Reader
from recipe import ROOT
from recipe.results import describe_run, write_json

TURNS = 9
TOKENS = 384
QUESTION = "Who keeps the lighthouse?"
SENTENCE = "The boats lie still, the nets are dry, and Anselm Brodie keeps the lighthouse. "
MEASURED = r"""async ([question, context, preset]) => {
    const element = (id) => document.getElementById(id);
    element("question").value = question;
    element("context").value = context;
    element("preset").value = preset;
    element("result").hidden = true;
    element("form").requestSubmit();
    while (element("result").hidden) await new Promise((resolve) => setTimeout(resolve, 5));
    return Number(/(\d+) ms/.exec(element("measures").textContent)[1]);
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextmanager
def served(folder):
    """The address at which a folder is served, on this machine alone."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def context_of(reader, tokens):
    """The longest text of whole sentences that is one window of at most so many tokens."""
    context = SENTENCE
    while True:
        longer = context + SENTENCE
        windows = list(reader.reading.windows(QUESTION, reader.reading.tokens(longer)))
        if len(windows) > 1 or len(windows[0]) > tokens:
            return context
        context = longer


def first_answer(browser, address):
    """Seconds from opening the page, in a context of its own, to its first answer; and the page."""
    page = browser.new_context().new_page()
    page.set_default_timeout(120_000)  # ms, on a busy machine
    started = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.wait_for_selector("#result:not([hidden])")
    return time.perf_counter() - started, page


def measure(page_folder, model, turns):
    """What stands in the results file, without the run's own facts."""
    reader = Reader(model, threads=1)
    presets, context = list(reader.length_presets), context_of(reader, TOKENS)
    starts, in_page, native = [], {name: [] for name in presets}, {name: [] for name in presets}
    with served(page_folder) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(3):
            seconds, page = first_answer(browser, address)
            starts.append(seconds)
        for _ in trange(turns, desc="Asking", unit="turn"):
            for name in presets:
                in_page[name].append(page.evaluate(MEASURED, [QUESTION, context, name]))
                started = time.perf_counter()
                reader(QUESTION, context, length_config=name)
                native[name].append(1000 * (time.perf_counter() - started))
        version = browser.version
    rows = {}
    for name in presets:
        ms, native_ms = statistics.median(in_page[name]), statistics.median(native[name])
        of_full = ms / statistics.median(in_page[presets[0]])
        rows[name] = {"ms": ms, "of_full": of_full, "native_ms": native_ms, "times_native": ms / native_ms}
    return {"seconds_to_first_answer": max(starts), "presets": rows, "chromium": version}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--page", type=Path, default=ROOT / "demo" / "browser" / "page", help="folder of `make page`")
    parser.add_argument("--model", default=str(ROOT), help="folder of the model, with its graph (the shipped one)")
    parser.add_argument("--turns", type=int, default=TURNS, help="times that each preset answers (%(default)s)")
    parser.add_argument("--output", default=str(ROOT / "results" / "page.json"), help="results file (%(default)s)")
    arguments = parser.parse_args()
    if not (arguments.page / "index.html").exists():
        parser.error(f"--page is {arguments.page}, where no page is: make page builds it")
    measured = measure(arguments.page, arguments.model, arguments.turns)
    graph = file_sha256(Path(arguments.model) / GRAPH_FILE)
    run = describe_run("recipe.page_speed", onnxruntime)
    write_json(arguments.output, measured | {"tokens": TOKENS, "graph_sha256": graph} | run)
    print(f"First answer after {measured['seconds_to_first_answer']:.2f} s. Wrote {arguments.output}")
    for name, row in measured["presets"].items():
        print(
            f"  {name}: {row['ms']:.0f} ms, {row['of_full']:.2f} of full's, {row['times_native']:.1f} times Reader's "
            f"{row['native_ms']:.1f} on one thread"
        )


if __name__ == "__main__":
    main()
