import copy
import sys

import pytest
import torch

from conftest import tiny_config, tiny_folder
from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.interpolate import interpolate, main


def models():
    torch.manual_seed(0)
    return [QuaLAMiniLMForQuestionAnswering(tiny_config(significance=kind)) for kind in ("attention", "learned")]


def test_each_weight_moves_by_the_share_and_scorers_stay():
    finetuned, adapted = models()
    before, after = finetuned.state_dict(), copy.deepcopy(adapted.state_dict())
    interpolate(finetuned, adapted, 0.25)
    for name, weight in adapted.state_dict().items():
        expected = after[name] if ".scorer." in name else 0.75 * before[name] + 0.25 * after[name]
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_are_the_models_themselves(share):
    finetuned, adapted = models()
    expected = copy.deepcopy((adapted if share else finetuned).state_dict())
    interpolate(finetuned, adapted, share)
    assert all(torch.equal(adapted.state_dict()[name], weight) for name, weight in expected.items())


def test_shares_and_shapes_that_do_not_fit_are_named():
    finetuned, adapted = models()
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share is .*, expected a number in"):
            interpolate(finetuned, adapted, share)
    other = QuaLAMiniLMForQuestionAnswering(tiny_config(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"two shapes: bert.encoder.layer.2.\S+"):
        interpolate(other, adapted, 0.5)
    with pytest.raises(ValueError, match=r"two shapes: bert.encoder.layer.2.\S+"):
        interpolate(adapted, other, 0.5)


def test_the_command_writes_a_whole_model(tmp_path, monkeypatch):
    folders = [tiny_folder(tmp_path / name) for name in ("finetuned", "adapted")]
    searched = QuaLAMiniLMConfig.from_pretrained(folders[1])
    searched.length_presets["full"]["test"] = {"f1": 1.0, "em": 1.0}  # other weights' scores
    searched.save_presets(folders[1])
    options = ["--finetuned", folders[0], "--adapted", folders[1], "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["interpolate", *map(str, options)])
    main()
    before = QuaLAMiniLMForQuestionAnswering.from_pretrained(folders[0]).state_dict()
    after = QuaLAMiniLMForQuestionAnswering.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    presets = QuaLAMiniLMConfig.from_pretrained(tmp_path / "out").length_presets
    assert presets["full"]["lengths_at_384"] == [384, 384] and "test" not in presets["full"]
