"""Makes the Hub's flat files at the repository root importable as a package, relative imports included."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent)]
