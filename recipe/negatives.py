"""Questions that a text seems to answer and does not, found by a model that they fool: `python -m recipe.negatives
--model FOLDER --windows FOLDER --answers FOLDER --data FILE ... --long FILE ... --output_dir DIR`.

Of questions that the training windows answer, two kinds are made: asked otherwise of their own paragraph (another name
or number of it, the opposite of a word, a negation: three of the ways in which SQuAD v2.0's questions without an answer
were written, Rajpurkar et al., arXiv:1806.03822); and, of files of long texts, put to the one that shares most of their
rare words but holds no answer. Those that the model would have answered (the first kind: as before) are kept; a change
that left the answer right would mostly have led it to other words. Writes a folder of windows as recipe.windows does,
the kept ones among a sample of the training windows with what the teacher answers on them.
"""

import argparse
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import datasets
import torch
from tqdm import tqdm

from recipe.data import NO_ANSWERS, load_tokenizer, read_questions
from recipe.results import whole_folder
from recipe.training import WindowCollator, bert_inputs, has_bf16, load_model, span_logits, token_f1
from recipe.windows import MENTION, TRAIN, VALIDATION, windows

SHARE = 0.35  # of the windows written, what is found here
DRAWN = 100  # other paragraphs, of which a question is put to the likeliest
NEGATED = 0.1  # of the questions that can be
OPPOSITES = """
above below, accept reject, accepted rejected, active passive, add remove, added removed, advantage disadvantage,
advantages disadvantages, after before, agree disagree, agreed disagreed, allies enemies, allowed forbidden, ally
enemy, always never, ancient modern, appear disappear, appeared disappeared, arrive leave, arrived left, ascend
descend, attack defend, attacked defended, bad good, began ended, begin end, beginning end, benefit harm, benefits
harms, best worst, better worse, big small, bigger smaller, biggest smallest, birth death, born died, bottom top,
bought sold, build destroy, built destroyed, buy sell, cause prevent, caused prevented, causes prevents, cheap
expensive, close open, closed opened, closest farthest, cold hot, common rare, create destroy, created destroyed, day
night, decline growth, decrease increase, decreased increased, decreasing increasing, deep shallow, democratic
authoritarian, denied admitted, deny admit, dry wet, earlier later, earliest latest, early late, east west, eastern
western, easy difficult, empty full, enter leave, entered left, export import, exported imported, exports imports,
external internal, fail succeed, failed succeeded, failure success, fast slow, faster slower, fastest slowest, female
male, few many, fewer more, fewest most, final initial, first last, formal informal, former current, founded
dissolved, gain lose, gained lost, greater lesser, greatest least, happy sad, hard soft, heavier lighter, heaviest
lightest, heavy light, high low, higher lower, highest lowest, husband wife, include exclude, included excluded,
inside outside, introduced abolished, join leave, joined left, king queen, large small, larger smaller, largest
smallest, least most, legal illegal, length width, liked disliked, local foreign, long short, longer shorter, longest
shortest, lost won, major minor, majority minority, man woman, maximum minimum, men women, more less, mother father,
natural artificial, near far, nearest farthest, necessary unnecessary, new old, newer older, newest oldest, next
previous, north south, northeast southwest, northern southern, northwest southeast, offensive defensive, official
unofficial, often rarely, older younger, oldest youngest, opponent supporter, opponents supporters, oppose support,
opposed supported, past future, peace war, permanent temporary, poor rich, popular unpopular, positive negative,
possible impossible, present absent, private public, profit loss, profits losses, pull push, raise lower, raised
lowered, received sent, regular irregular, released withdrawn, religious secular, rise fall, rose fell, rural urban,
safe dangerous, similar different, simple complex, sister brother, son daughter, start end, started ended, starts
ends, strength weakness, strong weak, stronger weaker, strongest weakest, summer winter, sunrise sunset, tall short,
tallest shortest, teacher student, true false, upper lower, usually rarely, victory defeat, visible invisible, wealthy
poor, winner loser, young old
"""
OPPOSITE = {}
for _pair in OPPOSITES.replace("\n", " ").split(","):
    _one, _other = _pair.split()
    OPPOSITE.setdefault(_one, _other)
    OPPOSITE.setdefault(_other, _one)
WORD = re.compile(r"\w+")
AUXILIARY = re.compile(r"\b(?:is|are|was|were|did|does|do|could|has|have|had|would|should)\b")
NEGATION = re.compile(r"n['\u2019]t\b|\b(?:not|never|no)\b")


def asked_otherwise(row, rng):
    """The question of `row`, of :func:`recipe.data.read_questions`, changed in one place, or `None` if it has none."""
    question, context = row["question"], row["context"]
    answers = {text.casefold() for text in row["answers"]["text"]}
    taken = question.casefold()
    others = {}
    for mention in MENTION.finditer(context):
        text = mention[0].casefold()
        if text not in taken and not any(text in answer or answer in text for answer in answers):
            others.setdefault(mention.lastgroup, []).append(mention[0])
    changes = []
    for mention in MENTION.finditer(question):
        if mention.lastgroup in others and mention[0].casefold() in context.casefold():
            changes.append((mention.span(), rng.choice(others[mention.lastgroup])))
    for word in WORD.finditer(question):
        if word[0] in OPPOSITE:
            changes.append((word.span(), OPPOSITE[word[0]]))
    auxiliary = None if NEGATION.search(question) else AUXILIARY.search(question)
    if auxiliary and rng.random() < NEGATED:
        changes = [((auxiliary.end(), auxiliary.end()), "n't")]
    if not changes:
        return None
    (start, end), text = rng.choice(changes)
    return question[:start] + text + question[end:]


def changed(table, seed):
    """The questions of `table` that can be asked otherwise, with the answers that are theirs no more."""
    rng = random.Random(seed)
    questions = [asked_otherwise(row, rng) for row in table]
    kept = [i for i, question in enumerate(questions) if question]
    return table.select(kept).map(lambda _, i: {"question": questions[kept[i]]}, with_indices=True, desc="Changing")


def elsewhere(table, seed):
    """Each question of `table` put to the one of `DRAWN` other paragraphs that shares most of its rare words, by the
    logarithms of their inverse document frequencies, and holds none of its answers."""
    rng = random.Random(seed)
    contexts = sorted(set(table["context"]))
    words = {context: set(WORD.findall(context.casefold())) for context in contexts}
    folded = {context: context.casefold() for context in contexts}
    frequency = Counter(word for each in words.values() for word in each)
    kept, moved = [], []
    for i, row in enumerate(table):
        asked = set(WORD.findall(row["question"].casefold()))
        answers = [text.casefold() for text in row["answers"]["text"]]
        drawn = [
            each
            for each in rng.sample(contexts, min(DRAWN, len(contexts)))
            if each != row["context"] and not any(answer in folded[each] for answer in answers)
        ]
        if drawn:
            kept.append(i)
            moved.append(
                max(drawn, key=lambda each: sum(-math.log(frequency[w] / len(contexts)) for w in asked & words[each]))
            )
    return table.select(kept).map(
        lambda _, i: {"context": moved[i], "answers": NO_ANSWERS}, with_indices=True, desc="Moving"
    )


def fooling(model, rows, pad_token_id, batch_size=32):
    """Which of `rows`, windows whose own starts and ends are wrong or [CLS], `model` answers: by the first where
    there are any, by anything at all where it is [CLS]. A list of `int`."""
    found = []
    collator, order = WindowCollator(pad_token_id), sorted(range(len(rows)), key=lambda i: rows[i]["length"])
    for first in tqdm(range(0, len(order), batch_size), desc="Answering", unit="batch"):
        of_batch = [rows[i] for i in order[first : first + batch_size]]
        batch = {name: each.to(model.device) for name, each in collator(of_batch).items()}
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=has_bf16()):
            outputs = model(**bert_inputs(batch, model.config))
        logits = span_logits(outputs, batch["attention_mask"]).cpu().numpy()
        for i, row, each in zip(order[first:], of_batch, logits):
            answered_so = token_f1(each, row["starts"], row["ends"]) > 0
            if answered_so == (row["starts"] != [0]):
                found.append(i)
    return sorted(found)


def without_answer(row):
    """What the columns of a window without an answer hold; its teacher is sure of that."""
    return {"starts": [0], "ends": [0]} | {
        f"{name}_{kind}": [0] for name in ("start", "end") for kind in ("tokens", "log_probabilities")
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", required=True, help="folder of the model to fool")
    parser.add_argument("--windows", type=Path, required=True, help="folder that recipe.windows wrote")
    parser.add_argument("--answers", required=True, help="folder that recipe.answers wrote: the teacher's answers")
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="files whose questions are asked otherwise")
    parser.add_argument("--long", nargs="+", type=Path, required=True, help="files whose questions are put elsewhere")
    parser.add_argument("--most", type=int, default=6000, help="questions of each file to make others of (6000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the tables, which must not exist")
    arguments = parser.parse_args()
    with whole_folder(arguments.output_dir) as unfinished:
        rows = datasets.load_from_disk(arguments.windows / TRAIN)
        model, tokenizer = load_model(arguments.model).eval(), load_tokenizer(arguments.model)
        if torch.cuda.is_available():
            model.to("cuda")
        trained, longest, found = set(rows["id"]), max(rows["length"]), []
        kinds = [(changed, path) for path in arguments.data] + [(elsewhere, path) for path in arguments.long]
        for kind, path in kinds:
            table = read_questions(path)
            answered = (i for i, row in enumerate(table) if row["answers"]["text"] and row["id"] in trained)
            table = table.select(list(answered)).shuffle(seed=arguments.seed)
            table = table.select(range(min(len(table), arguments.most)))
            candidates = windows(kind(table, arguments.seed), tokenizer, longest)
            kept = candidates.select(fooling(model, candidates, tokenizer.pad_token_id))
            print(f"{path.stem}, {kind.__name__}: the model answers {len(kept)} of {len(candidates)} windows")
            found.append(kept.map(without_answer))
        rows = datasets.concatenate_datasets([rows, datasets.load_from_disk(arguments.answers)], axis=1)
        found = datasets.concatenate_datasets(found).cast(rows.features)
        others = min(len(rows), round(len(found) * (1 - SHARE) / SHARE))
        rows = rows.shuffle(seed=arguments.seed).select(range(others))
        datasets.concatenate_datasets([rows, found]).save_to_disk(unfinished / TRAIN)
        shutil.copytree(arguments.windows / VALIDATION, unfinished / VALIDATION)
    print(f"Wrote {len(found)} windows that fooled the model, and {others} others, to {arguments.output_dir}")


if __name__ == "__main__":
    main()
