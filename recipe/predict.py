"""Answers a file of questions, however many: `python -m recipe.predict IN OUT`.

IN is JSON lines, CSV or Parquet, OUT Parquet or JSON lines, by their endings. The rows are answered in parts, by one
process a core, and each part is written beside OUT, into OUT.parts, and renamed when it is whole. A job that was
stopped, at whatever moment, goes on from there when the command is given again. At the end the parts are put together
in the order of IN, and OUT.parts is removed. A row without an answer stands in OUT.bad.jsonl instead, with the reason.
"""

import argparse
import concurrent.futures
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import joblib
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from qualaminilm.files_qualaminilm import whole_file, write_whole
from qualaminilm.reading_qualaminilm import check_options
from recipe.predict_rows import OUTPUTS, Job, Part, answer_part, answer_schema, cut_into_parts, open_input

JOB_FILE = "job.json"
ROW_GROUP_BYTES = 2**23  # of OUT, where it is Parquet


def predict(job, output, workers=None, ray=None):
    """Answers every row of the job's input, or what an earlier call that was stopped had left to do.

    Args:
        job ([`Job`]): what is asked of which model.
        output: path of the file to write, which does not exist yet.
        workers (`int`): processes, each of one thread; `None`: as many as there are cores.
        ray (`str`): address of a Ray cluster whose workers they are; `"local"` starts one on this machine.

    Returns:
        `dict` of `int`: `rows` answered or refused by this call, `answers` and `bad` rows that the whole job has.

    Raises:
        ValueError: an argument that is not accepted, naming it; an output that exists; or, where `output` has been
            begun, another job than that.
        OSError: a file could not be read or written.
    """
    output = Path(output)
    if job.output_format not in OUTPUTS:
        raise ValueError(f"OUT is {str(output)!r}, expected a name that ends in {' or '.join(OUTPUTS)}")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is {workers}, expected at least 1")
    if job.batch_size < 1:
        raise ValueError(f"--batch_size is {job.batch_size}, expected at least 1")
    check_options(no_answer_threshold=job.no_answer_threshold)
    reader = open_input(job.input, job.columns)
    identity = identity_of(job)
    with job_folder(beside(output, ".parts")) as folder:
        parts = begin_or_resume(folder, output, identity, reader)
        finished = finished_parts(folder)
        waiting = [part for part in parts if part.number not in finished]
        rows = {part.number: part.rows for part in parts}
        bar = tqdm(
            total=sum(rows.values()),
            initial=sum(rows[number] for number in finished),
            desc="Answering",
            unit="row",
            smoothing=0.05,
        )
        with bar:
            if ray is None:
                answered = answered_by_processes(job, waiting, workers or joblib.cpu_count())
            else:
                from recipe.predict_ray import answered_by_ray

                answered = answered_by_ray(job, waiting, workers, ray)
            bad = 0
            for part in answered:
                # The answers last: where they stand the part is finished.
                if part.bad:
                    write_whole(folder / f"{part.number:09d}.bad", part.bad)
                write_whole(folder / f"{part.number:09d}{output.suffix}", part.answers)
                bad += part.bad.count(b"\n")
                bar.set_postfix(bad=bad, refresh=False)
                bar.update(rows[part.number])
        counts = put_together(folder, output, parts, answer_schema(reader.id_type, job.return_answerable))
        if sum(counts.values()) != sum(rows.values()):
            raise RuntimeError(f"{folder} has {counts} rows, expected {sum(rows.values())}")
        # First this: a folder without it has nothing to go on with.
        (folder / JOB_FILE).unlink()
        shutil.rmtree(folder)
    return {"rows": sum(part.rows for part in waiting), **counts}


def beside(path, ending):
    return path.with_name(path.name + ending)


def identity_of(job):
    """What must be as it was for a job to go on: by argument, the values that decide its answers.

    The input is known by its size and time of change, as rsync and make know files: to read it all for a checksum
    would take long, and changing it within a job takes intent.
    """
    status = os.stat(job.input)
    weights = hashlib.sha256()
    for path in sorted(Path(job.model).iterdir()):
        if path.suffix in (".json", ".safetensors"):
            with path.open("rb") as file:
                weights.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return {
        "IN": f"of {status.st_size} bytes, changed at {status.st_mtime_ns / 1e9}",
        "--id, --question, --context": list(job.columns),
        "--model": f"of SHA-256 {weights.hexdigest()}",
        "--length_config": job.length_config,
        "--batch_size": job.batch_size,
        "--handle_impossible_answer": job.handle_impossible_answer,
        "--no_answer_threshold": job.no_answer_threshold,
        "--return_answerable": job.return_answerable,
    }


@contextmanager
def job_folder(folder):
    """Makes the folder, and keeps other processes out of it.

    Raises:
        ValueError: another process works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which a process loses with its life
        except BlockingIOError:
            raise ValueError(f"another process works in {folder}, expected to be the only one") from None
        yield folder


def begin_or_resume(folder, output, identity, reader):
    """The parts of the job that the folder holds or, where it holds none, of a new one.

    Raises:
        ValueError: finished parts are of another job, or there is an `output` already.
    """
    job_file = folder / JOB_FILE
    finished = finished_parts(folder)
    if job_file.exists():
        job = json.loads(job_file.read_text(encoding="utf-8"))
        begun_as = job["identity"]
        if begun_as == identity:
            # A part's bad rows without its answers, or what was half-written.
            for path in folder.iterdir():
                if path.suffix not in ("", ".json") and not (path.stem.isdigit() and int(path.stem) in finished):
                    path.unlink()
            return [Part(*part) for part in job["parts"]]
        if finished and begun_as.keys() != identity.keys():
            raise ValueError(
                f"the unfinished job in {folder} was begun by another version of recipe.predict, expected this one; "
                f"remove that folder to begin anew"
            )
        if finished:
            name = next(name for name in identity if begun_as[name] != identity[name])
            raise ValueError(
                f"{name} is {identity[name]}, expected {begun_as[name]}, as it was for the unfinished job in {folder}; "
                f"remove that folder to begin anew"
            )
    if output.exists() or beside(output, ".bad.jsonl").exists():
        shutil.rmtree(folder)
        raise ValueError(f"OUT is {str(output)!r}: it, or its .bad.jsonl, exists, expected files yet to be made")
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()
    parts = cut_into_parts(reader, os.path.getsize(reader.path))
    write_whole(job_file, json.dumps({"identity": identity, "parts": parts}).encode())
    return parts


def finished_parts(folder):
    """Numbers of the parts whose answers are in the folder (`set` of `int`)."""
    return {int(path.stem) for path in folder.iterdir() if path.suffix in OUTPUTS}


def answered_by_processes(job, parts, workers):
    """Yields each part, [`Answered`], as soon as it is, by `workers` processes; few parts are under way at a time."""
    parts, running = iter(parts), set()
    # Spawned: a forked child could not use torch's threads, nor locks that the parent held.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent)
    try:
        while True:
            more = itertools.islice(parts, 2 * workers - len(running))
            running |= {pool.submit(answer_part, job, part) for part in more}
            if not running:
                return
            done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent():
    """Sees to it that this process ends when its parent is killed, which would leave it waiting for work forever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def put_together(folder, output, parts, schema):
    """Writes the parts in their order to `output`, and the bad rows beside it.

    Returns:
        how many there are: `{"answers": int, "bad": int}`.
    """
    files = [folder / f"{part.number:09d}{output.suffix}" for part in parts]
    put = put_lines_together if output.suffix == ".jsonl" else put_tables_together
    # The answers last, as with each part.
    bad_files = [path for path in (file.with_suffix(".bad") for file in files) if path.exists()]
    bad = put_lines_together(bad_files, beside(output, ".bad.jsonl"), schema) if bad_files else 0
    return {"answers": put(files, output, schema), "bad": bad}


def put_lines_together(files, path, schema):
    """Writes the lines of all `files` to `path`, and returns how many there are."""
    count = 0
    with whole_file(path) as file:
        for each in files:
            lines = each.read_bytes()
            file.write(lines)
            count += lines.count(b"\n")
    return count


def put_tables_together(files, path, schema):
    """Writes the rows of all `files` to `path`, and returns how many there are."""
    count, waiting = 0, []
    with whole_file(path) as file, pq.ParquetWriter(file, schema) as writer:
        for each in files:
            waiting.append(pq.read_table(each, schema=schema))
            count += waiting[-1].num_rows
            if sum(table.nbytes for table in waiting) >= ROW_GROUP_BYTES or each is files[-1]:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
    return count


def command_line():
    """The command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("input", metavar="IN", help="rows to answer: .jsonl, .csv or .parquet")
    parser.add_argument("output", metavar="OUT", help="answers to write: .parquet or .jsonl")
    parser.add_argument("--model", default=".", help="folder of the model (this one)")
    parser.add_argument("--length_config", default="full", help="a preset's name, or JSON: [0.9, ...] (full)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows that a worker answers together (16)")
    parser.add_argument(
        "--handle_impossible_answer", action="store_true", help='answer "" where the context does not answer'
    )
    parser.add_argument(
        "--no_answer_threshold", type=float, help="evidence that an answer has to have, in log units (config.json's)"
    )
    parser.add_argument(
        "--return_answerable", action="store_true", help="add a column: how sure the model is that there is an answer"
    )
    parser.add_argument("--workers", type=int, help="processes, each of one thread (one a core)")
    for column in ("id", "question", "context"):
        parser.add_argument(f"--{column}", default=column, help=f"column of IN that holds the {column} ({column})")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="of a Ray cluster to work on; auto finds one, local starts one"
    )
    parser.add_argument("--stats", metavar="FILE", help="JSON results file to write: how fast it went")
    return parser


def main():
    parser = command_line()
    arguments = parser.parse_args()
    if arguments.stats and arguments.ray and not arguments.workers:
        parser.error("--stats takes --workers where they are a Ray cluster's")
    job = Job(
        input=str(Path(arguments.input).resolve()),
        columns=(arguments.id, arguments.question, arguments.context),
        output_format=Path(arguments.output).suffix,
        model=str(Path(arguments.model).resolve()),
        length_config=arguments.length_config,
        batch_size=arguments.batch_size,
        handle_impossible_answer=arguments.handle_impossible_answer,
        no_answer_threshold=arguments.no_answer_threshold,
        return_answerable=arguments.return_answerable,
    )
    started = time.perf_counter()
    counts = predict(job, arguments.output, arguments.workers, arguments.ray)
    seconds = time.perf_counter() - started
    rate = counts["rows"] / seconds
    if arguments.stats:
        from recipe.data import identities  # which load torch
        from recipe.results import describe_run, write_json

        workers = arguments.workers or joblib.cpu_count()
        stats = {
            **counts,
            "seconds": round(seconds, 1),
            "rows_per_second": rate,
            "workers": workers,
            "core_hours_per_billion_rows": 1e9 * workers / rate / 3600 if rate else None,
            "length_config": job.length_config,
            "batch_size": job.batch_size,
            "data": identities([job.input]),
            **describe_run("recipe.predict", pa),
            "threads": workers,
        }
        write_json(arguments.stats, stats)
    print(f"{counts['rows']} rows in {seconds:.1f} s, {rate:.1f} rows/s")
    print(f"Wrote {arguments.output}: {counts['answers']} answers")
    if counts["bad"]:
        print(f"Wrote {arguments.output}.bad.jsonl: {counts['bad']} rows without an answer, and why")


if __name__ == "__main__":
    main()
