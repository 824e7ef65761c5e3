"""What the writer of a target format is given."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dlm.models.architecture import Architecture


@dataclass(frozen=True)
class ExportRequest:
    """One export.

    Attributes:
        architecture: The model's.
        dtype: Type of the stored tensors.
        tokenizer_folder: Where the tokenizer's files are.
        block_size: Block size that the model was trained with; None for autoregressive models.
        mask_token_id: Id of the MASK token; None for autoregressive models.
        dynamic_threshold: Confidence threshold recommended to engines that serve the folder.
        shifted: Whether logits at position i predict token i + 1 of a diffusion model.
    """

    architecture: Architecture
    dtype: torch.dtype
    tokenizer_folder: Path | None
    block_size: int | None
    mask_token_id: int | None
    dynamic_threshold: float
    shifted: bool
