"""Keys of tokens: what random draws inside layers (dropout) depend on."""

from dataclasses import replace

import torch

from megatron_dlm.config.schema import Config
from megatron_dlm.seeding import keyed_generator
from megatron_dlm.types.document import Document


def with_token_keys(
    document: Document, config: Config, sample_index: int, iteration: int
) -> Document:
    """The document with a key for each token, if the layers have dropout.

    Args:
        document: One sample of an update.
        config: Has the dropout probability.
        sample_index: Index of the sample; with the update, decides the keys.
        iteration: Updates done before this one.
    """
    if config.lora.lora_dropout == 0:
        return document
    generator = keyed_generator(config.data.seed, sample_index, iteration, "token keys")
    keys = torch.randint(0, 2**31 - 1, (len(document.token_ids),), generator=generator)
    return replace(document, keys=keys.int())
