"""The mean of two models' weights: `python -m recipe.mean --model FOLDER --trained FOLDER --share X --output_dir DIR`.

What a model learns of new questions and what it forgets of the old lies between the weights before and after: on the
line between both the mean often has the better of each (WiSE-FT, Wortsman et al., CVPR 2022, arXiv:2109.01903).
"""

import argparse
from pathlib import Path

import torch

from recipe.data import load_tokenizer
from recipe.training import load_model


@torch.no_grad()
def mean(model, trained, share):
    """Moves the weights of `model`, in place, to (1 - share) model + share trained (WiSE-FT).

    Args:
        model, trained ([`QuaLAMiniLMForQuestionAnswering`]): of one shape, in float32.
        share (`float`): in (0, 1).

    Raises:
        ValueError: `share` is not in (0, 1), or `trained` has other weights than `model`, or some of another shape.
    """
    if not 0 < share < 1:
        raise ValueError(f"--share is {share}, expected a number in (0, 1)")
    before, after = model.state_dict(), trained.state_dict()
    shapes, expected = ({name: tuple(each.shape) for name, each in of.items()} for of in (after, before))
    if shapes != expected:
        name, _ = min(shapes.items() ^ expected.items())
        raise ValueError(f"--trained has {name} of shape {shapes.get(name)}, --model has it of {expected.get(name)}")
    for name, weights in before.items():
        weights.lerp_(after[name], share)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--trained", required=True, help="folder of what came of it when it was trained on")
    parser.add_argument("--share", type=float, required=True, help="of the way from the one to the other, in (0, 1)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write the model to")
    arguments = parser.parse_args()
    model, trained = (load_model(folder).float() for folder in (arguments.model, arguments.trained))
    mean(model, trained, arguments.share)
    model.save_pretrained(arguments.output_dir)
    load_tokenizer(arguments.model).save_pretrained(arguments.output_dir)
    print(f"Wrote the mean to {arguments.output_dir}")


if __name__ == "__main__":
    main()
