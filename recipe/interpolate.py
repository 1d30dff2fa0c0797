"""Weights between a fine-tuned model and what length-adaptive training made of it: `python -m recipe.interpolate
--finetuned FOLDER --adapted FOLDER ... --share 0.5 --output_dir DIR`.

In between, the full model forgets less of what it knew, and sub-models keep most of what they learned (WiSE-FT,
Wortsman et al., arXiv:2109.01903). Which share is best, recipe.evaluate tells on validation questions. Of several
adapted models, the last checkpoints of one run, the mean is taken first (model soups, Wortsman et al.,
arXiv:2203.05482).
"""

import argparse

import torch

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.data import load_tokenizer
from recipe.presets import without_scores


def average(models):
    """Makes the weights of the first of `models` the mean of them all, in place.

    Raises:
        ValueError: the models' weights differ in name or shape.
    """
    require_one_shape(*(model.state_dict() for model in models))
    with torch.no_grad():
        for name, weight in models[0].state_dict().items():
            weight.copy_(torch.stack([model.state_dict()[name] for model in models]).mean(0))


def require_one_shape(*states):
    """Raises a [`ValueError`] unless `states`, dicts of tensors, have the same names and shapes."""
    shapes = [{(name, weight.shape) for name, weight in weights.items()} for weights in states]
    differing = sorted({name for each in shapes for name, _ in each ^ shapes[0]})
    if differing:
        raise ValueError(f"the models are of two shapes: {', '.join(differing[:3])} differ")


def interpolate(finetuned, adapted, share):
    """Moves the weights of the model `adapted` back towards those of `finetuned`, in place; 0 is `finetuned`, 1
    `adapted`. Scorers, which only `adapted` need have, stay its own.

    Raises:
        ValueError: `share` is not in [0, 1], or the models' weights differ in name or shape.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, expected a number in [0, 1]")
    before, after = (
        {name: weight for name, weight in model.state_dict().items() if ".scorer." not in name}
        for model in (finetuned, adapted)
    )
    require_one_shape(before, after)
    with torch.no_grad():
        for name, weight in after.items():
            weight.copy_(before[name].lerp(weight, share))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--finetuned", required=True, help="folder that recipe.adapt started from")
    parser.add_argument("--adapted", nargs="+", required=True, help="folders that recipe.adapt wrote: their mean")
    parser.add_argument("--share", type=float, default=0.5, help="how far to go from the first to the second (0.5)")
    parser.add_argument("--output_dir", required=True, help="folder to write the model to")
    arguments = parser.parse_args()
    finetuned, adapted, *others = (
        QuaLAMiniLMForQuestionAnswering.from_pretrained(folder, dtype=torch.float32)
        for folder in (arguments.finetuned, *arguments.adapted)
    )
    average([adapted, *others])
    interpolate(finetuned, adapted, arguments.share)
    adapted.config.length_presets = without_scores(adapted.config, adapted.config.length_presets)
    adapted.save_pretrained(arguments.output_dir)
    load_tokenizer(arguments.adapted[0]).save_pretrained(arguments.output_dir)
    print(f"Wrote the model between to {arguments.output_dir}")


if __name__ == "__main__":
    main()
