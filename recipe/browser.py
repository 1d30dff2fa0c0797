"""The page that answers in a browser, in a folder that any file server serves: `make page`.

`python -m recipe.browser --output_dir DIR` writes it: the page and its JavaScript, ONNX Runtime and pdf.js as npm
installed them into demo/browser/node_modules, and the model. Nothing in it asks another machine for anything. Its
folder model/ is also what answers in Node.
"""

import argparse
import shutil
from pathlib import Path

import onnx

from qualaminilm.graph_qualaminilm import GRAPH_FILE
from qualaminilm.length_configs_qualaminilm import PRESETS_FILE
from recipe import ROOT
from recipe.results import whole_folder

LENGTH_CONFIG = "length_config"
SOURCE = ROOT / "demo" / "browser"
PAGE = ("index.html", "page.css", "page.js", "texts.js", "worker.js", "qualaminilm")
# By the folder they are written to: what npm installs of them.
PACKAGES = {
    "onnxruntime-web": ("dist", ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")),
    # The build for browsers that are some years old.
    "pdfjs-dist": ("legacy/build", ("pdf.min.mjs", "pdf.worker.min.mjs")),
}
MODEL = ("config.json", PRESETS_FILE, "tokenizer.json", "tokenizer_config.json")


def without_default(graph):
    """The ONNX model `graph` with its `length_config` an input that must be given, which runtimes in JavaScript need:
    one that may be left out is refused by onnxruntime-web, and onnxruntime-node never reads it, without a word.

    Raises:
        ValueError: it has no such input.
    """
    if LENGTH_CONFIG not in [each.name for each in graph.graph.input]:
        raise ValueError(f"the graph takes no {LENGTH_CONFIG}: python -m recipe.export writes one that does")
    kept = [each for each in graph.graph.initializer if each.name != LENGTH_CONFIG]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    return graph


def write_model(folder, model):
    """Writes what JavaScript reads of the model folder `model` into `folder`.

    Raises:
        FileNotFoundError: there is no graph beside the weights.
    """
    graph = Path(model) / GRAPH_FILE
    if not graph.exists():
        raise FileNotFoundError(f"{graph} is missing: python -m recipe.export --model {model} writes it")
    folder.mkdir()
    onnx.save(without_default(onnx.load(graph)), folder / "model.onnx")
    for name in MODEL:
        shutil.copy(Path(model) / name, folder)


def write_page(folder, model):
    """Writes the page that answers with the model folder `model` into `folder`, which must not exist.

    Raises:
        FileExistsError, FileNotFoundError: see [`whole_folder`] and [`write_model`]; or npm has installed nothing.
    """
    installed = SOURCE / "node_modules"
    if not installed.is_dir():
        raise FileNotFoundError(f"{installed} is missing: npm ci --ignore-scripts in {SOURCE} writes it")
    with whole_folder(folder) as unfinished:
        for name in PAGE:
            copy = shutil.copytree if (SOURCE / name).is_dir() else shutil.copy
            copy(SOURCE / name, unfinished / name)
        for package, (dist, names) in PACKAGES.items():
            (unfinished / package).mkdir()
            for name in names:
                shutil.copy(installed / package / dist / name, unfinished / package)
        write_model(unfinished / "model", model)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder of the model (the shipped one)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the page, which must not exist")
    arguments = parser.parse_args()
    try:
        write_page(arguments.output_dir, arguments.model)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"Wrote {arguments.output_dir}. python -m http.server --directory {arguments.output_dir} serves it.")


if __name__ == "__main__":
    main()
