"""What the writer of a target format is given."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dlm.models.architecture import Architecture, read_diffusion_kind
from megatron_dlm.types.diffusion_kind import DiffusionKind


@dataclass(frozen=True)
class ExportRequest:
    """One export.

    Attributes:
        architecture: The model's.
        dtype: Type of the stored tensors.
        tokenizer_folder: Where the tokenizer's files are.
        block_size: Block size that the model was trained with, or, under full attention, that it
            should be decoded with; None: none.
        mask_token_id: Id of the MASK token; None for autoregressive models.
        dynamic_threshold: Confidence threshold recommended to engines that serve the folder.
    """

    architecture: Architecture
    dtype: torch.dtype
    tokenizer_folder: Path | None
    block_size: int | None
    mask_token_id: int | None
    dynamic_threshold: float

    @property
    def diffusion_kind(self) -> DiffusionKind | None:
        """What the model's config.json says of attention and shift; None: autoregressive."""
        return read_diffusion_kind(self.architecture.hf_config)
