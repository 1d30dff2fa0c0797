"""Folders, weights and an exported graph that commit 02618cd wrote, tests/folders/, answer today as they did then."""

import json
import shutil

import pytest
import torch
from transformers import pipeline

from conftest import ROOT, TRANSFORMERS_5
from qualaminilm import quantization_qualaminilm
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from qualaminilm.pipeline_qualaminilm import QuestionAnsweringPipeline
from recipe.data import load_tokenizer

FOLDERS = ROOT / "tests" / "folders"
ANSWERS = json.loads((FOLDERS / "answers.json").read_text(encoding="utf-8"))


def answers(qa, folder):
    """What `qa` answers to the folder's recorded questions, at their length configs."""
    asked = ("question", "context", "length_config")
    return [qa(**{name: row[name] for name in asked}) for row in ANSWERS[folder]]


@pytest.mark.parametrize("folder", ["int8", "roberta"])
def test_a_folder_answers_as_when_it_was_written(folder, monkeypatch):
    # As on the machine that wrote it: bfloat16 attention moves a random model's close calls.
    monkeypatch.setattr(quantization_qualaminilm, "attention_dtype", lambda *_: torch.float32)
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(FOLDERS / folder).eval()
    qa = QuestionAnsweringPipeline(model=model, tokenizer=load_tokenizer(FOLDERS / folder))
    for row, answer in zip(ANSWERS[folder], answers(qa, folder)):
        assert answer.items() >= {name: row[name] for name in ("start", "end", "answer")}.items()
        if folder == "roberta":  # floats, which no rounding step moves
            assert answer["score"] == pytest.approx(row["score"], abs=2e-6)


@pytest.mark.parametrize("folder", ["int8", "roberta"])
def test_a_folder_saved_again_is_a_complete_repository(folder, tmp_path):
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(FOLDERS / folder).eval()
    qa = QuestionAnsweringPipeline(model=model, tokenizer=load_tokenizer(FOLDERS / folder))
    qa.save_pretrained(tmp_path)
    again = pipeline("question-answering", model=str(tmp_path), trust_remote_code=True)
    assert answers(again, folder) == answers(qa, folder)


@pytest.mark.parametrize("kind", ["config.json", "model.safetensors"])
def test_the_checksums_of_an_old_folder_still_count(kind, tmp_path):
    shutil.copytree(FOLDERS / "int8", tmp_path, dirs_exist_ok=True)
    content = (FOLDERS / "int8" / kind).read_bytes()
    damaged = content.replace(b'"hidden_size": 24', b'"hidden_size": 48') if kind == "config.json" else content[:-8]
    assert damaged != content
    (tmp_path / kind).write_bytes(damaged)
    with pytest.raises(ValueError, match="architecture_sha256|weights_sha256"):
        QuaLAMiniLMForQuestionAnswering.from_pretrained(tmp_path)


@pytest.mark.skipif(TRANSFORMERS_5, reason="Optimum runs on transformers 4.57")
def test_an_exported_graph_answers_as_when_it_was_written():
    from optimum.onnxruntime import ORTModelForQuestionAnswering

    folder = FOLDERS / "export"
    qa = pipeline(
        "question-answering",
        model=ORTModelForQuestionAnswering.from_pretrained(folder),
        tokenizer=load_tokenizer(folder),
    )
    for row in ANSWERS["export"]:
        answer = qa(question=row["question"], context=row["context"])
        assert answer.items() >= {name: row[name] for name in ("start", "end", "answer")}.items()


def test_int8_weights_are_the_floats_that_they_were():
    """`dequantize()` gives what int8 storage of that commit says in words, by hand."""
    from safetensors.torch import load_file

    stored = load_file(FOLDERS / "int8" / "model.safetensors")
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(FOLDERS / "int8").dequantize()
    name = "bert.encoder.layer.1.attention.self.key"
    by_hand = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"][:, None] / stored[f"{name}.smoothing"]
    assert torch.equal(model.state_dict()[f"{name}.weight"], by_hand)
