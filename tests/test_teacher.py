import random

import pytest
import torch
from transformers import AutoTokenizer, MPNetConfig, MPNetForQuestionAnswering

from conftest import ROOT, trains
from recipe.data import load_tokenizer
from recipe.teacher import SPECIAL_TOKENS, untrained_teacher
from recipe.training import WindowCollator

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
