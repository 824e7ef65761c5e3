"""Megatron to Hugging Face: streams the weights of a live, possibly parallel model into a folder.

Rank 0 writes. Tensor by tensor, the ranks that hold its shards send them there, so what is in
memory is one tensor and the file being filled, never the model.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.conversion.formats import TARGET_FORMATS, ExportRequest
from megatron_dlm.conversion.hf_checkpoint import HFCheckpointWriter
from megatron_dlm.conversion.model_parameters import LocalParameter, local_parameters
from megatron_dlm.conversion.qwen3 import hf_tensor_shapes, qwen3_mappings
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.models.architecture import Architecture

# Bytes of one safetensors file, as transformers writes them.
MAX_SHARD_SIZE = 5 * 10**9

# Global rank of the process that writes.
WRITER = 0


def export_hf(
    model: torch.nn.Module,
    architecture: Architecture,
    folder: str | Path,
    *,
    format: str = "sdar",
    tokenizer_folder: str | Path | None = None,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    dynamic_threshold: float = 0.9,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Write a model as a Hugging Face folder; a collective call of all ranks.

    The folder appears complete or not at all: it is filled under a temporary name and renamed.

    Args:
        model: This rank's part of a `DiffusionGPTModel`, possibly wrapped for training.
        architecture: What it was built from; its config.json says how a diffusion model attends
            and what its logits predict.
        folder: Where to.
        format: `sdar` (block diffusion; `sdar_moe` for mixtures of experts), `a2d-qwen3` (full
            attention, dense), `rnd1` (full attention, shifted, mixture of experts) or `qwen3`
            (autoregressive; `qwen3_moe`).
        tokenizer_folder: Where the tokenizer's files are; needed by all but `qwen3`.
        block_size: Block size that the model was trained with; needed by `sdar`. Under full
            attention, the one to decode with, if any.
        mask_token_id: Id of the MASK token; needed by all but `qwen3`.
        dynamic_threshold: Confidence threshold recommended to engines that serve the folder.
        dtype: Type of the stored tensors; None keeps the model's.
        max_shard_size: Bytes of one safetensors file.
        overwrite: Replace an existing folder.

    Raises:
        UserError: On every rank: unknown format, a model that the format cannot express, a missing
            or unfit tokenizer, or a folder that exists.
    """
    target = Path(folder)
    own = {
        (local.mapping.megatron, local.shard): local
        for local in local_parameters(model, architecture)
    }
    dtype = dtype or next(model.parameters()).dtype
    temporary = target.with_name(f".{target.name}.incomplete-{os.getpid()}")

    def prepare() -> None:
        if format not in TARGET_FORMATS:
            raise bad_value(
                "--target-format", format, "is unknown", f"use {' or '.join(TARGET_FORMATS)}"
            )
        if target.exists() and not overwrite:
            raise bad_value("--save", str(folder), "already exists", "choose a new folder")
        request = ExportRequest(
            architecture=architecture,
            dtype=dtype,
            tokenizer_folder=None if tokenizer_folder is None else Path(tokenizer_folder),
            block_size=block_size,
            mask_token_id=mask_token_id,
            dynamic_threshold=dynamic_threshold,
        )
        temporary.mkdir(parents=True)
        TARGET_FORMATS[format](request, temporary)

    with _removed_on_failure(temporary):
        _on_writer(prepare, folder)
        writer = None
        if dist.get_rank() == WRITER:
            shapes = hf_tensor_shapes(qwen3_mappings(architecture))
            writer = HFCheckpointWriter(temporary, shapes, dtype, max_shard_size)
        for name, tensor in _gathered_tensors(architecture, own):
            if writer is not None:
                writer.add(name, tensor)
        if writer is not None:
            writer.close()
            _publish(temporary, target)
    dist.barrier()


def _gathered_tensors(
    architecture: Architecture, own: dict[tuple[str, int], LocalParameter]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the folder in model order, on the writer; other ranks only send."""
    rank = dist.get_rank()
    manifest = {key: (tuple(p.parameter.shape), p.num_shards) for key, p in own.items()}
    manifests: list[dict[tuple[str, int], tuple[tuple[int, ...], int]]] = [
        {}
    ] * dist.get_world_size()
    dist.all_gather_object(manifests, manifest)
    # Data-parallel replicas hold the same shard: the lowest rank sends it.
    holders: dict[tuple[str, int], int] = {}
    for holder, held in reversed(list(enumerate(manifests))):
        holders.update(dict.fromkeys(held, holder))

    written: set[str] = set()
    for mapping in qwen3_mappings(architecture):
        # The output layer of a tied model is a copy of the embedding, which came first.
        if written.issuperset(mapping.hf):
            continue
        written.update(mapping.hf)
        first = manifests[holders[mapping.megatron, 0]][mapping.megatron, 0]
        shards = []
        for shard in range(first[1]):
            key = (mapping.megatron, shard)
            holder = holders[key]
            if holder == rank:
                parameter = own[key].parameter.detach()
                if rank == WRITER:
                    shards.append(parameter)
                else:
                    dist.send(parameter.contiguous(), dst=WRITER)
            elif rank == WRITER:
                buffer = torch.empty(
                    manifests[holder][key][0],
                    dtype=next(iter(own.values())).parameter.dtype,
                    device=platform.device(),
                )
                dist.recv(buffer, src=holder)
                shards.append(buffer)
        if rank == WRITER:
            yield from zip(mapping.hf, mapping.layout.join(shards), strict=True)


def _on_writer(action: Callable[[], None], folder: str | Path) -> None:
    """Run something on the writer only; what the user did wrong is raised on every rank."""
    outcome: list[Any] = [None]
    if dist.get_rank() == WRITER:
        try:
            action()
        except UserError as error:
            outcome = [str(error)]
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            outcome = [str(bad_value("--save", str(folder), problem, "choose another folder"))]
    dist.broadcast_object_list(outcome, src=WRITER)
    if outcome[0] is not None:
        raise UserError(outcome[0])


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _publish(temporary: Path, target: Path) -> None:
    """Rename the finished folder to its place; what was there is deleted only afterwards."""
    if not target.exists():
        temporary.rename(target)
        return
    old = temporary.with_name(f".{target.name}.replaced-{os.getpid()}")
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old)
