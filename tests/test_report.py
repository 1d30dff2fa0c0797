import json
import shutil
import sys

import pytest
from huggingface_hub import ModelCard

from conftest import ROOT
from recipe.report import (
    CARD_ROWS,
    OURS,
    PLOT,
    card_table,
    documents,
    engines_table,
    long_texts_table,
    main,
    measured_figure,
    model_index,
    page_table,
    paper_table,
    peers_table,
    presets_in_full,
    presets_table,
    render,
    unmeasured_figures,
)

FRONT = "---\nlicense: mit\n---\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with a README of one table and one figure, two presets and a results file."""
    presets = {
        "full": {
            "length_config": [1.0, 1.0],
            "lengths_at_384": [384, 384],
            "macs_share": 1.0,
            "macs_at_384": 4.756e9,
            "test": {"f1": 90.0, "em": 85.5},
        },
        "fast": {
            "length_config": [0.5, 0.25],
            "lengths_at_384": [192, 96],
            "macs_share": 0.4321,
            "macs_at_384": 4.756e9,
        },
    }
    (tmp_path / "length_configs.json").write_text(json.dumps({"num_hidden_layers": 2, "presets": presets}))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "speed.json").write_text(json.dumps({"rows": {"ours": {"ms": 3.14159}}, "list": [7, 8]}))
    searched = {"full": {"f1": 80.0, "em": 70.0}, "fast": {"f1": 78.0, "em": 69.0}}
    (tmp_path / "results" / "search.json").write_text(json.dumps({"presets": searched}))
    (tmp_path / "README.md").write_text(
        f"{FRONT}# Title\n\n<!-- report: presets-in-full -->\n<!-- /report -->\n\n"
        "It takes <!-- =speed.rows.ours.ms:.1f -->0<!-- / --> ms.\n"
    )
    return tmp_path


def report(folder, *options):
    """What the command ends with: `None` or why it fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", "--folder", str(folder), *options])
        try:
            main()
        except SystemExit as ended:
            return ended.code


def write_results(folder, **results):
    for name, content in results.items():
        (folder / "results" / f"{name.replace('_', '-')}.json").write_text(json.dumps(content))


def test_the_presets_by_hand(folder):
    write_results(folder, test_full={"f1": 90.0, "em": 85.5}, test_int8_full={"f1": 89.1, "em": 85.0})
    write_results(folder, test_int8_fast={"f1": 81.0, "em": 75.25})
    _, _, full, fast = presets_in_full(folder).splitlines()
    assert full == '| `"full"` | all | 1.00 | 80.00 | 70.00 |  | 90.00 | 85.50 |  | 89.10 | 85.00 | 1.0 % |'
    fast_on_test = "not measured |  |  | 81.00 | 75.25 | 10.0 % |"
    assert fast == f'| `"fast"` | 192, 96 | 0.43 | 78.00 | 69.00 | 2.5 % | {fast_on_test}'
    write_results(folder, test_int8_fast={"f1": 90.01, "em": 85.5})
    assert presets_in_full(folder).splitlines()[-1].endswith("| 90.01 | 85.50 | 0.0 % |")  # not "-0.0 %"


def test_the_card_s_presets_by_hand(folder):
    write_results(folder, test_full={"f1": 90.0, "em": 85.5}, test_int8_full={"f1": 89.1, "em": 85.0})
    _, _, full, fast = presets_table(folder).splitlines()
    assert full == '| `"full"` | 1.00 | 89.10 | 85.00 | 1.0 % |'
    assert fast == '| `"fast"` | 0.43 | not measured |  |  |'


def timed(batch_1, batch_32, **more):
    """A row of the benchmark whose baseline takes 100 ms at either batch size."""
    times = {"batch_1": batch_1, "batch_32": batch_32}
    speed = {f"{key}_ms": ms for key, ms in times.items()} | {f"{key}_speedup": 100 / ms for key, ms in times.items()}
    return {"size_mb": 23.45, "macs_at_384": 4.756e9, **speed, **more}


@pytest.fixture
def measured_folder(folder):
    """`folder` with a benchmark and two rows of the paper."""
    row = {"size_mb": 84.85, "f1": 88.85, "latency_ms": 7.84, "macs": 4.76e9, "speedup": 7.21}
    rows = [{"name": name, **row} for name in ("BERT-base", "QuaLA-MiniLM")]
    pipeline = {"pipeline_ms": 2.0, "pipeline_speedup": 50.0, "usual_ms": 1.5, "usual_speedup": 40.0}
    pipeline |= {"busy_ms": 30.0, "busy_speedup": 10.0}
    at_one = {
        f"{key}_{kind}": 100.0 if kind == "ms" else 1.0
        for key in ("pipeline", "usual", "busy")
        for kind in ("ms", "speedup")
    }
    benchmark = {
        "batch_sizes": [1, 32],
        "usual_tokens": 164,
        "scored": 500,
        "rows": {
            "BERT-base, transformers, fp32": timed(100, 100, **at_one),
            OURS.format("full"): timed(5, 4, **pipeline, f1=78.25, peak_resident_mb=345.6),
            OURS.format("fast"): timed(2.5, 2, **pipeline),
        },
        "paper_rows": {"BERT-base": timed(125, 80), "QuaLA-MiniLM": timed(8, 10)},
    }
    write_results(folder, paper={"rows": rows}, benchmark=benchmark, test_int8_full={"f1": 89.1, "em": 85.0})
    write_results(folder, test_attention_int8_full={"f1": 77.777, "em": 60.0})
    return folder


def test_the_paper_s_rows_by_hand(measured_folder):
    _, _, bert, quala, full, fast = paper_table(measured_folder).splitlines()
    sizes = "23.4 (84.8) | 4.76 (4.76)"
    assert bert == f"| BERT-base | no weights here (88.85) | {sizes} | 80 (8) | 1.2 (7.2)x | 125.0 | 0.8x |"
    assert quala == f"| QuaLA-MiniLM | 77.78 (88.85) | {sizes} | 10 (8) | 10.0 (7.2)x | 8.0 | 12.5x |"
    assert full == '| **this model, `"full"`** | 89.10 | 23.4 | 4.76 | 4 | 25.0x | 5.0 | 20.0x |'
    assert fast == '| **this model, `"fast"`** (192, 96) | not measured | 23.4 | 4.76 | 2 | 50.0x | 2.5 | 40.0x |'


def test_the_card_s_rows_by_hand(measured_folder):
    benchmark = json.loads((measured_folder / "results" / "benchmark.json").read_text())
    of_peers = [name for _, name, _ in CARD_ROWS if name not in benchmark["rows"]]
    benchmark["rows"] |= {name: timed(250, 1000, pipeline_ms=10.0, pipeline_speedup=10.0) for name in of_peers}
    write_results(measured_folder, benchmark=benchmark)
    _, _, bert, peer, _, full, _, _ = card_table(measured_folder).splitlines()
    assert bert == "| BERT-base in transformers |  | 23 MB | 100.0 (1.0x) | 100.0 (1.0x) | 100.0 (1.0x) |"
    assert peer == "| MiniLM in transformers |  | 23 MB | 250 (0.4x) | 1000 (0.1x) | 10.0 (10.0x) |"
    assert full == '| **this model, `"full"`** | 89.1 / 85.0 | 23 MB | 5.0 (20.0x) | 4.0 (25.0x) | 2.0 (50.0x) |'


def test_the_peers_by_hand(measured_folder):
    _, _, bert, full, _ = peers_table(measured_folder).splitlines()
    assert bert == f"| BERT-base, transformers, fp32 | 23.4 | {' | '.join(['100.0 (1.0x)'] * 5)} |  |  |  |"
    times = "5.0 (20.0x) | 4.0 (25.0x) | 1.5 (40.0x) | 30.0 (10.0x) | 2.0 (50.0x)"
    assert full == f"| {OURS.format('full')} | 23.4 | {times} |  | 346 | 78.2 |"


def test_engines_long_texts_and_the_page_by_hand(tmp_path):
    (tmp_path / "results").mkdir()

    def stage(seconds, memory):
        return {"seconds": seconds, "peak_resident_mb": memory}

    write_results(
        tmp_path,
        engines={"presets": {"fast": {"alike": 0.968, "torch_f1": 80.777, "onnxruntime_f1": 80.5}}},
        page={"presets": {"fast": {"ms": 121.6, "native_ms": 34.0, "times_native": 3.58}}},
        long_texts={
            "pages": {"one": 20, "more": 200},
            "questions": {"one": 1, "more": 50},
            "rows": {"ours": {"one": stage(0.76, 590.4), "more": stage(13.88, 648.6)}},
        },
    )
    assert engines_table(tmp_path).splitlines()[2] == '| `"fast"` | 96.8% | 80.78 | 80.50 |'
    assert page_table(tmp_path).splitlines()[2] == '| `"fast"` | 122 | 34 | 3.6 |'
    header, _, row = long_texts_table(tmp_path).splitlines()
    assert header == "| what answers; questions: | 1 on 20 pages | 50 on 200 pages | memory |"
    assert row == "| ours | 0.8 s | 13.9 s | 649 MB |"


def test_a_preset_that_changed_since_the_benchmark_is_not_measured(measured_folder):
    presets = json.loads((measured_folder / "length_configs.json").read_text())
    presets["presets"]["fast"]["macs_at_384"] = 2e9
    (measured_folder / "length_configs.json").write_text(json.dumps(presets))
    *_, full, fast = paper_table(measured_folder).splitlines()
    assert full.endswith("| 4 | 25.0x | 5.0 | 20.0x |")
    assert fast == '| **this model, `"fast"`** (192, 96) | not measured | not measured |  |  |  |  |  |'
    assert OURS.format("full") in peers_table(measured_folder) and "fast" not in peers_table(measured_folder)


def test_report_draws_the_picture_that_the_readme_shows(measured_folder):
    path = measured_folder / "README.md"
    path.write_text(path.read_text() + f"\n![F1 against latency]({PLOT})\n")
    (measured_folder / PLOT).parent.mkdir()
    assert report(measured_folder) is None
    assert (measured_folder / PLOT).read_bytes().startswith(b"\x89PNG")


def test_report_writes_tables_figures_and_the_model_index(folder):
    assert report(folder) is None
    text = (folder / "README.md").read_text()
    assert presets_in_full(folder) in text and "-->3.1<!-- / --> ms" in text
    (shown,) = ModelCard(text).data.to_dict()["model-index"]
    metrics = shown["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == [90.0, 85.5]
    assert report(folder) is None
    assert (folder / "README.md").read_text() == text
    assert report(folder, "--check") is None


@pytest.mark.parametrize("before, after", [("2.5 %", "2.4 %"), ("-->3.1<", "-->3.0<"), ("value: 85.5", "value: 86.5")])
def test_a_number_edited_by_hand_fails_the_check(folder, before, after):
    report(folder)
    path = folder / "README.md"
    edited = path.read_text().replace(before, after)
    assert edited != path.read_text()
    path.write_text(edited)
    why = report(folder, "--check")
    assert after in why and before in why
    assert path.read_text() == edited


@pytest.mark.parametrize(
    "figure",
    ["12 ms", "8.8x", "F1 of 77.1", "EM 60", "loses 1.2 %", "24 MB", "**77.1** F1", "4.7e9 MACs", "60 times"],
)
def test_figures_of_no_file_fail_the_check(folder, figure):
    path = folder / "README.md"
    path.write_text(path.read_text() + f"\nIt is said: {figure}.\n")
    assert len(unmeasured_figures(path.read_text())) == 1
    assert "figures of no results file" in report(folder)


def test_a_marker_at_a_line_s_beginning_fails_the_check(folder):
    path = folder / "README.md"
    path.write_text(path.read_text().replace("It takes <!-- =", "It takes\n<!-- ="))
    assert "a line that begins with a figure's marker" in report(folder)


def test_what_is_no_figure_passes():
    prose = "In 2022, layers of 384 and `12 ms`, version 4.57, 1,487 questions, 16x16 or v1.1.\n```\n5 % 3 ms\n```\n"
    assert unmeasured_figures(FRONT + prose) == []
    assert unmeasured_figures("---\nvalue: 77 %\n---\nText.") == []


def test_what_is_wanted_and_missing_is_named(folder):
    assert measured_figure(folder, "speed", "list.1", ":d") == "8"
    for file, path in (("nothing", "f1"), ("speed", "rows.theirs.ms"), ("speed", "list.9"), ("speed", "rows")):
        with pytest.raises(ValueError, match=f"^{path} of results/{file}.json"):
            measured_figure(folder, file, path, None)
    path = folder / "README.md"
    whole = path.read_text()
    path.write_text(f"{FRONT}<!-- report: speeds -->\n<!-- /report -->\n")
    with pytest.raises(ValueError, match="README.md wants the table 'speeds', expected one of card, presets"):
        render(path, folder)
    path.write_text(whole)
    path.write_text(path.read_text().replace("=speed.rows", "=slow.rows"))
    assert "results/slow.json" in report(folder)


def test_only_test_scores_are_in_the_model_index(folder):
    index = model_index(folder)
    assert [(result.metric_type, result.metric_value) for result in index] == [("f1", 90.0), ("exact_match", 85.5)]
    assert all("'full'" in result.metric_name for result in index)


def test_this_repository_s_documents_are_what_report_writes(tmp_path):
    for path in (*documents(ROOT), ROOT / "length_configs.json", *(ROOT / "results").glob("*.json")):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    assert {path.relative_to(tmp_path).as_posix() for path in documents(tmp_path)} >= {
        "README.md",
        "docs/long-texts.md",
        "recipe/README.md",
        "results/README.md",
    }
    assert report(tmp_path, "--check") is None


def test_the_card_is_short():
    assert (ROOT / "README.md").stat().st_size <= 9000


def test_a_document_beside_the_card_is_checked_too(folder):
    assert report(folder) is None
    (folder / "docs").mkdir()
    (folder / "docs" / "speed.md").write_text("It takes\nabout <!-- =speed.rows.ours.ms:.1f -->0<!-- / --> ms.\n")
    assert "speed.md" in report(folder, "--check")
    assert report(folder) is None and "-->3.1<!-- / --> ms" in (folder / "docs" / "speed.md").read_text()
    (folder / "docs" / "speed.md").write_text("It takes 3 ms.\n")
    assert "speed.md has figures of no results file" in report(folder)


def test_the_front_matter_is_what_the_hub_reads():
    data = ModelCard.load(ROOT / "README.md").data
    assert (data.license, data.language, data.library_name) == ("mit", "en", "transformers")
    assert data.pipeline_tag == "question-answering" and data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.metrics == ["f1", "exact_match"] and data.datasets and data.tags
    assert all(set(example) == {"text", "context", "example_title"} for example in data.widget)
    assert data.eval_results and data.eval_results[0].dataset_type == "rajpurkar/squad"
