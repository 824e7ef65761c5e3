"""Where a model's weights, architecture and tokenizer come from: one path, two kinds of folder."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from megatron_dlm.conversion.hf_tensors import HFTensors
from megatron_dlm.conversion.weight_sizes import check_hf_sizes, check_megatron_sizes
from megatron_dlm.data.fingerprint import add_ends, add_samples
from megatron_dlm.errors import bad_value
from megatron_dlm.models.architecture import (
    GENERATION_CONFIG,
    SGLANG_CONFIG_FILE,
    Architecture,
    read_architecture,
    read_diffusion_kind,
    states_attention,
)
from megatron_dlm.regular_file import read_regular
from megatron_dlm.training.manifest import MANIFEST
from megatron_dlm.training.run_folder import HF_FOLDER, find_checkpoint
from megatron_dlm.types.diffusion_kind import DiffusionKind

if TYPE_CHECKING:
    import torch

    from megatron_dlm.conversion.hf_import import Place
    from megatron_dlm.training.checkpointing import AdapterUse

StatedAttention = Literal["full", "block_causal"]
"""What a flag may say of a model whose config.json does not say how it attends."""


@dataclass(frozen=True)
class ModelSource:
    """A folder that a model can be loaded from.

    Attributes:
        path: What the user named.
        field: The flag it was named with.
        hf_folder: Folder with config.json and, usually, the tokenizer.
        is_megatron: Whether the weights are a Megatron checkpoint (else Hugging Face safetensors).
        architecture: Read from config.json.
        verify: Whether a Megatron checkpoint is compared with its manifest before it is loaded.
    """

    path: Path
    field: str
    hf_folder: Path
    is_megatron: bool
    architecture: Architecture
    verify: bool = True

    @property
    def diffusion_kind(self) -> DiffusionKind | None:
        """What config.json says of attention and prediction; None for an autoregressive model.

        Raises:
            UserError: It says something unknown.
        """
        where = str(self.hf_folder / "config.json")
        return read_diffusion_kind(self.architecture.hf_config, where)

    @property
    def is_autoregressive(self) -> bool:
        """Whether config.json describes no diffusion model."""
        return self.diffusion_kind is None

    def attending(
        self, attention_pattern: StatedAttention | None, block_size: int | None
    ) -> "ModelSource":
        """The same weights under the attention that a flag states, for a config.json that does not.

        Args:
            attention_pattern: `full` or `block_causal`; None leaves everything as it is.
            block_size: Of the latter; None: config.json's, if it has one.

        Raises:
            UserError: config.json states another attention, or the model is autoregressive.
        """
        if attention_pattern is None:
            return self
        hf_config = self.architecture.hf_config
        if not states_attention(hf_config):
            added: dict[str, Any] = {"attention_pattern": attention_pattern}
            if block_size is not None:
                added["block_size"] = block_size
            architecture = replace(self.architecture, hf_config=hf_config | added)
            return replace(self, architecture=architecture)
        stated = self.diffusion_kind
        if stated is not None and stated.attention_pattern == attention_pattern:
            return self
        found = f"{stated.attention_pattern} attention" if stated else "an autoregressive model"
        raise bad_value(
            "--attention-pattern",
            attention_pattern,
            f"{self.hf_folder / 'config.json'} states {found}",
            "leave it out, or repair config.json",
        )

    def fingerprint(self) -> str:
        """SHA-256 of config.json and of the names, sizes and ends of the files of weights.

        It follows the weights, not the place of their folder.
        """
        digest = hashlib.sha256((self.hf_folder / "config.json").read_bytes())
        weights = (
            self.hf_folder.parent.glob("*.distcp")
            if self.is_megatron
            else self.hf_folder.glob("*.safetensors")
        )
        for file in sorted(weights):
            digest.update(file.name.encode())
            add_ends(digest, file)
        return digest.hexdigest()

    def content_fingerprint(self) -> str:
        """SHA-256 that tells two checkpoints of one run apart, whichever of their layers differ.

        Of config.json and the manifest; without one, of samples all through the files of weights.
        """
        digest = hashlib.sha256((self.hf_folder / "config.json").read_bytes())
        manifest = self.hf_folder.parent / MANIFEST
        if self.is_megatron and manifest.is_file():
            digest.update(manifest.read_bytes())
            return digest.hexdigest()
        for file in self.files():
            digest.update(file.name.encode())
            add_samples(digest, file)
        return digest.hexdigest()

    def files(self) -> list[Path]:
        """The files that the model is read from; a tokenizer's are not among them."""
        if self.is_megatron:
            return [path for path in self.hf_folder.parent.rglob("*") if path.is_file()]
        names = ("*.safetensors", "*.safetensors.index.json", "config.json", GENERATION_CONFIG)
        return [path for name in names for path in self.hf_folder.glob(name)]

    def load_into(
        self,
        model: "torch.nn.Module",
        adapters: "AdapterUse" = "merge",
        place: "Place | None" = None,
    ) -> None:
        """Fill this rank's part of a model; all ranks call this.

        Args:
            model: Without adapters.
            adapters: What becomes of those of a run; see `load_weights`.
            place: Takes tensors one by one; see `LoadableWeights`.

        Raises:
            UserError: The weights do not fit the model; raised on all ranks.
        """
        # Not at the top: what a folder holds can be said without PyTorch and Megatron-Core.
        from megatron_dlm.conversion.hf_import import load_hf_weights
        from megatron_dlm.parallel import errors_on_all_ranks
        from megatron_dlm.training.checkpointing import load_weights

        if self.is_megatron:
            load_weights(self.path, model, self.field, adapters, self.verify, place)
        else:
            with errors_on_all_ranks():
                load_hf_weights(model, self.architecture, self.hf_folder, self.field, place)


def open_model_source(path: str, field: str, verify: bool = True) -> ModelSource:
    """Find out what a folder holds, reading no weights but their shapes.

    Args:
        path: A Hugging Face folder, a Megatron run folder or one of its iteration folders.
        field: The flag it was named with, for error messages.
        verify: See `ModelSource`.

    Raises:
        UserError: There is no such folder, it holds neither kind, its config.json is unusable or
            does not belong to its weights, or these are quantised.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise bad_value(field, path, "there is no such folder", "name a model or run folder")
    if (folder / "config.json").is_file():
        has_weights = any(folder.glob("*.safetensors"))
        if not has_weights:
            raise bad_value(
                field,
                path,
                "holds config.json but no *.safetensors",
                "name a complete model folder",
            )
        architecture = read_architecture(folder, field)
        check_hf_sizes(architecture, HFTensors(folder, field).shapes(), path)
        _check_block_size(architecture, folder / SGLANG_CONFIG_FILE)
        return ModelSource(folder, field, folder, False, architecture)
    checkpoint = find_checkpoint(folder, field)
    hf_folder = checkpoint / HF_FOLDER
    architecture = read_architecture(hf_folder, field)
    check_megatron_sizes(architecture, _megatron_shapes(checkpoint, field), str(checkpoint))
    return ModelSource(folder, field, hf_folder, True, architecture, verify)


def _check_block_size(architecture: Architecture, file: Path) -> None:
    """What serves the folder and what trains it have to mean the same blocks."""
    if not file.is_file():
        return
    try:
        settings = yaml.safe_load(read_regular(file))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise bad_value(str(file), "", "is no YAML file", "repair or remove it") from error
    served = settings.get("block_size") if isinstance(settings, dict) else None
    stated = architecture.hf_config.get("block_size")
    if None not in (served, stated) and served != stated:
        raise bad_value(
            f"{file}: block_size",
            served,
            f"but {architecture.file} says {stated}",
            "write the block size that the model was trained with into both",
        )


def _megatron_shapes(checkpoint: Path, field: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a distributed checkpoint's tensors, of all layers together."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from megatron_dlm.training.checkpoint_metadata import checked_metadata

    metadata = checked_metadata(checkpoint, field)
    return {
        name: tuple(stored.size)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
