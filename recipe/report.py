"""Writes what was measured into README.md: `make report`; `make check-report` fails where the two differ.

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

from huggingface_hub import EvalResult, ModelCard

from qualaminilm.configuration_qualaminilm import PRESETS_FILE, write_beside_then_rename
from recipe.evaluate import ROOT

BLOCK = re.compile(r"(<!-- report: (\S+) -->\n)(.*?)(<!-- /report -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- =([\w-]+)\.([\w.-]+?)(:\S+)? -->)(.*?)(<!-- / -->)", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
UNITS = r"F1|EM|ms|MB|MACs|x|times|%"
MEASURED = re.compile(rf"\d[\d.,]*\**\s*(?:{UNITS})(?!\w)|\b(?:F1|EM)\s+(?:of\s+)?\**\d[\d.]*")


def read_presets(folder):
    return json.loads((folder / PRESETS_FILE).read_text(encoding="utf-8"))["presets"]


def presets_table(folder):
    """The presets of `length_configs.json` with their scores."""
    presets = read_presets(folder)
    lines = [
        "| `length_config` | tokens kept, of 384 | MACs share | validation F1 | EM | lost | test F1 | EM | lost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, preset in presets.items():
        lengths = ", ".join(map(str, preset["lengths_at_384"])) if name != "full" else "all"
        cells = [f'`"{name}"`', lengths, f"{preset['macs_share']:.2f}"]
        for split in ("validation", "test"):
            scores, full = preset.get(split), presets["full"].get(split)
            if scores is None:
                cells += ["not measured", "", ""]
                continue
            lost = f"{100 * (1 - scores['f1'] / full['f1']):.1f} %" if full and name != "full" else ""
            cells += [f"{scores['f1']:.2f}", f"{scores['em']:.2f}", lost]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


TABLES = {"presets": presets_table}


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
        raise ValueError(f"README.md wants {path} of results/{file}.json: {type(error).__name__}: {error}") from error


def model_index(folder):
    """What the Hub shows of the presets' test scores, for the front matter."""
    return [
        EvalResult(
            task_type="question-answering",
            task_name="Question answering",
            dataset_type="squad",
            dataset_name="SQuAD v1.1",
            dataset_split="validation",
            metric_type=metric,
            metric_name=f"{shown} at length_config {name!r}",
            metric_value=preset["test"][key],
        )
        for name, preset in read_presets(folder).items()
        if "test" in preset
        for metric, shown, key in (("f1", "F1", "f1"), ("exact_match", "Exact match", "em"))
    ]


def render(text, folder=ROOT):
    """`text`, a README, with every measured figure as the files in `folder` have it.

    Raises:
        ValueError: it wants a table or a figure that there is not.
    """

    def table(found):
        if found[2] not in TABLES:
            raise ValueError(f"README.md wants the table {found[2]!r}, expected one of {', '.join(TABLES)}")
        return found[1] + TABLES[found[2]](folder) + found[4]

    def figure(found):
        return found[1] + measured_figure(folder, found[2], found[3], found[4]) + found[6]

    card = ModelCard(FIGURE.sub(figure, BLOCK.sub(table, text)), ignore_metadata_errors=True)
    card.data.model_name = "QuaLA-MiniLM"
    card.data.eval_results = model_index(folder)
    return str(card)


def unmeasured_figures(text):
    """Figures with a unit of what is measured that stand outside tables, markers and code."""
    _, _, prose = text.removeprefix("---").partition("\n---")
    for pattern in (BLOCK, FIGURE, CODE):
        prose = pattern.sub("", prose)
    return [found[0] for found in MEASURED.finditer(prose)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where README.md would change")
    parser.add_argument("--folder", type=Path, default=ROOT, help="folder of README.md and results/ (this one)")
    arguments = parser.parse_args()
    readme = arguments.folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    try:
        rendered = render(text, arguments.folder)
    except ValueError as error:
        sys.exit(str(error))
    figures = unmeasured_figures(rendered)
    if figures:
        sys.exit(f"README.md has figures of no results file, outside all markers: {', '.join(map(repr, figures))}")
    if not arguments.check:
        write_beside_then_rename(readme, rendered)
        print(f"Wrote {readme}")
    elif rendered != text:
        lines = difflib.unified_diff(text.splitlines(), rendered.splitlines(), "README.md", "make report", lineterm="")
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
