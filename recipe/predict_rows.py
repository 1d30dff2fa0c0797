"""Reads the rows of recipe.predict's input, part by part, and answers them: what each of its workers does.

A part is a run of consecutive rows of about the same size in bytes, which can be read without what stands before it.
The process that hands out the parts imports this file too, so that what loads torch is imported where it is needed.
"""

import bisect
import codecs
import csv
import functools
import itertools
import json
import reprlib
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

INPUTS, OUTPUTS = (".jsonl", ".csv", ".parquet"), (".jsonl", ".parquet")
MAX_PART_ROWS = 4096
MIN_PART_BYTES, MAX_PART_BYTES = 2**16, 2**22
PARTS = 1024  # of an input, about, where the two bounds above leave the choice
MAX_CSV_FIELD = 2**24  # characters; where a quote is never closed, what follows it must not be read to the file's end
ROWS_AT_ONCE = 64  # decoded of a Parquet file


class Part(NamedTuple):
    """Rows of the input: `rows` of them from row `first`, which begin at byte `offset` and take `size` bytes (in a
    Parquet file: which have `size` characters)."""

    number: int
    first: int
    rows: int
    offset: int
    size: int


class Job(NamedTuple):
    """What decides the answers to a part, the same for all parts.

    Attributes:
        input (`str`): path of the rows.
        columns (`tuple` of `str`): names of the columns id, question and context.
        output_format (`str`): one of `OUTPUTS`.
        model (`str`): folder of the model.
        length_config (`str`): as typed, see `parse_length_config`.
        batch_size (`int`): rows that pass through the model together.
        handle_impossible_answer (`bool`), no_answer_threshold (`float`), return_answerable (`bool`): the pipeline's.
    """

    input: str
    columns: tuple
    output_format: str
    model: str
    length_config: str
    batch_size: int
    handle_impossible_answer: bool = False
    no_answer_threshold: float | None = None
    return_answerable: bool = False


class Answered(NamedTuple):
    """A part's answers as they are written to files.

    Attributes:
        number (`int`): the part's.
        answers (`bytes`): a Parquet file, or JSON lines.
        bad (`bytes`): JSON lines, one a row that has no answer.
    """

    number: int
    answers: bytes
    bad: bytes


class Lines:
    """A file of JSON lines. Lines of nothing but white space are no rows."""

    id_type = pa.string()
    start = 0  # bytes before the first row

    def __init__(self, path, columns):
        self.path, self.columns = path, columns

    def pieces(self):
        """Yields how many rows (0 or 1) and bytes each next piece of the file has."""
        with open(self.path, "rb") as file:
            for line in file:
                yield int(not line.isspace()), len(line)

    def read(self, part):
        """Yields the part's rows, each (id, question, context), or an exception if it cannot be read."""
        for line in self._lines(part):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield ValueError(f"not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield tuple(row.get(name) for name in self.columns)
            else:
                yield ValueError(f"{reprlib.repr(row)} is no JSON object")

    def _lines(self, part):
        with open(self.path, "rb") as file:
            file.seek(part.offset)
            for line in file:
                yield line
                if file.tell() >= part.offset + part.size:
                    return


class Csv(Lines):
    """A CSV file with a header, comma-separated, quoted by `"`. Every value is text; empty lines are no rows."""

    def __init__(self, path, columns):
        super().__init__(path, columns)
        with open(path, "rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            self.names = next(_records(file), [])
            self.start = file.tell()
        _require_columns(path, columns, self.names)

    def pieces(self):
        with open(self.path, "rb") as file:
            file.seek(self.start)
            before = self.start
            for record in _records(file):
                yield int(record != []), file.tell() - before
                before = file.tell()

    def read(self, part):
        places = [self.names.index(name) for name in self.columns]
        for record in _records(self._lines(part)):
            if isinstance(record, csv.Error):
                yield record
            elif record and len(record) != len(self.names):
                yield ValueError(f"has {len(record)} fields, expected {len(self.names)}")
            elif record:
                yield tuple(record[place] for place in places)


def _records(lines):
    """Yields each record of CSV lines (`bytes`), a `list` of `str`, or the `csv.Error` in its place."""
    csv.field_size_limit(MAX_CSV_FIELD)
    # What is not UTF-8 becomes lone surrogates, which the pipeline refuses row by row.
    reader = csv.reader(line.decode(errors="surrogateescape") for line in lines)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield error


class Parquet:
    """A Parquet file. Parts are best read in their order: what is skipped must be decoded, from the last row that was
    read or from the start of the row group."""

    start = 0

    def __init__(self, path, columns):
        self.path, self.columns = path, columns
        with pq.ParquetFile(path) as file:
            _require_columns(path, columns, file.schema_arrow.names)
            self.id_type = file.schema_arrow.field(columns[0]).type
            lengths = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self.group_starts = list(itertools.accumulate(lengths, initial=0))
        self.next_row, self.rows = -1, None

    def pieces(self):
        """Yields how many rows and characters each next piece has: one row."""
        for row in self._rows(0):
            yield 1, sum(len(text) for text in row if isinstance(text, str))

    def read(self, part):
        """The part's rows, each (id, question, context)."""
        group = bisect.bisect_right(self.group_starts, part.first) - 1
        if not self.group_starts[group] <= self.next_row <= part.first:
            self.next_row, self.rows = self.group_starts[group], self._rows(group)
        skipped = part.first - self.next_row
        self.next_row = part.first + part.rows
        return list(itertools.islice(self.rows, skipped, skipped + part.rows))

    def _rows(self, group):
        with pq.ParquetFile(self.path, pre_buffer=False) as file:
            groups = range(group, file.num_row_groups)
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=list(set(self.columns))):
                yield from zip(*(_values(batch[name]) for name in self.columns))


def _values(column):
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        # As with CSV: the row at fault is to be refused, and no other.
        values = column.cast(pa.large_binary()).to_pylist()
        return [value if value is None else value.decode(errors="surrogateescape") for value in values]


def _require_columns(path, columns, names):
    for argument, name in zip(("--id", "--question", "--context"), columns):
        if name not in names:
            raise ValueError(f"{argument} is {name!r}, expected a column of {path}: {', '.join(map(repr, names))}")


def open_input(path, columns):
    """The reader of a file of rows, by the file's ending: `pieces`, `read` and `id_type`, the ids' Arrow type.

    Raises:
        ValueError: another ending than those of `INPUTS`, or a column that the file lacks.
        OSError: it cannot be read.
    """
    readers = dict(zip(INPUTS, (Lines, Csv, Parquet)))
    if Path(path).suffix not in readers:
        raise ValueError(f"IN is {str(path)!r}, expected a name that ends in {', '.join(INPUTS)}")
    return readers[Path(path).suffix](path, columns)


def cut_into_parts(reader, file_size):
    """The input's parts, a `list` of [`Part`], which depend on nothing but the input.

    Args:
        reader: see [`open_input`].
        file_size (`int`): bytes of the file.
    """
    part_bytes = min(max(file_size // PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
    parts, first, rows, offset, size = [], 0, 0, reader.start, 0
    for more_rows, more_bytes in tqdm(reader.pieces(), desc="Counting", unit="row"):
        if rows == MAX_PART_ROWS or (rows and size + more_bytes > part_bytes):
            parts.append(Part(len(parts), first, rows, offset, size))
            first, rows, offset, size = first + rows, 0, offset + size, 0
        rows += more_rows
        size += more_bytes
    if rows:
        parts.append(Part(len(parts), first, rows, offset, size))
    return parts


def answer_schema(id_type, return_answerable=False):
    """Arrow schema of the answers: one row a question."""
    columns = {"id": id_type, "answer": pa.string(), "start": pa.int64(), "end": pa.int64(), "score": pa.float64()}
    return pa.schema(columns | ({"answerable": pa.float64()} if return_answerable else {}))


class Answerer:
    """Loads the job's model once and answers one part after the other, on one thread."""

    def __init__(self, job):
        import torch
        from transformers import AutoTokenizer, logging

        from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
        from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
        from recipe.presets import parse_length_config

        torch.set_num_threads(1)
        logging.disable_progress_bar()  # there is one already
        self.job, self.reader = job, open_input(job.input, job.columns)
        self.schema = answer_schema(self.reader.id_type, job.return_answerable)
        model = QuaLAMiniLMForQuestionAnswering.from_pretrained(job.model, dtype=torch.float32).eval()
        self.pipeline = QuestionAnsweringPipeline(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(job.model, config=model.config),
            length_config=parse_length_config(job.length_config),
            batch_size=job.batch_size,
            handle_impossible_answer=job.handle_impossible_answer,
            no_answer_threshold=job.no_answer_threshold,
            return_answerable=job.return_answerable,
        )

    def __call__(self, part):
        """Reads the part and answers it: [`Answered`]."""
        rows = list(enumerate(self.reader.read(part), part.first))
        if len(rows) != part.rows:
            raise RuntimeError(f"{self.job.input} has changed: part {part} has {len(rows)} rows")
        good, bad = [], []
        for number, row in rows:
            fault = row if isinstance(row, Exception) else fault_of(*row)
            if fault:
                bad.append((number, None if isinstance(row, Exception) else row[0], fault))
            else:
                good.append((number, *row))
        good.sort(key=lambda row: len(row[2]) + len(row[3]))
        answered = []
        for i in range(0, len(good), self.job.batch_size):
            batch = good[i : i + self.job.batch_size]
            for (number, identity, *_), answer in zip(batch, self.answers(batch)):
                if isinstance(answer, Exception):
                    bad.append((number, identity, answer))
                else:
                    answered.append((number, {"id": identity, **answer}))
        answered.sort(key=lambda row: row[0])
        bad.sort(key=lambda row: row[0])
        return Answered(part.number, self.encoded([row for _, row in answered]), b"".join(map(bad_line, bad)))

    def answers(self, batch):
        """The pipeline's answer to each row, or the exception that it raised: halves are asked again, until it is known
        whose fault that was."""
        examples = [{"question": question, "context": context} for *_, question, context in batch]
        try:
            # One alone is no list of one, so that its fault is not called row 0's.
            return self.pipeline(examples) if len(batch) > 1 else [self.pipeline(examples[0])]
        except Exception as error:
            if len(batch) == 1:
                return [error]
            half = len(batch) // 2
            return self.answers(batch[:half]) + self.answers(batch[half:])

    def encoded(self, answers):
        """Answers (dicts) as the bytes of a file."""
        if self.job.output_format == ".jsonl":
            names = self.schema.names
            # A Parquet file's ids may be dates and other values that JSON has no form for.
            lines = (json.dumps({name: answer[name] for name in names}, default=str) + "\n" for answer in answers)
            return "".join(lines).encode()
        if not isinstance(self.reader, Parquet):
            for answer in answers:
                if not isinstance(answer["id"], (str, type(None))):
                    answer["id"] = json.dumps(answer["id"])
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(answers, self.schema), buffer)
        return buffer.getvalue().to_pybytes()


def fault_of(identity, question, context):
    """What is wrong with a row that the pipeline is not to be asked about; `None` if it is to be."""
    for name, text in (("question", question), ("context", context)):
        if not isinstance(text, str):
            return ValueError(f"`{name}` is {reprlib.repr(text)}, expected text")
    if isinstance(identity, str):
        try:
            identity.encode()
        except UnicodeEncodeError as error:
            return ValueError(f"`id` is not valid Unicode text: {error}")
    return None


def bad_line(row):
    """The side file's line of a row: (number, id, exception)."""
    number, identity, error = row
    # A ValueError is about the row; of any other error the name says more than its words.
    reason = str(error) if isinstance(error, (ValueError, csv.Error)) else f"{type(error).__name__}: {error}"
    return (json.dumps({"row": number, "id": identity, "reason": reason}, default=str) + "\n").encode()


@functools.lru_cache(maxsize=1)
def answerer(job):
    return Answerer(job)


def answer_part(job, part):
    """Answers a part in a process that keeps the model for the next one."""
    return answerer(job)(part)
