import json
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from conftest import ROOT
from recipe.report import measured_figure, model_index, presets_table, render, unmeasured_figures

FRONT = "---\nlicense: mit\n---\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with a README of one table and one figure, two presets and a results file."""
    presets = {
        "full": {
            "length_config": [1.0, 1.0],
            "lengths_at_384": [384, 384],
            "macs_share": 1.0,
            "validation": {"f1": 80.0, "em": 70.0},
            "test": {"f1": 90.0, "em": 85.5},
        },
        "fast": {
            "length_config": [0.5, 0.25],
            "lengths_at_384": [192, 96],
            "macs_share": 0.4321,
            "validation": {"f1": 78.0, "em": 69.0},
        },
    }
    (tmp_path / "length_configs.json").write_text(json.dumps({"num_hidden_layers": 2, "presets": presets}))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "speed.json").write_text(json.dumps({"rows": {"ours": {"ms": 3.14159}}, "list": [7, 8]}))
    (tmp_path / "README.md").write_text(
        f"{FRONT}# Title\n\n<!-- report: presets -->\n<!-- /report -->\n\n"
        "It takes <!-- =speed.rows.ours.ms:.1f -->0<!-- / --> ms.\n"
    )
    return tmp_path


def report(folder, *options):
    return subprocess.run(
        [sys.executable, "-m", "recipe.report", "--folder", str(folder), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_table_by_hand(folder):
    _, _, full, fast = presets_table(folder).splitlines()
    assert full == '| `"full"` | all | 1.00 | 80.00 | 70.00 |  | 90.00 | 85.50 |  |'
    assert fast == '| `"fast"` | 192, 96 | 0.43 | 78.00 | 69.00 | 2.5 % | not measured |  |  |'


def test_report_writes_tables_figures_and_the_model_index(folder):
    assert report(folder).returncode == 0
    text = (folder / "README.md").read_text()
    assert presets_table(folder) in text and "-->3.1<!-- / --> ms" in text
    (shown,) = ModelCard(text).data.to_dict()["model-index"]
    metrics = shown["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == [90.0, 85.5]
    assert report(folder).returncode == 0
    assert (folder / "README.md").read_text() == text
    assert report(folder, "--check").returncode == 0


@pytest.mark.parametrize("before, after", [("2.5 %", "2.4 %"), ("-->3.1<", "-->3.0<"), ("value: 85.5", "value: 86.5")])
def test_a_number_edited_by_hand_fails_the_check(folder, before, after):
    report(folder)
    path = folder / "README.md"
    edited = path.read_text().replace(before, after)
    assert edited != path.read_text()
    path.write_text(edited)
    done = report(folder, "--check")
    assert done.returncode == 1 and after in done.stderr and before in done.stderr
    assert path.read_text() == edited


@pytest.mark.parametrize(
    "figure",
    ["12 ms", "8.8x", "F1 of 77.1", "EM 60", "loses 1.2 %", "24 MB", "**77.1** F1", "4.7e9 MACs", "60 times"],
)
def test_figures_of_no_file_fail_the_check(folder, figure):
    path = folder / "README.md"
    path.write_text(path.read_text() + f"\nIt is said: {figure}.\n")
    assert len(unmeasured_figures(path.read_text())) == 1
    done = report(folder)
    assert done.returncode == 1 and "figures of no results file" in done.stderr


def test_what_is_no_figure_passes():
    prose = "In 2022, layers of 384 and `12 ms`, version 4.57, 1,487 questions, 16x16 or v1.1.\n```\n5 % 3 ms\n```\n"
    assert unmeasured_figures(FRONT + prose) == []
    assert unmeasured_figures("---\nvalue: 77 %\n---\nText.") == []


def test_what_is_wanted_and_missing_is_named(folder):
    assert measured_figure(folder, "speed", "list.1", ":d") == "8"
    for file, path in (("nothing", "f1"), ("speed", "rows.theirs.ms"), ("speed", "list.9"), ("speed", "rows")):
        with pytest.raises(ValueError, match=f"README.md wants {path} of results/{file}.json"):
            measured_figure(folder, file, path, None)
    with pytest.raises(ValueError, match="wants the table 'speeds', expected one of presets"):
        render(f"{FRONT}<!-- report: speeds -->\n<!-- /report -->\n", folder)
    path = folder / "README.md"
    path.write_text(path.read_text().replace("=speed.rows", "=slow.rows"))
    done = report(folder)
    assert done.returncode == 1 and "results/slow.json" in done.stderr and "Traceback" not in done.stderr


def test_only_test_scores_are_in_the_model_index(folder):
    index = model_index(folder)
    assert [(result.metric_type, result.metric_value) for result in index] == [("f1", 90.0), ("exact_match", 85.5)]
    assert all("'full'" in result.metric_name for result in index)


def test_this_repository_s_readme_is_what_report_writes(tmp_path):
    for name in ("README.md", "length_configs.json"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    done = report(tmp_path, "--check")
    assert done.returncode == 0, done.stderr


def test_the_front_matter_is_what_the_hub_reads():
    data = ModelCard.load(ROOT / "README.md").data
    assert (data.license, data.language, data.library_name) == ("mit", "en", "transformers")
    assert data.pipeline_tag == "question-answering" and data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.metrics == ["f1", "exact_match"] and data.datasets and data.tags
    assert all(set(example) == {"text", "context", "example_title"} for example in data.widget)
    assert data.eval_results and data.eval_results[0].dataset_type == "squad"
