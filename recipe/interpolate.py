"""Weights between a fine-tuned model and what length-adaptive training made of it: `python -m recipe.interpolate
--finetuned FOLDER --adapted FOLDER --share 0.5 --output_dir DIR`.

In between, the full model forgets less of what it knew, and sub-models keep most of what they learned (WiSE-FT,
Wortsman et al., arXiv:2109.01903). Which share is best, recipe.evaluate tells on validation questions.
"""

import argparse

import torch

from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.data import load_tokenizer
from recipe.presets import without_scores


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
    shapes = [{(name, weight.shape) for name, weight in weights.items()} for weights in (before, after)]
    differing = sorted({name for name, _ in shapes[0] ^ shapes[1]})
    if differing:
        raise ValueError(f"finetuned and adapted are models of two shapes: {', '.join(differing[:3])} differ")
    with torch.no_grad():
        for name, weight in after.items():
            weight.copy_(before[name].lerp(weight, share))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--finetuned", required=True, help="folder that recipe.adapt started from")
    parser.add_argument("--adapted", required=True, help="folder that recipe.adapt wrote")
    parser.add_argument("--share", type=float, default=0.5, help="how far to go from the first to the second (0.5)")
    parser.add_argument("--output_dir", required=True, help="folder to write the model to")
    arguments = parser.parse_args()
    finetuned, adapted = (
        QuaLAMiniLMForQuestionAnswering.from_pretrained(folder, dtype=torch.float32)
        for folder in (arguments.finetuned, arguments.adapted)
    )
    interpolate(finetuned, adapted, arguments.share)
    adapted.config.length_presets = without_scores(adapted.config, adapted.config.length_presets)
    adapted.save_pretrained(arguments.output_dir)
    load_tokenizer(arguments.adapted).save_pretrained(arguments.output_dir)
    print(f"Wrote the model between to {arguments.output_dir}")


if __name__ == "__main__":
    main()
