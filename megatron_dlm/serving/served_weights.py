"""The weights of the rollout server, replaced in place.

Tensors have the names and shapes of a Hugging Face checkpoint. Those that make up one parameter of
the model (queries, keys and values, say) may come in several buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.models.families.parameters import HEAD
from megatron_dlm.models.model_parameters import LocalParameter, local_parameters
from megatron_dlm.rollout.external.weight_group import Bucket, WeightGroup, join_weight_group
from megatron_dlm.serving.api_error import ApiError

GROUP_TIMEOUT = timedelta(minutes=10)

INCOMPLETE = "incomplete"
"""Version of weights that are partly those of one update and partly of the next."""


class ServedWeights:
    """The weights of a model on one rank; but for the groups, of the decoding thread only.

    Args:
        model: The model.
        architecture: What it was built from.
        on_change: Called before weights are written: what was computed with others is useless.
        readable: Folder below which weights may be read; None: nowhere.

    Attributes:
        version: What the last update called itself; `INCOMPLETE` until its last bucket.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        architecture: Architecture,
        on_change: Callable[[], None],
        readable: Path | None = None,
    ) -> None:
        self._readable = None if readable is None else readable.resolve()
        self.version = "default"
        self._on_change = on_change
        self._model = model
        self._architecture = architecture
        self._parameters: dict[str, LocalParameter] = {
            name: local
            for local in local_parameters(model, architecture)
            for name in local.mapping.hf
        }
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._groups: dict[str, WeightGroup] = {}
        self._is_open = False

    def join(self, name: str, address: str, port: int, rank: int, size: int, backend: str) -> None:
        """Meet the process that sends weights.

        Raises:
            ApiError: There is a group of that name, or nobody was met.
        """
        if name in self._groups:
            raise ApiError(400, f"group_name: {name!r} exists; destroy it first")
        if backend != platform.collective_backend():
            expected = platform.collective_backend()
            raise ApiError(400, f"backend: this server's device needs {expected}, not {backend}")
        try:
            self._groups[name] = join_weight_group(
                name, address, port, rank=rank, size=size, backend=backend, timeout=GROUP_TIMEOUT
            )
        except (RuntimeError, ValueError) as error:
            raise ApiError(400, f"master_address: {address}:{port} was not met: {error}") from error

    def leave(self, name: str) -> None:
        """Forget a group.

        Raises:
            ApiError: There is none of that name.
        """
        if self._groups.pop(name, None) is None:
            raise ApiError(400, f"group_name: there is no {name!r}")

    def begin_update(self) -> None:
        """Open an update: from now on buckets are taken.

        Raises:
            ApiError: One is open.
        """
        if self._is_open:
            raise ApiError(400, "an update of weights is open; end_weight_update first")
        self._is_open = True

    def end_update(self) -> None:
        """Close the update that is open.

        Raises:
            ApiError: None is.
        """
        if not self._is_open:
            raise ApiError(400, "no update of weights is open; begin_weight_update first")
        self._is_open = False

    def flush(self) -> None:
        """Forget what was computed with these weights."""
        self._on_change()

    def load_folder(self, folder: str, version: str | None) -> None:
        """Read the weights of a Hugging Face folder.

        Raises:
            ApiError: It does not lie where the server may read.
            UserError: It does not hold the weights of this model.
        """
        if self._readable is None:
            problem = "this server reads no folders; start it with --weights-path"
            raise ApiError(403, f"model_path: {problem}", param="model_path")
        if not Path(folder).resolve().is_relative_to(self._readable):
            problem = f"{folder!r} is not below --weights-path {str(self._readable)!r}"
            raise ApiError(403, f"model_path: {problem} of this server", param="model_path")
        self._on_change()
        self.version = INCOMPLETE
        load_hf_weights(self._model, self._architecture, folder, "model_path")
        self._parts.clear()
        self._name(version)

    @torch.no_grad()
    def receive(self, group: str, bucket: Bucket, flat: bool, version: str | None) -> None:
        """Take one bucket of tensors from a group.

        Args:
            group: Its name.
            bucket: What is sent.
            flat: Whether it comes as one tensor of bytes, else tensor by tensor.
            version: Name of the weights that are complete with it; None: there is more to come.

        Raises:
            ApiError: No update is open, there is no such group, or the tensors are not the model's.
        """
        if not self._is_open:
            raise ApiError(400, "no update of weights is open; begin_weight_update first")
        if group not in self._groups:
            raise ApiError(400, f"group_name: there is no {group!r}; init_weights_update_group")
        tensors = self._groups[group].receive(bucket, flat=flat, device=platform.device())
        self._on_change()
        self.version = INCOMPLETE
        try:
            self._load(tensors)
        except ApiError:
            self._parts.clear()
            raise
        self._name(version)

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            if name == HEAD and self._architecture.tie_word_embeddings:
                continue  # it comes under the embedding's name too
            local = self._parameters.get(name)
            if local is None:
                raise ApiError(400, f"names: the model has no {name}")
            parts = self._parts.setdefault(local.mapping.megatron, {})
            parts[name] = tensor
            if len(parts) < len(local.mapping.hf):
                continue
            sources = [parts[part] for part in local.mapping.hf]
            shard = local.mapping.layout.read(sources, local.parameter.shape, local.shard)
            if shard.shape != local.parameter.shape:
                shapes = f"{list(shard.shape)} for {list(local.parameter.shape)}"
                raise ApiError(400, f"shapes: {name} has another shape ({shapes})")
            local.parameter.copy_(shard)
            del self._parts[local.mapping.megatron]

    def _name(self, version: str | None) -> None:
        if version is None:
            return
        if self._parts:
            name = next(iter(next(iter(self._parts.values()))))
            self._parts.clear()
            raise ApiError(400, f"names: {name} came without the tensors that it belongs to")
        self.version = version
