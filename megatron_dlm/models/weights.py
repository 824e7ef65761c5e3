"""A folder of weights, as those see it who only load it."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_dlm.models.architecture import Architecture
from megatron_dlm.types.diffusion_kind import DiffusionKind

if TYPE_CHECKING:
    import torch


class ModelWeights(Protocol):
    """Describes a model on disk and fills one in memory; see `training.model_source`."""

    @property
    def path(self) -> Path:
        """What the user named."""

    @property
    def field(self) -> str:
        """The flag it was named with."""

    @property
    def hf_folder(self) -> Path:
        """Folder with config.json and, usually, the tokenizer."""

    @property
    def is_megatron(self) -> bool:
        """Whether they are a Megatron checkpoint."""

    @property
    def architecture(self) -> Architecture:
        """Read from config.json."""

    @property
    def diffusion_kind(self) -> DiffusionKind | None:
        """What config.json says of attention and prediction; None for an autoregressive model."""

    @property
    def is_autoregressive(self) -> bool:
        """Whether config.json describes no diffusion model."""

    def fingerprint(self) -> str:
        """SHA-256 that follows the weights, not the place of their folder."""

    def load_into(self, model: "torch.nn.Module") -> None:
        """Fill this rank's part of a model; all ranks call this."""
