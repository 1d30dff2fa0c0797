import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch
import transformers

from qualaminilm.configuration_qualaminilm import QuaLAMiniLMConfig

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture(scope="session")
def validation_questions():
    """Validation questions of every training file, a `datasets.Dataset`; skips where the data is missing."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is missing")
    import datasets

    from recipe.data import read_questions

    names = (
        "squadshifts-new-wiki",
        "squadshifts-amazon-reviews",
        "squadshifts-reddit",
        "afriqa-en",
        "fairytaleqa-explicit",
    )
    return datasets.concatenate_datasets([read_questions(DATA / f"{name}.json", "validation") for name in names])


def tiny_config(**kwargs):
    """A configuration small enough to be computed by hand."""
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 66,
        "initializer_range": 0.4,
        "significance": "attention",
    }
    if kwargs.get("embedding_type") == "roberta":
        sizes |= {"pad_token_id": 1, "type_vocab_size": 1}
    return QuaLAMiniLMConfig(**(sizes | kwargs))


def right_padded(config, lengths, seed=0):
    """Random input_ids and attention_mask of rows of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return input_ids.masked_fill(attention_mask == 0, config.pad_token_id), attention_mask
