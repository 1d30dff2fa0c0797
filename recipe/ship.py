"""Makes a folder the shipped model, int8 ones with their graph: `python -m recipe.ship FOLDER`.

Float weights are stored in half precision, int8 ones as they are. The folder's presets and
their scores come along, and what the search tells of them.
"""

import argparse
import shutil
from pathlib import Path

import torch

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig
from qualaminilm.modeling_qualaminilm import QuaLAMiniLMForQuestionAnswering
from recipe import ROOT
from recipe.data import load_tokenizer
from recipe.export import export_beside_weights
from recipe.search import PLOT, REPORT


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("folder", help="output folder of recipe.adapt, recipe.search or recipe.quantize")
    folder = parser.parse_args().folder
    config = QuaLAMiniLMConfig.from_pretrained(folder)
    dtype = torch.float32 if config.int8_weights else torch.float16
    model = QuaLAMiniLMForQuestionAnswering.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(ROOT)
    load_tokenizer(folder).save_pretrained(ROOT)
    if config.int8_weights:
        export_beside_weights(ROOT)
    for name, where in ((REPORT, "results"), (PLOT, "assets")):
        if (Path(folder) / name).exists():
            shutil.copyfile(Path(folder) / name, Path(ROOT) / where / name)
    print(f"Wrote the model of {folder} to {ROOT} in {'int8' if config.int8_weights else 'float16'}")


if __name__ == "__main__":
    main()
