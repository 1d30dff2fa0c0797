"""The exported graph in ONNX Runtime: arrays in, logits out. Neither torch nor transformers is needed."""

import ctypes
import os
import weakref

import numpy as np

GRAPH_FILE = "onnx/model_int8.onnx"
AT_ONCE = 16 * 384  # tokens of a run, padding included: attention maps of more take memory, and no less time a token
MOST_PADDING = 1 / 8  # of a run's real tokens
MOST = 2**24  # tokens that an entry of the graph's length_config may count: float32 holds each int up to it

# Sessions of this process, which destroys one by waiting for its threads.
LIVE = weakref.WeakSet()


def abandon_sessions():
    """In a forked child, which has none of these threads and would wait for ever: keeps the sessions to its end."""
    for session in LIVE:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
    LIVE.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=abandon_sessions)


class Unusable(Exception):
    """Why a graph cannot be used; `surprising` where whoever put it there believes that it can."""

    def __init__(self, why, surprising=False):
        super().__init__(why)
        self.surprising = surprising


def import_onnxruntime():
    """The package. Raises [`Unusable`] where it is missing."""
    # From 1.29 on it tells its maker of each model that it reads, by a thread that a forked child waits for at its end.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise Unusable(f"onnxruntime cannot be imported: {error}") from None
    return onnxruntime


class Graph:
    """A graph that takes any `length_config`, on a CPU.

    Sessions, which neither copies nor pickles nor forked processes can use, are made where they are missing.

    Args:
        path (`str` or path): of the graph.
        threads (`int`): with which its first session runs.

    Attributes:
        metadata (`dict` of `str`): what `recipe.export` wrote into it of the model.

    Raises:
        Unusable: there is no onnxruntime, or the graph cannot be read. Calls raise it too, in a process that has yet to
            make a session.
    """

    def __init__(self, path, threads):
        self.path = os.path.abspath(path)  # the process may go to another folder
        self.sessions = {}  # by process and number of threads
        self.metadata = None
        self.metadata = metadata(self._session(threads))

    def __call__(self, inputs, lengths, threads):
        """start_logits and end_logits, float32 (batch, sequence).

        Args:
            inputs (`dict`): int64 arrays (batch, sequence), neither of them 0, by the names of the graph's inputs.
            lengths ([`TokenLengths`]).
            threads (`int`): to compute with.
        """
        session = self._session(threads)
        entries = np.array([min(each, MOST) for each in lengths.entries], np.float32)
        entries = entries / 1000 if lengths.relative else entries
        logits = tuple(np.empty(inputs["input_ids"].shape, np.float32) for _ in range(2))
        for rows in of_like_number(np.count_nonzero(inputs["attention_mask"], axis=1)):
            part = {name: array[rows] for name, array in inputs.items()} | {"length_config": entries}
            for whole, of_rows in zip(logits, session.run(None, part)):
                whole[rows] = of_rows
        return logits

    def _session(self, threads):
        """This process's session of so many threads."""
        key = os.getpid(), threads
        if key not in self.sessions:
            onnxruntime = import_onnxruntime()
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            # Threads that spin until the next call take the processor from all others, torch's own among them.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.log_severity_level = 3  # else it warns that an input has a default
            try:
                session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # of its own kinds, which it does not name
                raise Unusable(f"{self.path} cannot be read: {error}", surprising=True) from None
            if self.metadata is not None and metadata(session) != self.metadata:
                raise Unusable(f"{self.path} is another graph than at first", surprising=True)
            LIVE.add(session)
            self.sessions[key] = session
        return self.sessions[key]

    def __getstate__(self):
        return self.__dict__ | {"sessions": {}}


def of_like_number(tokens):
    """Yields a batch's rows, which have so many real `tokens` each (an array), in lists to be run: the graph pads them
    to the longest of a run."""
    numbers = np.maximum(tokens, 1).tolist()
    rows, real = [], 0
    for row in sorted(range(len(numbers)), key=lambda row: -numbers[row]):
        if rows and (len(rows) + 1) * numbers[rows[0]] > min(AT_ONCE, (real + numbers[row]) * (1 + MOST_PADDING)):
            yield rows
            rows, real = [], 0
        rows.append(row)
        real += numbers[row]
    yield rows


def metadata(session):
    """What a session's graph says of itself, a dict of `str`."""
    return session.get_modelmeta().custom_metadata_map
