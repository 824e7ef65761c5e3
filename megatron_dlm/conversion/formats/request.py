"""The input of the writers of target formats."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dlm.models.architecture import Architecture, read_diffusion_kind
from megatron_dlm.types.diffusion_kind import DiffusionKind


@dataclass(frozen=True)
class ExportRequest:
    """One export.

    Attributes:
        architecture: Architecture of the model.
        dtype: Type of the stored tensors.
        tokenizer_folder: Folder of the tokenizer's files.
        block_size: Block size that the model was trained with or, under full attention, should be
            decoded with; None for none.
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
        """Kind of diffusion model; None for an autoregressive model."""
        return read_diffusion_kind(self.architecture.hf_config)
