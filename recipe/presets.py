"""What stands in a model folder's presets, `length_configs.json`, and how a measurement gets there."""

import json
import math

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig


def parse_length_config(text):
    """A `length_config` as typed: JSON where it is JSON, a preset's name otherwise."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def describe_preset(config, length_config):
    """A preset as it stands in `length_configs.json`, without scores: what follows from its length config."""
    lengths = config.token_lengths(length_config)
    return {
        "length_config": length_config,
        "lengths_at_384": [lengths.kept(layer, 384) for layer in range(config.num_hidden_layers)],
        "macs_at_384": config.macs(length_config),
        # Rounded up, so that {"max_macs": what stands here} admits the preset.
        "macs_share": math.ceil(config.macs_share(length_config) * 1e4) / 1e4,
    }


def describe_scores(scores):
    """F1 and EM as they stand in `length_configs.json`, in percent to two decimals."""
    return {name: round(scores[name], 2) for name in ("f1", "em")}


def without_scores(config, presets):
    """The presets for the configuration's model, without their scores, which were other weights'."""
    return {name: describe_preset(config, preset["length_config"]) for name, preset in presets.items()}


def record_scores(folder, name, split, scores):
    """Writes a preset's scores into the folder's presets."""
    config = QuaLAMiniLMConfig.from_pretrained(folder)
    config.token_lengths(name)
    config.length_presets[name][split] = describe_scores(scores)
    config.save_presets(folder)
