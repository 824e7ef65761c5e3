"""The interface of a folder of weights, for packages that only load from it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_dlm.models.architecture import Architecture
from megatron_dlm.types.diffusion_kind import DiffusionKind

if TYPE_CHECKING:
    import torch


class ModelWeights(Protocol):
    """Describes a model that is on disk or elsewhere; see `training.model_source`."""

    @property
    def path(self) -> Path | str:
        """The path, or the address, that the user named."""

    @property
    def field(self) -> str:
        """The flag it was named with."""

    @property
    def hf_folder(self) -> Path:
        """Folder with config.json and, usually, the tokenizer."""

    @property
    def is_megatron(self) -> bool:
        """Whether the folder is a Megatron checkpoint."""

    @property
    def architecture(self) -> Architecture:
        """Read from config.json."""

    @property
    def diffusion_kind(self) -> DiffusionKind | None:
        """Kind of diffusion model, from config.json; None for an autoregressive model."""

    @property
    def is_autoregressive(self) -> bool:
        """Whether config.json describes an autoregressive model."""

    def fingerprint(self) -> str:
        """SHA-256 of the weights; independent of the folder's path."""


class LoadableWeights(ModelWeights, Protocol):
    """A model on disk, which can be loaded into memory."""

    def load_into(
        self,
        model: "torch.nn.Module",
        *,
        place: "Callable[[torch.Tensor, torch.Tensor, Iterator[torch.Tensor]], None] | None" = None,
    ) -> None:
        """Load the weights into this rank's part of a model; all ranks call this.

        Args:
            model: The model.
            place: Takes each parameter, its values, and those of the other shards of the same
                tensor; of a Megatron checkpoint only parameters on meta. None: values are copied
                into the parameter.
        """
