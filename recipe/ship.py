"""Makes a trained folder the shipped model, in half precision: `python -m recipe.ship FOLDER`.

The shipped model's presets keep their length configs until recipe.search finds new ones; their MACs are computed anew,
and their scores, other weights' scores, are dropped.
"""

import argparse

import torch

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.data import load_tokenizer
from recipe.evaluate import ROOT
from recipe.presets import without_scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="output folder of recipe.finetune or recipe.adapt")
    folder = parser.parse_args().folder
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(folder, dtype=torch.float16)
    presets = model.config.length_presets
    if (ROOT / "config.json").exists():
        presets = QuaLAMiniLMConfig.from_pretrained(ROOT).length_presets
    model.config.length_presets = without_scores(model.config, presets)
    model.save_pretrained(ROOT)
    load_tokenizer(folder).save_pretrained(ROOT)
    print(f"Wrote the model of {folder} to {ROOT} in float16")


if __name__ == "__main__":
    main()
