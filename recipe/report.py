"""Writes what was measured into README.md and the other documents: `make report`; `make check-report` fails where they
differ.

Between `<!-- report: NAME -->` and `<!-- /report -->` stands a table that a function here makes. A single figure
stands between `<!-- =FILE.KEY -->` and `<!-- / -->`, FILE being one of results/, KEY a path in it, and `:.1f` after it
how many decimals (2, if not said). Everywhere else a number with a unit of what is measured is an error.
"""

import argparse
import difflib
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from huggingface_hub import EvalResult, ModelCard

from qualaminilm.configuration_qualaminilm import PRESETS_FILE
from qualaminilm.files_qualaminilm import write_whole
from recipe import ROOT
from recipe.results import save_figure

BLOCK = re.compile(r"(<!-- report: (\S+) -->\n)(.*?)(<!-- /report -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- =([\w-]+)\.([\w.-]+?)(:\S+)? -->)(.*?)(<!-- / -->)", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
UNITS = r"F1|EM|ms|MB|MACs|x|times|%"
PLOT = "assets/f1-latency.png"
CARD = "README.md"
MEASURED = re.compile(rf"\d[\d.,]*\**\s*(?:{UNITS})(?!\w)|\b(?:F1|EM)\s+(?:of\s+)?\**\d[\d.]*")


def read_presets(folder):
    return json.loads((folder / PRESETS_FILE).read_text(encoding="utf-8"))["presets"]


def read_results(folder, file):
    """Content of `results/FILE.json`, `None` where there is none."""
    path = folder / "results" / f"{file}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def lost(scores, full):
    """F1 lost against `full`, the scores of the fp32 model that drops nothing; empty for that one itself."""
    if full is None or scores == full:
        return ""
    return f"{100 * (1 - scores['f1'] / full['f1']):z.1f} %"


def documents(folder):
    """The repository's documents, from README.md on."""
    return [folder / CARD, *sorted(folder.glob("[!.]*/README.md")), *sorted(folder.glob("docs/*.md"))]


def f1(scores):
    """F1 of `scores`, with its standard error where that was measured."""
    error = scores.get("f1_standard_error")
    return f"{scores['f1']:.2f}" + (f" ± {error:.2f}" if error is not None else "")


def card_table(folder):
    """The model in two of its presets beside what people run otherwise: F1, size and speed."""
    benchmark, presets, rows = read_results(folder, "benchmark"), read_presets(folder), []
    measured = timed(benchmark, presets)
    for shown, name, preset in CARD_ROWS:
        scores, row = read_results(folder, f"test-int8-{preset}") if preset else None, measured.get(name)
        cells = [shown, f"{scores['f1']:.1f} / {scores['em']:.1f}" if scores else ""]
        if row is None:
            rows.append([*cells, "not measured", "", "", ""])
            continue
        cells.append(f"{row['size_mb']:.0f} MB")
        for key in ("batch_1", "batch_32", "pipeline"):
            cells.append(
                f"{row[key + '_ms']:{'.0f' if row[key + '_ms'] > 100 else '.1f'}} ({row[key + '_speedup']:.1f}x)"
            )
        rows.append(cells)
    header = ["", "F1 / EM", "size", "ms (speed-up), one row", "32 rows", "a usual question"]
    return markdown_table(header, rows)


def presets_table(folder):
    """The presets as they are shipped: what they cost, and what they lose on the test set."""
    full, rows = read_results(folder, "test-full"), []
    for name, preset in read_presets(folder).items():
        scores = read_results(folder, f"test-int8-{name}")
        figures = [f1(scores), f"{scores['em']:.2f}", lost(scores, full)] if scores else ["not measured", "", ""]
        rows.append([f'`"{name}"`', f"{preset['macs_share']:.2f}", *figures])
    return markdown_table(["`length_config`", "share of the work", "F1", "EM", "F1 lost"], rows)


def presets_in_full(folder):
    """The presets: the search's validation scores, and test scores in fp32 and int8."""
    presets, searched = read_presets(folder), read_results(folder, "search")["presets"]
    full_on_test = read_results(folder, "test-full")
    rows = []
    for name, preset in presets.items():
        lengths = ", ".join(map(str, preset["lengths_at_384"])) if name != "full" else "all"
        cells = [f'`"{name}"`', lengths, f"{preset['macs_share']:.2f}"]
        for scores, full in (
            (searched.get(name), searched["full"]),
            (read_results(folder, f"test-{name}"), full_on_test),
            (read_results(folder, f"test-int8-{name}"), full_on_test),
        ):
            if scores is None:
                cells += ["not measured", "", ""]
            else:
                cells += [f1(scores), f"{scores['em']:.2f}", lost(scores, full)]
        rows.append(cells)
    header = ["`length_config`", "tokens kept, of 384", "MACs share", "validation F1", "EM", "lost"]
    return markdown_table([*header, "test F1, fp32", "EM", "lost", "test F1, int8", "EM", "lost"], rows)


# The benchmark's rows of a preset, as README.md's installation runs it and as it runs where ONNX Runtime is there too.
OURS, OURS_IN_GRAPH = "ours, torch, int8, {}", "ours, ONNX Runtime, int8, {}"
# What is shown of the benchmark in the card: as what, which row of it, and which preset's F1 it has.
CARD_ROWS = (
    ("BERT-base in transformers", "BERT-base, transformers, fp32", None),
    ("MiniLM in transformers", "MiniLM, transformers, fp32", None),
    ("MiniLM in OpenVINO, int8", "MiniLM, OpenVINO, int8", None),
    ('**this model, `"full"`**', OURS.format("full"), "full"),
    ('**this model, `"fast"`**', OURS.format("fast"), "fast"),
    ('**`"fast"` in ONNX Runtime**', OURS_IN_GRAPH.format("fast"), "fast"),
)

# Which results file has the F1 of a row of the paper's table; of the other models there are no weights here.
PAPER_F1 = {
    "MiniLM": "test-minilm",
    "MiniLM, int8": "test-minilm-int8",
    "LA-MiniLM": "test-attention-full",
    "LA-MiniLM (269, 253, 252, 202, 104, 34)": "test-attention-269",
    "QuaLA-MiniLM": "test-attention-int8-full",
    "QuaLA-MiniLM (315, 251, 242, 159, 142, 33)": "test-attention-int8-315",
}


def timed(benchmark, presets):
    """The benchmark's rows, but for those of presets that had other length configs when it ran."""

    def is_current(name, row):
        preset = presets.get(name.rpartition(", ")[2])
        return preset is None or preset["macs_at_384"] == row["macs_at_384"]

    return {name: row for name, row in benchmark["rows"].items() if is_current(name, row)}


def paper_table(folder):
    """The paper's table, each figure as measured here with the paper's in brackets, and the presets below it."""
    measured, rows = read_results(folder, "benchmark"), []
    for row in read_results(folder, "paper")["rows"]:
        name = row["name"]
        scores = read_results(folder, PAPER_F1[name]) if name in PAPER_F1 else None
        f1 = f"{scores['f1']:.2f}" if scores else "not measured" if name in PAPER_F1 else "no weights here"
        rows.append([name, f1 + f" ({row['f1']:.2f})", *speed_cells(measured["paper_rows"][name], row)])
    presets = read_presets(folder)
    ours = timed(measured, presets)
    for name, preset in presets.items():
        scores = read_results(folder, f"test-int8-{name}")
        lengths = f" ({', '.join(map(str, preset['lengths_at_384']))})" if name != "full" else ""
        f1 = f"{scores['f1']:.2f}" if scores else "not measured"
        row = ours.get(OURS.format(name))
        speed = speed_cells(row) if row else ["not measured", *[""] * 5]
        rows.append([f'**this model, `"{name}"`**{lengths}', f1, *speed])
    header = ["model (tokens a layer, of 384)", "F1", "MB", "10^9 MACs", "ms, batch 32", "speed-up, batch 32"]
    return markdown_table([*header, "ms, batch 1", "speed-up, batch 1"], rows)


def speed_cells(measured, paper=None):
    """Size, MACs, milliseconds and speed-ups of one row of the benchmark, the paper's in brackets."""

    def cell(value, digits, key):
        return f"{value:.{digits}f}" + (f" ({paper[key]:.{digits}f})" if paper else "")

    return [
        cell(measured["size_mb"], 1, "size_mb"),
        f"{measured['macs_at_384'] / 1e9:.2f}" + (f" ({paper['macs'] / 1e9:.2f})" if paper else ""),
        cell(measured["batch_32_ms"], 0, "latency_ms"),
        cell(measured["batch_32_speedup"], 1, "speedup") + "x",
        f"{measured['batch_1_ms']:.1f}",
        f"{measured['batch_1_speedup']:.1f}x",
    ]


def peers_table(folder):
    """Speed and size of this model's presets and of what else runs the same weights."""
    benchmark, rows = read_results(folder, "benchmark"), []
    batches = benchmark["batch_sizes"]
    for name, measured in timed(benchmark, read_presets(folder)).items():
        cells = [name, f"{measured['size_mb']:.1f}"]
        for key in [*(f"batch_{batch}" for batch in batches), "usual", "busy", "pipeline"]:
            cells.append(f"{measured[key + '_ms']:.1f} ({measured[key + '_speedup']:.1f}x)")
        facts = ("seconds_to_first_answer", ".2f"), ("peak_resident_mb", ".0f"), ("f1", ".1f")
        for key, form in facts:
            cells.append(format(measured[key], form) if key in measured else "")
        rows.append(cells)
    header = ["what runs (speed-up)", "MB", *(f"ms, batch {batch}" for batch in batches)]
    header += [
        f"ms, batch 1 of {benchmark['usual_tokens']} tokens",
        "ms, batch 1, cores busy",
        "ms a question, pipeline",
    ]
    return markdown_table([*header, "s to first answer", "MB resident", f"F1, {benchmark['scored']} questions"], rows)


def table_by_preset(presets, columns):
    """One row a preset: `columns` maps a heading to the key of a preset's figure and its form."""
    rows = [
        [f'`"{name}"`', *(format(measured[key], form) for key, form in columns.values())]
        for name, measured in presets.items()
    ]
    return markdown_table(["`length_config`", *columns], rows)


def engines_table(folder):
    """How alike torch and ONNX Runtime answer, at each preset."""
    columns = {
        "same answer": ("alike", ".1%"),
        "F1, torch": ("torch_f1", ".2f"),
        "F1, ONNX Runtime": ("onnxruntime_f1", ".2f"),
    }
    return table_by_preset(read_results(folder, "engines")["presets"], columns)


def long_texts_table(folder):
    """What questions put to many pages take, beside transformers 4.57."""
    found = read_results(folder, "long-texts")
    stages = found["pages"]
    rows = [
        [
            name,
            *(f"{row[stage]['seconds']:.1f} s" for stage in stages),
            f"{max(row[stage]['peak_resident_mb'] for stage in stages):.0f} MB",
        ]
        for name, row in found["rows"].items()
    ]
    asked = [f"{found['questions'][stage]} on {pages} pages" for stage, pages in stages.items()]
    return markdown_table(["what answers; questions:", *asked, "memory"], rows)


def page_table(folder):
    """What a question takes in the page of `make page`."""
    columns = {
        "ms in the page": ("ms", ".0f"),
        "ms in `reader.py`, one thread": ("native_ms", ".0f"),
        "ratio": ("times_native", ".1f"),
    }
    return table_by_preset(read_results(folder, "page")["presets"], columns)


TABLES = {
    "card": card_table,
    "presets": presets_table,
    "presets-in-full": presets_in_full,
    "paper": paper_table,
    "peers": peers_table,
    "engines": engines_table,
    "long-texts": long_texts_table,
    "page": page_table,
}


def measured_figure(folder, file, path, decimals):
    """The figure at `path`, keys between dots, of `results/FILE.json`.

    Raises:
        ValueError: there is none.
    """
    try:
        value = json.loads((folder / "results" / f"{file}.json").read_text(encoding="utf-8"))
        for key in path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        return format(value, decimals.removeprefix(":") if decimals else ".2f")
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} of results/{file}.json: {type(error).__name__}: {error}") from error


def model_index(folder):
    """What the Hub shows of the test scores at full and at fast, for the front matter."""
    return [
        EvalResult(
            task_type="question-answering",
            task_name="Question answering",
            dataset_type="rajpurkar/squad",
            dataset_name="SQuAD v1.1",
            dataset_split="validation",
            metric_type=metric,
            metric_name=f"{shown} at length_config {name!r}",
            metric_value=preset["test"][key],
        )
        for name, preset in read_presets(folder).items()
        if "test" in preset and name in ("full", "fast")
        for metric, shown, key in (("f1", "F1", "f1"), ("exact_match", "Exact match", "em"))
    ]


def draw_f1_against_latency(folder, path):
    """Plots test F1 against milliseconds a row of 384 tokens in the largest batch: presets, and where peers stand."""
    presets, benchmark = read_presets(folder), read_results(folder, "benchmark")
    batch, rows = benchmark["batch_sizes"][-1], timed(benchmark, presets)
    milliseconds = {name: row[f"batch_{batch}_ms"] / batch for name, row in rows.items()}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    scored = [(name, read_results(folder, f"test-int8-{name}")) for name in presets]
    points = [
        (milliseconds[OURS.format(name)], scores["f1"], name)
        for name, scores in scored
        if scores and OURS.format(name) in milliseconds
    ]
    axes.plot(*zip(*((x, y) for x, y, _ in points)), "o-", color="tab:blue", label="this model, int8, its presets")
    for i, (x, y, name) in enumerate(points):  # neighbours may stand close: their names go to either side
        place = {"xytext": (-8, 0), "ha": "right"} if i % 2 else {"xytext": (8, 0)}
        axes.annotate(name, (x, y), textcoords="offset points", va="center", color="tab:blue", **place)
    fastest = points[-1][0]
    peers = [name for name in milliseconds if name.startswith(("BERT-base", "MiniLM"))]
    for i, name in enumerate(peers, start=1):  # the presets have matplotlib's colour 0
        x = milliseconds[name]
        label = f"{name}: {x:.1f} ms, {x / fastest:.1f} times the fastest preset"
        axes.axvline(x, color=f"C{i}", linestyle="--", label=label)
    x_label = f"milliseconds a row of 384 tokens, in batches of {batch}"
    axes.set(xscale="log", xlabel=x_label, ylabel="F1 on SQuAD v1.1's development set")
    axes.set_xticks([10, 20, 50, 100, 200, 500, 1000], minor=False)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlim(fastest / 1.3, max(milliseconds.values()) * 1.3)
    axes.legend(loc="lower right", fontsize=8, title="lines: latency of peers, F1 not measured", title_fontsize=8)
    save_figure(figure, path, dpi=150)
    plt.close(figure)


def render(document, folder):
    """The text of a document, with every measured figure as the files in `folder` have it.

    Raises:
        ValueError: it wants a table or a figure that there is not.
    """

    def table(found):
        if found[2] not in TABLES:
            raise ValueError(f"{document} wants the table {found[2]!r}, expected one of {', '.join(TABLES)}")
        return found[1] + TABLES[found[2]](folder) + found[4]

    def figure(found):
        try:
            return found[1] + measured_figure(folder, found[2], found[3], found[4]) + found[6]
        except ValueError as error:
            raise ValueError(f"{document} wants {error}") from error

    text = FIGURE.sub(figure, BLOCK.sub(table, document.read_text(encoding="utf-8")))
    if document != folder / CARD:
        return text
    card = ModelCard(text, ignore_metadata_errors=True)
    card.data.model_name = "QuaLA-MiniLM"
    card.data.eval_results = model_index(folder)
    return str(card)


def unmeasured_figures(text):
    """Figures with a unit of what is measured that stand outside tables, markers and code."""
    prose = text.partition("\n---\n")[2] if text.startswith("---\n") else text
    for pattern in (BLOCK, FIGURE, CODE):
        prose = pattern.sub("", prose)
    return [found[0] for found in MEASURED.finditer(prose)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document would change")
    parser.add_argument("--folder", type=Path, default=ROOT, help="of the repository (this one)")
    arguments = parser.parse_args()
    folder = arguments.folder
    try:
        rendered = {document: render(document, folder) for document in documents(folder)}
    except ValueError as error:
        sys.exit(str(error))
    for document, text in rendered.items():
        if re.search("^<!-- =", text, re.MULTILINE):
            sys.exit(
                f"{document} has a line that begins with a figure's marker: Markdown would end the paragraph there"
            )
        if figures := unmeasured_figures(text):
            sys.exit(f"{document} has figures of no results file, outside all markers: {', '.join(map(repr, figures))}")
    stale = {document: text for document, text in rendered.items() if text != document.read_text(encoding="utf-8")}
    if arguments.check:
        before = {document: document.read_text(encoding="utf-8").splitlines() for document in stale}
        changes = (
            difflib.unified_diff(before[document], text.splitlines(), str(document), "make report", lineterm="")
            for document, text in stale.items()
        )
        sys.exit("\n".join(line for change in changes for line in change) or None)
    for document, text in stale.items():
        write_whole(document, text.encode())
        print(f"Wrote {document}")
    if any(PLOT.rpartition("/")[2] in text for text in rendered.values()):
        draw_f1_against_latency(folder, folder / PLOT)
        print(f"Wrote {folder / PLOT}")


if __name__ == "__main__":
    main()
