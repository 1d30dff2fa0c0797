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
    """Moves the weights of `model`, in place, to those of `trained` by a `share` of the way, both float models.

    Raises:
        ValueError: `share` is not in (0, 1), or the two are not of one shape.
    """
    if not 0 < share < 1:
        raise ValueError(f"--share is {share}, expected a number in (0, 1)")
    before, after = model.state_dict(), trained.state_dict()
    if {name: each.shape for name, each in before.items()} != {name: each.shape for name, each in after.items()}:
        raise ValueError("--trained has other weights than --model, expected those of one shape")
    for name, weights in before.items():
        weights.lerp_(after[name], share)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--trained", required=True, help="folder of what came of it when it was trained on")
    parser.add_argument("--share", type=float, required=True, help="of the way from the one to the other, in (0, 1)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write the model to")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    mean(model, load_model(arguments.trained), arguments.share)
    model.save_pretrained(arguments.output_dir)
    load_tokenizer(arguments.model).save_pretrained(arguments.output_dir)
    print(f"Wrote the mean to {arguments.output_dir}")


if __name__ == "__main__":
    main()
