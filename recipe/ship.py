"""Makes a trained folder the shipped model, in half precision: `python -m recipe.ship FOLDER`.

Presets of length_configs.json stay as they are, but for scores: those were other weights'.
"""

import argparse

import torch

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.data import load_tokenizer
from recipe.evaluate import ROOT


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="output folder of recipe.finetune")
    folder = parser.parse_args().folder
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(folder, dtype=torch.float16)
    if (ROOT / "config.json").exists():
        shipped = QuaLAMiniLMConfig.from_pretrained(ROOT).length_presets
        model.config.length_presets = {
            name: {key: value for key, value in preset.items() if key not in ("validation", "test")}
            for name, preset in shipped.items()
        }
    model.save_pretrained(ROOT)
    load_tokenizer(folder).save_pretrained(ROOT)
    print(f"Wrote the model of {folder} to {ROOT} in float16")


if __name__ == "__main__":
    main()
