import csv
import importlib.util
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT, once, run, tiny_folder
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from recipe import predict as predict_module
from recipe import predict_rows
from recipe.data import load_tokenizer
from recipe.predict import finished_parts, predict
from recipe.predict_rows import Answered, Answerer, Job, answer_part, cut_into_parts, open_input
from tests.kill_predict import check_rows, children, kill_and_resume, write_rows

COLUMNS = ("id", "question", "context")
WORDS = "Ann Bob Cleo lives lived in near Berlin Paris Lima Oslo , . the naïve 東京 🙂 old".split()
# Values that a JSON row may have where a text is expected, the texts among them.
JSON = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.lists(st.text(max_size=2), max_size=2)
)
TEXT = st.text(max_size=12)
FOLDER = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(predict_rows, "MIN_PART_BYTES", 300)


@pytest.fixture
def in_this_process(monkeypatch):
    """Parts are answered here, last part first, rather than by workers."""
    monkeypatch.setattr(
        predict_module,
        "answered_by_processes",
        lambda job, parts, workers: (answer_part(job, part) for part in reversed(parts)),
    )


def a_job(path, output_format=".jsonl", model="none", **kwargs):
    fields = {"columns": COLUMNS, "length_config": "full", "batch_size": 4} | kwargs
    return Job(input=str(path), output_format=output_format, model=str(model), **fields)


def parts_of(path):
    return cut_into_parts(open_input(path, COLUMNS), path.stat().st_size)


def read_in_parts(path):
    """The rows of a file, exceptions as their class, read part by part, and how many parts there were."""
    reader = open_input(path, COLUMNS)
    rows = []
    for part in parts_of(path):
        read = [row if isinstance(row, tuple) else type(row) for row in reader.read(part)]
        assert len(read) == part.rows and len(rows) == part.first
        rows += read
    return rows, len(parts_of(path))


def write_table(path, rows, ids=None):
    """Rows as dicts of COLUMNS in a file of the format of its ending."""
    if path.suffix == ".parquet":
        schema = pa.schema({"id": ids or pa.string(), "question": pa.string(), "context": pa.string()})
        pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=14)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_output(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_bad(output):
    return read_output(output.with_name(output.name + ".bad.jsonl"))


def questions(count, seed=0):
    draw = random.Random(seed)
    return [
        {
            "id": f"{i:03d}",
            "question": " ".join(draw.choices(WORDS, k=draw.randint(1, 5))) + "?",
            "context": " ".join(draw.choices(WORDS, k=draw.randint(3, 20))),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def answered_alone(tiny):
    """Rows, and what the pipeline answers each alone."""
    rows, qa = questions(60), Answerer(a_job("none.jsonl", model=tiny)).pipeline
    return rows, [qa(question=row["question"], context=row["context"]) for row in rows]


@pytest.mark.parametrize("output_format", [".jsonl", ".parquet"])
@pytest.mark.parametrize("input_format", [".jsonl", ".csv", ".parquet"])
def test_answers_are_the_pipelines_in_the_order_of_the_input(
    tmp_path, tiny, answered_alone, small_parts, in_this_process, input_format, output_format
):
    rows, expected = answered_alone
    path = write_table(tmp_path / f"in{input_format}", rows)
    output = tmp_path / f"new/out{output_format}"
    counts = predict(a_job(path, output_format, tiny), output)
    assert counts == {"rows": 60, "answers": 60, "bad": 0}
    answers = read_output(output)
    assert [answer["id"] for answer in answers] == [row["id"] for row in rows]
    for row, answer, alone in zip(rows, answers, expected):
        assert answer == {"id": row["id"], **alone, "score": pytest.approx(alone["score"], abs=1e-5)}
    assert list(answers[0]) == ["id", "answer", "start", "end", "score"]
    assert os.listdir(output.parent) == [output.name]
    assert len(parts_of(path)) > 3


def test_batches_hold_rows_of_like_length(tmp_path, tiny, monkeypatch):
    path = write_table(tmp_path / "in.jsonl", questions(64))
    answerer = Answerer(a_job(path, model=tiny, batch_size=8))
    seen = []
    monkeypatch.setattr(answerer, "answers", lambda batch: seen.append(batch) or [ValueError("no")] * len(batch))
    (part,) = parts_of(path)
    answerer(part)
    lengths = [[len(row[2]) + len(row[3]) for row in batch] for batch in seen]
    assert [len(batch) for batch in lengths] == [8] * 8
    assert all(max(shorter) <= min(longer) for shorter, longer in itertools.pairwise(lengths))


@pytest.mark.parametrize(
    ("ids", "values", "in_json"),
    [
        (pa.int64(), [3, None, -1], [3, None, -1]),
        (pa.date32(), None, ["1970-01-02", "1970-01-03", "1970-01-04"]),
    ],
)
def test_ids_of_parquet_keep_their_type(tmp_path, tiny, in_this_process, ids, values, in_json):
    values = values or pa.array([1, 2, 3], ids).to_pylist()
    rows = [row | {"id": value} for row, value in zip(questions(3), values)]
    path = write_table(tmp_path / "in.parquet", rows, ids)
    predict(a_job(path, ".parquet", tiny), tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("id").type == ids and table["id"].to_pylist() == values
    predict(a_job(path, ".jsonl", tiny), tmp_path / "out.jsonl")
    assert [answer["id"] for answer in read_output(tmp_path / "out.jsonl")] == in_json


def test_ids_of_json_pass_as_they_are_and_may_repeat(tmp_path, tiny, in_this_process):
    ids = [7, "7", 7, None, ["a", 1], 1.5, "é"]
    path = write_table(tmp_path / "in.jsonl", [row | {"id": each} for row, each in zip(questions(7), ids)])
    predict(a_job(path, ".jsonl", tiny), tmp_path / "out.jsonl")
    assert [answer["id"] for answer in read_output(tmp_path / "out.jsonl")] == ids
    predict(a_job(path, ".parquet", tiny), tmp_path / "out.parquet")
    as_text = ["7", "7", "7", None, '["a", 1]', "1.5", "é"]
    assert [answer["id"] for answer in read_output(tmp_path / "out.parquet")] == as_text


@FOLDER
@given(st.lists(st.fixed_dictionaries({name: JSON | TEXT for name in COLUMNS}) | st.binary(max_size=8), max_size=12))
def test_every_row_ends_once_whatever_it_holds(tmp_path_factory, tiny, rows):
    """Answered if the pipeline answers it alone, refused if it raises or the line is no row."""
    path = tmp_path_factory.mktemp("rows") / "in.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    lines = [line for line in b"\n".join(lines).split(b"\n") if line.strip()]
    path.write_bytes(b"\n".join(lines))
    answerer = Answerer(a_job(path, model=tiny))
    answers, bad = [], []
    for part in parts_of(path):
        answered = answerer(part)
        answers += map(json.loads, answered.answers.splitlines())
        bad += map(json.loads, answered.bad.splitlines())
    expected_answers, expected_bad = [], []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            texts = {name: row[name] for name in ("question", "context")}
            assert all(isinstance(text, str) for text in texts.values())
            str(row["id"]).encode()
            alone = answerer.pipeline(**texts)
            expected_answers.append({"id": row["id"], **alone, "score": pytest.approx(alone["score"], abs=1e-5)})
        except (ValueError, TypeError, AssertionError):
            expected_bad.append(number)
    assert answers == expected_answers
    assert [row["row"] for row in bad] == expected_bad
    assert all(row["reason"] for row in bad)


def test_bad_rows_say_why_and_leave_their_batch_alone(tmp_path, tiny, in_this_process):
    good = questions(20)
    lines = [json.dumps(row) for row in good]
    bad = {
        3: ('{"id": 1, "question": "Where?", "context": ""}', 1, "`context` cannot be empty"),
        5: ('{"id": "two", "question": null, "context": "x"}', "two", "`question` is None, expected text"),
        6: ('{"id": 3, "question": "Where?", "context": 5}', 3, "`context` is 5, expected text"),
        9: ('{"id": 4, "question": ["Where?"], "context": ["x"]}', 4, "`question` is ['Where?'], expected text"),
        11: ('{"id": 5, "question": "Where?"}', 5, "`context` is None, expected text"),
        12: ('{"id": 6, "question": "Where?", "context": "  "}', 6, "`context` holds no text: '  '"),
        14: ('{"id": 7, "question": "Where?", "context"', None, "not JSON: Expecting ':' delimiter"),
        15: ("[1, 2]", None, "[1, 2] is no JSON object"),
        17: ('{"id": 8, "question": "\\ud800", "context": "x"}', 8, "`question` is not valid Unicode text"),
        18: ('{"id": "\\udc80", "question": "Where?", "context": "x"}', "\udc80", "`id` is not valid Unicode text"),
        20: ("[" * 100000, None, "not JSON: "),
    }
    for number, (line, *_) in bad.items():
        lines.insert(number, line)
    lines.insert(2, "  ")  # no row
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    output = tmp_path / "out.jsonl"
    counts = predict(a_job(tmp_path / "in.jsonl", model=tiny), output)
    assert counts == {"rows": 31, "answers": 20, "bad": 11}
    assert [answer["id"] for answer in read_output(output)] == [row["id"] for row in good]
    found = read_bad(output)
    assert [(row["row"], row["id"]) for row in found] == [(number, each[1]) for number, each in bad.items()]
    for row in found:
        assert row["reason"].startswith(bad[row["row"]][2])


def test_a_row_that_breaks_the_model_is_refused_with_the_error(tmp_path, tiny, in_this_process, monkeypatch):
    rows = questions(10)
    ids = load_tokenizer(ROOT)(rows[4]["context"], add_special_tokens=False)["input_ids"]
    forward = QuestionAnsweringPipeline._forward

    def breaking(self, windows, **kwargs):
        if any(window.tokens.ids.tolist() == ids for window in windows):
            raise IndexError("out of range")
        return forward(self, windows, **kwargs)

    monkeypatch.setattr(QuestionAnsweringPipeline, "_forward", breaking)
    output = tmp_path / "out.jsonl"
    predict(a_job(write_table(tmp_path / "in.jsonl", rows), model=tiny), output)
    assert [answer["id"] for answer in read_output(output)] == [row["id"] for row in rows if row is not rows[4]]
    assert read_bad(output) == [{"row": 4, "id": "004", "reason": "IndexError: out of range"}]


@once
@FOLDER
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=20), st.integers(1, 100))
@pytest.mark.parametrize("ending", predict_rows.INPUTS)
def test_parts_hold_each_row_once_wherever_they_are_cut(tmp_path_factory, ending, rows, part_bytes):
    path = tmp_path_factory.mktemp("rows") / f"in{ending}"
    try:
        write_table(path, [dict(zip(COLUMNS, row)) for row in rows])
    except UnicodeEncodeError:
        return  # CSV and Parquet hold no lone surrogates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_rows, "MIN_PART_BYTES", part_bytes)
        patch.setattr(predict_rows, "MAX_PART_ROWS", 7)
        read, parts = read_in_parts(path)
    if ending == ".csv":  # the standard library's reading of the whole file
        with path.open(newline="", encoding="utf-8") as file:
            rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert read == rows
    assert parts >= len(rows) / 7


def test_csv_rows_that_cannot_be_read_are_refused_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(predict_rows, "MAX_CSV_FIELD", 1000)
    (tmp_path / "in.csv").write_bytes(
        b"\xef\xbb\xbfcontext,id,other,question\r\n"
        b'"I, or ""we"",\nlive.",1,,Who?\r\n'
        b"too,few\r\n"
        b"\r\n"
        b"caf\xe9,2,,Where?\r\n"
        b"one,3,,two,many\r\n" + b'"never closed,4,,Where?\r\n' + b"x" * 2000 + b"\r\n"
        b"last,5,,Where?"
    )
    rows, _ = read_in_parts(tmp_path / "in.csv")
    assert rows == [
        ("1", "Who?", 'I, or "we",\nlive.'),
        ValueError,
        ("2", "Where?", "caf\udce9"),
        ValueError,
        csv.Error,
        ("5", "Where?", "last"),
    ]


def test_parquet_text_that_is_not_utf_8_spoils_no_other_row(tmp_path):
    texts = pa.array([b"good", b"caf\xe9", None, b"more"])
    invalid = pa.Array.from_buffers(pa.string(), 4, texts.buffers())
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "question": ["q"] * 4, "context": invalid}), tmp_path / "in.parquet")
    rows, _ = read_in_parts(tmp_path / "in.parquet")
    assert rows == [(1, "q", "good"), (2, "q", "caf\udce9"), (3, "q", None), (4, "q", "more")]


class Killed(BaseException):
    pass


def without_a_model(monkeypatch, begun):
    """Parts are answered at once, by the rows' contexts; `begun` lists their numbers."""

    def answer(job, parts, workers):
        reader = open_input(job.input, job.columns)
        for part in parts:
            begun.append(part.number)
            read = [row for row in reader.read(part) if row[1]]
            rows = [{"id": i, "answer": c, "start": 0, "end": len(c), "score": 1.0} for i, _, c in read]
            bad = [json.dumps({"id": i}) + "\n" for i, q, _ in reader.read(part) if not q]
            if job.output_format == ".jsonl":
                answers = "".join(json.dumps(row) + "\n" for row in rows).encode()
            else:
                buffer = pa.BufferOutputStream()
                pq.write_table(pa.Table.from_pylist(rows, predict_module.answer_schema(pa.string())), buffer)
                answers = buffer.getvalue().to_pybytes()
            yield Answered(part.number, answers, "".join(bad).encode())

    monkeypatch.setattr(predict_module, "answered_by_processes", answer)


@once
@pytest.mark.parametrize("output_format", [".jsonl", ".parquet"])
def test_killed_at_any_step_a_job_goes_on(tmp_path, small_parts, monkeypatch, output_format):
    """Before and after each change of a name in the file system, one after the other."""
    rows = [row | ({"question": ""} if i % 5 == 2 else {}) for i, row in enumerate(questions(12))]
    path = write_table(tmp_path / "in.jsonl", rows)
    parts = len(parts_of(path))
    assert parts > 3
    (tmp_path / "model").mkdir()
    job, begun = a_job(path, output_format, tmp_path / "model"), []
    without_a_model(monkeypatch, begun)
    steps = None

    def dying(function):
        def step(*args, **kwargs):
            nonlocal steps
            for when in range(2):
                if steps is not None:
                    steps -= 1
                    if steps < 0:
                        raise Killed
                if when == 0:
                    result = function(*args, **kwargs)
            return result

        return step

    for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    for death in itertools.count():
        folder = tmp_path / str(death)
        folder.mkdir()
        output = folder / f"out{output_format}"
        begun.clear()
        steps = death
        try:
            predict(job, output)
            break
        except Killed:
            pass
        finally:
            steps = None
        job_folder = folder / f"out{output_format}.parts"
        finished = finished_parts(job_folder) if (job_folder / "job.json").exists() else set()
        first = list(begun)
        try:
            counts = predict(job, output)
        except ValueError as error:  # killed when all was done but for the folder's removal
            assert "exists" in str(error) and not job_folder.exists()
        else:
            assert sorted(finished | set(begun[len(first) :])) == list(range(parts))
            assert not finished & set(begun[len(first) :])
            assert (counts["answers"], counts["bad"]) == (10, 2)
        assert [answer["id"] for answer in read_output(output)] == [row["id"] for row in rows if row["question"]]
        assert [row["id"] for row in read_bad(output)] == [row["id"] for row in rows if not row["question"]]
        assert sorted(os.listdir(folder)) == [output.name, f"{output.name}.bad.jsonl"]
    assert death > 4 * parts


def stopped_job(tmp_path, monkeypatch, finished=2):
    """A job stopped after some of its parts, and its output."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "length_configs.json").write_text("{ }")
    job = a_job(write_table(tmp_path / "in.jsonl", questions(30)), model=tmp_path / "model")
    without_a_model(monkeypatch, [])
    whole = predict_module.answered_by_processes

    def stopping(*args):
        yield from itertools.islice(whole(*args), finished)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(predict_module, "answered_by_processes", stopping)
        predict(job, tmp_path / "out.jsonl")
    return job, tmp_path / "out.jsonl"


OTHER_FIELDS = {
    "--id, --question, --context": {"columns": ("id", "context", "question")},
    "--length_config": {"length_config": "fast"},
    "--batch_size": {"batch_size": 5},
    "--handle_impossible_answer": {"handle_impossible_answer": True},
    "--no_answer_threshold": {"no_answer_threshold": 1.5},
    "--return_answerable": {"return_answerable": True},
}


@pytest.mark.parametrize("changed", ["IN", "--model", *OTHER_FIELDS])
def test_another_job_does_not_go_on_with_this_ones_parts(tmp_path, small_parts, monkeypatch, changed):
    job, output = stopped_job(tmp_path, monkeypatch)
    folder = tmp_path / "out.jsonl.parts"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = job
    if changed == "IN":
        os.utime(job.input, (1, 1))
    elif changed == "--model":
        (tmp_path / "model" / "length_configs.json").write_text("{}")
    else:
        other = job._replace(**OTHER_FIELDS[changed])
    with pytest.raises(
        ValueError, match=f"^{changed} is .*, expected .*, as it was for the unfinished job in .*remove"
    ):
        predict(other, output)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    if other is not job:  # the first one still goes on
        assert predict(job, output)["answers"] == 30


@pytest.mark.parametrize("name", ["--return_answerable", "--of_a_later_version"])
def test_a_job_that_another_version_began_is_refused_with_a_sentence(tmp_path, small_parts, monkeypatch, name):
    job, output = stopped_job(tmp_path, monkeypatch)
    job_file = tmp_path / "out.jsonl.parts" / "job.json"
    begun = json.loads(job_file.read_text())
    if begun["identity"].pop(name, None) is None:
        begun["identity"][name] = 1
    job_file.write_text(json.dumps(begun))
    with pytest.raises(ValueError, match="the unfinished job in .* was begun by another version of recipe.predict"):
        predict(job, output)


def test_no_answer_and_answerable_are_written_on_request(tmp_path, tiny, in_this_process):
    rows = questions(40)
    path = write_table(tmp_path / "in.jsonl", rows)
    qa = Answerer(a_job(path, model=tiny)).pipeline
    asked = [{name: row[name] for name in ("question", "context")} for row in rows]
    sure = statistics.median(answer["answerable"] for answer in qa(asked, return_answerable=True))
    threshold = math.log(sure / (1 - sure))  # of the half
    request = {"handle_impossible_answer": True, "return_answerable": True, "no_answer_threshold": threshold}
    expected = [qa(each, **request) for each in asked]
    assert 2 < sum(answer["answer"] == "" for answer in expected) < 38
    for output_format in (".jsonl", ".parquet"):
        output = tmp_path / f"out{output_format}"
        assert predict(a_job(path, output_format, tiny, **request), output)["answers"] == 40
        answers = read_output(output)
        assert list(answers[0]) == ["id", "answer", "start", "end", "score", "answerable"]
        for row, answer, alone in zip(rows, answers, expected):
            close = {name: pytest.approx(alone[name], abs=1e-5) for name in ("score", "answerable")}
            assert answer == {"id": row["id"], **alone, **close}


def test_where_nothing_was_finished_another_job_begins_anew(tmp_path, small_parts, monkeypatch):
    job, output = stopped_job(tmp_path, monkeypatch, finished=0)
    assert predict(job._replace(batch_size=5), output)["rows"] == 30


def test_what_a_killed_part_left_does_not_count(tmp_path, small_parts, monkeypatch):
    job, output = stopped_job(tmp_path, monkeypatch)
    folder = tmp_path / "out.jsonl.parts"
    unfinished = max(finished_parts(folder)) + 1
    (folder / f"{unfinished:09d}.bad").write_text('{"id": "refused by what was killed"}\n')
    (folder / f"{unfinished:09d}.jsonl.unfinished").write_text('{"id": "ha')
    assert predict(job, output)["bad"] == 0
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "model", "out.jsonl"]


def test_one_process_a_job(tmp_path, small_parts, monkeypatch):
    job, output = stopped_job(tmp_path, monkeypatch)
    with (
        predict_module.job_folder(tmp_path / "out.jsonl.parts"),
        pytest.raises(ValueError, match="another process works in .*out.jsonl.parts"),
    ):
        predict(job, output)


def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, tiny, in_this_process):
    rows = questions(3)
    job = a_job(write_table(tmp_path / "in.jsonl", rows), model=tiny)
    for other, output, workers, message in (
        (job._replace(output_format=".csv"), "out.csv", 1, r"OUT is '.*out.csv', expected .*\.jsonl or \.parquet"),
        (job._replace(input=str(tmp_path / "in.txt")), "out.jsonl", 1, r"IN is '.*in.txt', expected .*\.csv"),
        (job, "out.jsonl", 0, "--workers is 0, expected at least 1"),
        (job._replace(batch_size=0), "out.jsonl", 1, "--batch_size is 0, expected at least 1"),
        (job._replace(no_answer_threshold=math.nan), "out.jsonl", 1, "no_answer_threshold is nan, expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(other, tmp_path / output, workers)
    for ending in (".csv", ".parquet"):
        path = write_table(tmp_path / f"in{ending}", rows)
        with pytest.raises(
            ValueError, match=f"--context is 'text', expected a column of .*in{ending}: 'id', 'question'"
        ):
            predict(a_job(path, model=tiny, columns=("id", "question", "text")), tmp_path / "out.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["in.csv", "in.jsonl", "in.parquet"]
    with pytest.raises(ValueError, match="length_config is 'fastish', which is no preset"):
        predict(job._replace(length_config="fastish"), tmp_path / "out.jsonl")
    # Which is not held against the one who gives it right.
    predict(job, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ValueError, match="OUT is '.*out.jsonl': it, or its .bad.jsonl, exists"):
        predict(job, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == before and not (tmp_path / "out.jsonl.parts").exists()


def test_empty_input_gives_empty_output(tmp_path, tiny, in_this_process):
    for ending in predict_rows.INPUTS:
        path = write_table(tmp_path / f"in{ending}", [])
        for output_format in predict_rows.OUTPUTS:
            output = tmp_path / f"out{ending}{output_format}"
            assert predict(a_job(path, output_format, tiny), output) == {"rows": 0, "answers": 0, "bad": 0}
            assert read_output(output) == []


@once
def test_kill_9_loses_and_repeats_no_row(tmp_path, tiny):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(path, rows=300, padding=3000)
    command = [sys.executable, "-m", "recipe.predict", str(path), str(output), "--model", str(tiny), "--workers", "2"]
    (killed,) = kill_and_resume(command, output, kills=1)
    assert 0 < killed < len(parts_of(path))
    assert check_rows(path, output) == (294, 6)
    # As if it had never been killed, by one process: the same bytes.
    job = a_job(path, model=tiny, batch_size=16)
    answered = [answer_part(job, part) for part in parts_of(path)]
    assert output.read_bytes() == b"".join(part.answers for part in answered)
    assert Path(f"{output}.bad.jsonl").read_bytes() == b"".join(part.bad for part in answered)


LIMIT = 256 * 2**20  # bytes in memory; half of them are needed
READING = """
import re, sys
from pathlib import Path
from recipe.predict_rows import cut_into_parts, open_input
path = Path(sys.argv[1])
reader = open_input(path, ("id", "question", "context"))
parts = cut_into_parts(reader, path.stat().st_size)
print(sum(len(context) for part in parts for _, _, context in reader.read(part)))
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@once
@pytest.mark.parametrize("ending", predict_rows.INPUTS)
def test_reading_needs_less_memory_than_the_input_has(tmp_path, ending):
    path, text, rows = tmp_path / f"in{ending}", "x" * 2**16, 5000
    if ending == ".parquet":  # one row group, whose rows are a few bytes each until they are read
        table = pa.table({"id": ["i"] * 1000, "question": ["q"] * 1000, "context": [text] * 1000})
        with pq.ParquetWriter(path, table.schema) as writer:
            writer.write_table(pa.concat_tables([table] * (rows // 1000)))
    else:
        row = f'"i","q","{text}"\n' if ending == ".csv" else json.dumps(dict(zip(COLUMNS, ("i", "q", text)))) + "\n"
        with path.open("w") as file:
            file.writelines(itertools.chain(['"id","question","context"\n'] * (ending == ".csv"), [row] * rows))
    assert rows * len(text) > LIMIT
    command = [sys.executable, "-c", READING, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    characters, most = map(int, done.stdout.split())
    assert characters == rows * len(text)
    assert most * 1024 < LIMIT


def growth(command, begun):
    """By how many MB a command's process, or one of its children, grows at its peak once `begun()`."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    highest, early = {}, {}
    while process.poll() is None:
        for status in [f"/proc/{process.pid}", *(f"/proc/{pid}" for pid in children(process.pid))]:
            try:
                lines = Path(status, "status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            found = [int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")]
            highest[status] = max([highest.get(status, 0), *found])
        if not early and begun():
            early = dict(highest)
        time.sleep(0.02)
    assert process.returncode == 0, process.stderr.read()
    process.stderr.close()
    return max(highest[each] - early[each] for each in early)


@once
def test_memory_does_not_grow_with_the_input(tmp_path, tiny):
    """The ids are large, and go through every step to the output."""
    path, output = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    with path.open("w") as file:
        for row in questions(800):
            file.write(json.dumps(row | {"id": row["id"] + "x" * 2**18}) + "\n")
    assert path.stat().st_size > 200 * 2**20
    options = ["--model", str(tiny), "--workers", "1"]
    command = [sys.executable, "-m", "recipe.predict", str(path), str(output), *options]
    # Loading what joins the parts takes 80 MB, all rows at once would take 200.
    assert growth(command, lambda: len(list(tmp_path.glob("out.parquet.parts/*.parquet"))) > 2) < 140
    assert pq.read_table(output).num_rows == 800


def test_the_command_says_how_fast_it_was(tmp_path, tiny, in_this_process, monkeypatch, capsys):
    path = write_table(tmp_path / "in.csv", questions(40))
    path.write_text(path.read_text().replace("id,question,context", "number,asked,text"))
    columns = ["--id", "number", "--question", "asked", "--context", "text"]
    options = ["--model", tiny, "--workers", "1", "--stats", tmp_path / "stats.json"]
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, (path, tmp_path / "out.parquet", *columns, *options))])
    predict_module.main()
    printed = capsys.readouterr().out
    assert printed.startswith("40 rows in ") and f"Wrote {tmp_path / 'out.parquet'}: 40 answers" in printed
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["rows"] == 40 and stats["workers"] == 1 and stats["bad"] == 0
    assert 40 / stats["rows_per_second"] == pytest.approx(stats["seconds"], abs=0.051)  # to a tenth
    core_seconds = stats["core_hours_per_billion_rows"] * 3600
    assert core_seconds == pytest.approx(1e9 / stats["rows_per_second"], rel=1e-2)


@once
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (requirements-ray.txt)")
def test_a_ray_cluster_answers_as_one_process_does(tmp_path, tiny):
    path = tmp_path / "in.jsonl"
    write_rows(path, rows=120, padding=3000)
    output = tmp_path / "ray.jsonl"
    run("recipe.predict", path, output, "--model", tiny, "--ray", "local", "--workers", "2")
    assert check_rows(path, output) == (117, 3)
    job = a_job(path, model=tiny, batch_size=16)
    answered = [answer_part(job, part) for part in parts_of(path)]
    assert len(answered) > 4
    assert output.read_bytes() == b"".join(part.answers for part in answered)
    assert Path(f"{output}.bad.jsonl").read_bytes() == b"".join(part.bad for part in answered)
