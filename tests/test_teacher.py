import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, MPNetConfig, MPNetForQuestionAnswering

from conftest import ROOT, squad_file, trains
from recipe.data import load_tokenizer, read_questions
from recipe.teacher import SPECIAL_TOKENS, WindowCollator, token_f1, untrained_teacher
from recipe.windows import off_topic, runs_of_words, split, windows

pytestmark = trains
QUESTION, CONTEXT = "Where do I live?", "My name is Wolfgang and I live in Berlin. It is nice here, really."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "tests" / "folders" / "int8")


@pytest.fixture(scope="module")
def mpnet(tokenizer, tmp_path_factory):
    """A folder with a random MPNet, of BERT's vocabulary in another order."""
    folder = tmp_path_factory.mktemp("mpnet")
    tokens = [token for token in tokenizer.get_vocab() if token not in SPECIAL_TOKENS]
    random.Random(0).shuffle(tokens)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "MPNetTokenizer", "do_lower_case": true}')
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = MPNetConfig(vocab_size=len(tokens), initializer_range=0.5, max_position_embeddings=120, **sizes)
    MPNetForQuestionAnswering(config).save_pretrained(folder)
    return folder


def test_the_teacher_reads_berts_tokens_as_mpnet_reads_its_own(mpnet, tokenizer):
    theirs, reference = AutoTokenizer.from_pretrained(mpnet), MPNetForQuestionAnswering.from_pretrained(mpnet).eval()
    teacher = untrained_teacher(mpnet, tokenizer).eval()
    rows = [(QUESTION, CONTEXT), ("Who?", CONTEXT[:20]), ("What is nice here, really?", CONTEXT)]
    encoded = [tokenizer(*row)["input_ids"] for row in rows]
    batch = [
        {"input_ids": ids, "length": len(ids), "question_length": ids.index(tokenizer.sep_token_id) + 1}
        | {"starts": [0], "ends": [0]}
        for ids in encoded
    ]
    inputs = WindowCollator(tokenizer.pad_token_id)(batch)
    del inputs["targets"]
    with torch.inference_mode():
        found = teacher(**inputs)
        for i, row in enumerate(rows):
            expected = reference(**theirs(*row, return_tensors="pt"))
            second = batch[i]["question_length"]  # the token that BERT does not have
            for name in ("start_logits", "end_logits"):
                of_mpnet = expected[name][0].tolist()
                del of_mpnet[second]
                assert found[name][i, : len(of_mpnet)].tolist() == pytest.approx(of_mpnet, abs=1e-5)


def test_a_token_that_mpnet_lacks_is_named(mpnet, tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "folders" / "int8")
    tokenizer.add_tokens(["quokka"])
    with pytest.raises(ValueError, match="has no token 'quokka'"):
        untrained_teacher(mpnet, tokenizer)


def test_a_window_that_does_not_answer_points_to_cls(tokenizer, tmp_path):
    paragraphs = [(CONTEXT, [(QUESTION, ["Berlin", "in Berlin"]), ("Who is she?", [])])]
    rows = list(windows(read_questions(squad_file(tmp_path / "squad.json", {"One": paragraphs})), tokenizer))
    text = [tokenizer.decode(rows[0]["input_ids"][a : b + 1]) for a, b in zip(rows[0]["starts"], rows[0]["ends"])]
    assert text == ["berlin", "in berlin"]
    assert (rows[1]["starts"], rows[1]["ends"]) == ([0], [0])
    question = rows[0]["input_ids"][: rows[0]["question_length"]]
    assert tokenizer.decode(question) == "[CLS] where do i live? [SEP]"


def test_no_training_paragraph_shares_eight_words_with_validation(tmp_path):
    rng = random.Random(0)
    sentences = [" ".join(f"w{rng.randrange(999)}" for _ in range(9)) for _ in range(40)]
    articles = {
        f"Title {i}": [(f"{rng.choice(sentences)}. Ann lives in {i}.", [("Where?", [str(i)])])] for i in range(300)
    }
    table = read_questions(squad_file(tmp_path / "squad.json", articles))
    train, validation, dropped = split({"one": table})
    held_out = {run for context in validation["one"]["context"] for run in runs_of_words(context)}
    assert len(validation["one"]) and dropped and not set(train["one"]["title"]) & set(validation["one"]["title"])
    assert len(train["one"]) + len(validation["one"]) + dropped == 300
    assert not any(held_out & runs_of_words(context) for context in train["one"]["context"])


def test_off_topic_questions_stand_on_paragraphs_of_other_articles(tmp_path):
    articles = {f"Title {i}": [(f"Ann lives in {i}.", [(f"Where, {i}?", [str(i)])])] for i in range(50)}
    table = read_questions(squad_file(tmp_path / "squad.json", articles))
    rows = list(off_topic(table, 0.4, seed=0))
    assert len(rows) in range(15, 21) and not any(row["answers"]["text"] for row in rows)
    assert all(f"Ann lives in {row['question'][7:-1]}." != row["context"] for row in rows)


@pytest.mark.parametrize(
    "first, last, f1", [(3, 4, 1.0), (3, 3, 2 / 3), (2, 5, 2 * 2 / 6), (6, 7, 0.0), (0, 0, 0.0), (9, 9, 1.0)]
)
def test_token_f1_by_hand(first, last, f1):
    """The answers are the tokens 3 to 4, and 9."""
    logits = np.zeros((2, 12))
    logits[0, first] = logits[1, last] = 9
    assert token_f1(logits, starts=[3, 9], ends=[4, 9]) == pytest.approx(f1)
