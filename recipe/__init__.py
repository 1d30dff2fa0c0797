"""How the weights were made and measured; each module is a command, `python -m recipe.NAME --help`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
