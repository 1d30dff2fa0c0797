"""Makes a trained folder the shipped model, in half precision: `python -m recipe.ship FOLDER`.

Presets keep their length configs; their MACs are computed anew, and their scores, other weights' scores, are dropped.
"""

import argparse
import math

import torch

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe.data import load_tokenizer
from recipe.evaluate import ROOT


def describe_preset(config, preset):
    """The preset with what follows from its length config."""
    entries = preset["length_config"]
    lengths = config.token_lengths(entries)
    return {
        "length_config": entries,
        **({"chosen_by": preset["chosen_by"]} if "chosen_by" in preset else {}),
        "lengths_at_384": [lengths.kept(layer, 384) for layer in range(config.num_hidden_layers)],
        "macs_at_384": config.macs(entries),
        # Rounded up, so that {"max_macs": what stands here} admits the preset.
        "macs_share": math.ceil(config.macs_share(entries) * 1e4) / 1e4,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="output folder of recipe.finetune")
    folder = parser.parse_args().folder
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(folder, dtype=torch.float16)
    presets = model.config.length_presets
    if (ROOT / "config.json").exists():
        presets = QuaLAMiniLMConfig.from_pretrained(ROOT).length_presets
    model.config.length_presets = {name: describe_preset(model.config, preset) for name, preset in presets.items()}
    model.save_pretrained(ROOT)
    load_tokenizer(folder).save_pretrained(ROOT)
    print(f"Wrote the model of {folder} to {ROOT} in float16")


if __name__ == "__main__":
    main()
