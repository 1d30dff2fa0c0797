"""How many tokens each layer hands on: presets, what a legal `length_config` is, and what it costs.

Nothing here needs torch or transformers, nor does what runs the exported graph without them.
"""

import json
import math
import re
import reprlib
from collections import Counter
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

PRESETS_FILE = "length_configs.json"
ACCEPTED = (
    "a preset's name, one int >= 2 a layer, one float in (0, 1] a layer, or {'max_macs': share in (0, 1]}; "
    "entries are non-increasing"
)


@dataclass(frozen=True)
class TokenLengths:
    """How many tokens each layer hands on: a `length_config` read and checked.

    Attributes:
        entries (`tuple[int, ...]`): one a layer, tokens or thousandths of a row's real tokens.
        relative (`bool`): whether the entries are thousandths.
    """

    entries: tuple
    relative: bool

    def kept(self, layer, n):
        """Tokens that layer `layer` hands on of a row that entered the model with `n` real tokens (both `int`)."""
        entry = self.entries[layer]
        return min(n, max(2, (entry * n + 999) // 1000) if self.relative else entry)


class LengthConfigs:
    """What a model's sizes and presets make of a `length_config`.

    Attributes, which a subclass sets:
        num_hidden_layers, hidden_size, intermediate_size (`int`), significance (`str`), length_config,
        length_presets (`dict`): as in [`QuaLAMiniLMConfig`].
    """

    def token_lengths(self, length_config=None):
        """Reads a `length_config`.

        Args:
            length_config: a preset's name; one int >= 2 a layer (layer i keeps min(n, c_i) of a row's n real tokens);
                one float in (0, 1] a layer, read to three decimals, p/1000 (layer i keeps
                min(n, max(2, (p*n + 999) // 1000))); `{"max_macs": s}`, of the presets whose MACs share is at most s
                `"full"` if it is among them, else that of the best validation F1 (of the most MACs, where not all were
                measured); or `None`, this configuration's own. Entries are non-increasing.

        Returns:
            [`TokenLengths`]

        Raises:
            ValueError: anything else, naming the entry at fault and what would be accepted.
        """
        if length_config is None:
            length_config = "full" if self.length_config is None else self.length_config
        if isinstance(length_config, str):
            if length_config == "full":
                return TokenLengths((1000,) * self.num_hidden_layers, relative=True)
            if length_config not in self.length_presets:
                raise ValueError(
                    f"length_config is {length_config!r}, which is no preset; the presets are "
                    f"{', '.join(map(repr, self.length_presets))}. Accepted: {ACCEPTED}"
                )
            return self._read_entries(self.length_presets[length_config]["length_config"], f"preset {length_config!r}")
        if isinstance(length_config, dict):
            return self._within_max_macs(length_config)
        return self._read_entries(length_config, "length_config")

    def _read_entries(self, entries, name):
        if not isinstance(entries, (list, tuple)):
            raise ValueError(f"{name} is {entries!r}, a {type(entries).__name__}. Accepted: {ACCEPTED}")
        if len(entries) != self.num_hidden_layers:
            raise ValueError(
                f"{name} has {len(entries)} entries, the model has {self.num_hidden_layers} layers. "
                f"Accepted: {ACCEPTED}"
            )
        relative = not isinstance(entries[0], Integral)
        read = []
        for i, entry in enumerate(entries):
            if isinstance(entry, bool) or not isinstance(entry, Real):
                fault = f"a {type(entry).__name__}"
            elif isinstance(entry, Integral) == relative:
                fault = f"{'an int' if relative else 'a float'} among {'floats' if relative else 'ints'}"
            elif relative and not (0 < entry <= 1 and round(entry * 1000)):
                fault = "not in (0, 1] when read to three decimals"
            elif not relative and entry < 2:
                fault = "less than 2"
            else:
                read.append(round(entry * 1000) if relative else int(entry))
                if i == 0 or read[i] <= read[i - 1]:
                    continue
                fault = f"more than the entry before it, {entries[i - 1]!r}"
            raise ValueError(f"entry {i} of {name} is {entry!r}, {fault}. Accepted: {ACCEPTED}")
        return TokenLengths(tuple(read), relative)

    def _within_max_macs(self, wanted):
        share = wanted.get("max_macs")
        if list(wanted) != ["max_macs"] or isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(f"length_config is {wanted!r}. Accepted: {ACCEPTED}")
        shares = {name: self.macs_share(name) for name in self.length_presets}
        within = [name for name in shares if shares[name] <= share]
        if not within:
            cheapest = min(shares, key=shares.get)
            raise ValueError(
                f"length_config is {wanted!r}, but the cheapest preset, {cheapest!r}, has a MACs share of "
                f"{shares[cheapest]:.3f}"
            )
        if "full" in within:  # what a cheaper preset is better by is noise
            return self.token_lengths("full")
        f1 = {name: self.length_presets[name].get("validation", {}).get("f1") for name in within}
        best = max(within, key=shares.get if None in f1.values() else f1.get)
        return self.token_lengths(best)

    def macs(self, length_config=None, n=384):
        """Multiply-accumulates of the layers for one row of `n` real tokens, by formula (`int`).

        Embeddings, scorers and head are not counted. With `"attention"` significance a layer that n_in tokens enter and
        n_out leave costs 4 n_in d^2 + 2 n_in^2 d + 2 n_out d d_ff; with `"learned"`,
        2 n_in d^2 + 2 n_out d^2 + 2 n_in n_out d + 2 n_out d d_ff.
        """
        lengths = self.token_lengths(length_config)
        d, d_ff = self.hidden_size, self.intermediate_size
        total, n_in = 0, n
        for layer in range(self.num_hidden_layers):
            n_out = lengths.kept(layer, n)
            queries = n_in if self.significance == "attention" else n_out
            total += 2 * n_in * d * d + 2 * queries * d * d + 2 * n_in * queries * d + 2 * n_out * d * d_ff
            n_in = n_out
        return total

    def macs_share(self, length_config=None, n=384):
        """MACs of `length_config` as a share of `"full"`'s, for one row of `n` real tokens (`float`)."""
        return self.macs(length_config, n) / self.macs("full", n)

    def checked_presets(self, presets):
        """`presets` and `"full"`; raises a [`ValueError`] that names what is wrong with one."""
        full = [1.0] * self.num_hidden_layers
        require("length_presets", presets, presets is None or isinstance(presets, dict), "a dict")
        presets = {"full": {"length_config": full}, **(presets or {})}
        for name, preset in presets.items():
            require("a preset's name", name, is_plain_name(name), "no path: a str without / \\ : and ..")
            legal = isinstance(preset, dict) and "length_config" in preset
            require(f"preset {name!r}", preset, legal, "a dict with a 'length_config'")
            self._read_entries(preset["length_config"], f"preset {name!r}")
            validation = preset.get("validation", {})
            require(f"validation of preset {name!r}", validation, isinstance(validation, dict), "a dict")
            f1 = validation.get("f1", 0)
            require(f"validation f1 of preset {name!r}", f1, is_number(f1) and 0 <= f1 <= 100, "a number in [0, 100]")
        require("preset 'full'", presets["full"]["length_config"], presets["full"]["length_config"] == full, full)
        return presets


def read_presets(path, num_hidden_layers):
    """What stands under `"presets"` in a [`PRESETS_FILE`], a `dict`.

    Raises:
        ValueError: it is no such file, or another number of layers'.
    """

    def unique(pairs):
        repeated = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        if repeated:
            raise ValueError(f"{repeated[0]!r} stands twice in one object")
        return dict(pairs)

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    presets = content.get("presets") if isinstance(content, dict) else None
    if not isinstance(presets, dict):
        raise ValueError(f"{path} has no object 'presets'")
    if content.get("num_hidden_layers") != num_hidden_layers:
        raise ValueError(
            f"num_hidden_layers is {content.get('num_hidden_layers')!r} in {path}, {num_hidden_layers!r} in config.json"
        )
    return presets


def is_plain_name(name):
    """Whether a name out of a file is a name and no path: a str without / \\ : and .., safe to join to a folder."""
    return isinstance(name, str) and bool(name.strip(".")) and not re.search(r"[/\\:\x00-\x1f]|\.\.", name)


def is_number(value, kind=Real):
    """Whether `value` is of `kind`, booleans not being numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def is_finite(value):
    return is_number(value) and math.isfinite(value)


def require_answerability(threshold, calibration):
    """Raises a [`ValueError`] unless these are a model's `no_answer_threshold` and `answerable_calibration`."""
    require("no_answer_threshold", threshold, threshold is None or is_finite(threshold), "None or a finite number")
    legal = isinstance(calibration, list) and len(calibration) == 2 and all(map(is_finite, calibration))
    legal = calibration is None or (legal and calibration[0] > 0)
    require("answerable_calibration", calibration, legal, "None or a list of two finite numbers, the first above 0")


def require(name, value, legal, accepted):
    """Raises a [`ValueError`] that says what `name` is and what is accepted, unless `value` is `legal`."""
    if not legal:
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected {accepted}")
