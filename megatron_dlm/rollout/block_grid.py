"""Where the blocks of a sequence lie: the grid begins at the first prompt token."""

from torch import Tensor

from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.trajectory import Prompt


def first_block(known_ids: Tensor, config: GenerationConfig) -> int:
    """First position of the block that decoding begins in, after these tokens."""
    length, grid = len(known_ids), config.block_size
    # A response that is decoded as a whole is one block, wherever the prompt ends.
    return length if grid is None else length // grid * grid


def sequence_length(prompt: Prompt, config: GenerationConfig, max_response_length: int) -> int:
    """Positions of a prompt and its longest response, in whole blocks."""
    block_size = config.block_size or max_response_length
    first = first_block(prompt.token_ids, config)
    generated = len(prompt.token_ids) + prompt.response_limit(max_response_length) - first
    return first + -(-generated // block_size) * block_size
