import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, tiny_folder, trains
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe import mean

pytestmark = trains


def run(monkeypatch, model, trained, share, folder):
    options = {"--model": model, "--trained": trained, "--share": share, "--output_dir": folder}
    monkeypatch.setattr(sys, "argv", ["mean", *(str(each) for pair in options.items() for each in pair)])
    mean.main()


def test_every_weight_is_moved_by_its_share_of_the_way(tmp_path, monkeypatch):
    folder, trained = tiny_folder(tmp_path / "before"), tmp_path / "after"
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(4.0)
    model.save_pretrained(trained)
    run(monkeypatch, folder, trained, 0.25, tmp_path / "mean")

    before, found = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "mean"))
    assert found.keys() == before.keys()
    for name, weights in before.items():
        torch.testing.assert_close(found[name], weights + 1.0)
    QuaLAMiniLMForQuestionAnswering.from_pretrained(tmp_path / "mean")  # states its own weights' checksum
    assert (tmp_path / "mean" / "tokenizer.json").exists()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_is_no_mean_is_refused(share, tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "before")
    with pytest.raises(ValueError, match=rf"--share is {share}, expected a number in \(0, 1\)"):
        run(monkeypatch, folder, folder, share, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_model_of_another_shape_is_refused(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "before")
    with pytest.raises(
        ValueError, match=r"--trained has bert\.embeddings\.\S+ of shape \(.*384.*\), --model has it of \(.*16"
    ):
        run(monkeypatch, folder, ROOT, 0.5, tmp_path / "mean")
