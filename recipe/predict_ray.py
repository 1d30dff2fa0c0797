"""The parts of recipe.predict, answered by the actors of a Ray cluster through Ray Data."""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

import pyarrow as pa
import ray.data

from recipe.predict_rows import Answered, Answerer, Part

LOCAL_OBJECT_STORE = 2**28  # bytes; parts that are under way are small


class AnswerParts:
    """An actor, which loads the model once."""

    def __init__(self, job):
        self.answerer = Answerer(job)

    def __call__(self, parts):
        """Answers a table of parts: one of as many rows, of the fields of [`Answered`]."""
        answered = [self.answerer(Part(**part)) for part in parts.to_pylist()]
        return pa.table(dict(zip(Answered._fields, map(list, zip(*answered)))))


def answered_by_ray(job, parts, workers, address):
    """Yields each part, [`Answered`], as soon as it is, by the actors of a Ray cluster.

    Args:
        job ([`Job`]): its input and model are read by the actors, at the same paths on every node.
        parts: a `list` of [`Part`].
        workers (`int`): actors, each of one core; `None`: as many as the cluster has cores.
        address (`str`): the cluster's, `"auto"` for the one that this machine is of, or `"local"` to start one here.
    """
    if not parts:
        return
    local = {"num_cpus": workers, "object_store_memory": LOCAL_OBJECT_STORE, "include_dashboard": False}
    with ray.init(address, log_to_driver=False, **(local if address == "local" else {})):
        ray.data.DataContext.get_current().enable_progress_bars = False
        # A block a part, so that each is handed over when it is answered.
        rows = ray.data.from_items([part._asdict() for part in parts], override_num_blocks=len(parts))
        answered = rows.map_batches(
            AnswerParts,
            fn_constructor_args=(job,),
            batch_size=1,
            batch_format="pyarrow",
            concurrency=workers or int(ray.cluster_resources()["CPU"]),
            num_cpus=1,
        )
        for row in answered.iter_rows():
            yield Answered(**row)
