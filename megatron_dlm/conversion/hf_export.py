"""Megatron to Hugging Face: streams the weights of a model, possibly parallel, to a folder.

Rank 0 writes. The other ranks send it the shards of one tensor at a time, so its memory holds one
tensor and the file being filled, never the whole model.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_dlm.conversion.formats import (
    AUTOREGRESSIVE,
    FORMATS_WITH_HEAD,
    TARGET_FORMATS,
    ExportRequest,
)
from megatron_dlm.conversion.gathering import ShardGatherer
from megatron_dlm.conversion.hf_checkpoint import HFCheckpointWriter, is_finite
from megatron_dlm.conversion.model_card import MODEL_CARD, Provenance, model_card
from megatron_dlm.conversion.publishing import is_writer, published_folder
from megatron_dlm.conversion.tokenizer_files import has_chat_template
from megatron_dlm.errors import bad_value
from megatron_dlm.models.architecture import Architecture, parameter_mappings
from megatron_dlm.models.families.parameters import HEAD, ParameterMapping, hf_tensor_shapes
from megatron_dlm.models.model_parameters import TIED_EMBEDDING, local_parameters
from megatron_dlm.output_file import check_space
from megatron_dlm.parallel import errors_on_all_ranks
from megatron_dlm.rollout.strategies.low_confidence_dynamic import DEFAULT_THRESHOLD

# Bytes of one safetensors file, as transformers writes them.
MAX_SHARD_SIZE = 5 * 10**9


def export_hf(
    model: torch.nn.Module,
    architecture: Architecture,
    folder: str | Path,
    *,
    format: str = "sdar",
    tokenizer_folder: str | Path | None = None,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    dynamic_threshold: float = DEFAULT_THRESHOLD,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    provenance: Provenance | None = None,
) -> None:
    """Write a model as a Hugging Face folder; a collective call of all ranks.

    The folder is filled under a temporary name and renamed, so it is complete or absent.

    Args:
        model: This rank's part of a `StageModel`, possibly wrapped for training.
        architecture: Architecture of the model; its config.json has the kind of diffusion model.
        folder: Folder to write.
        format: `sdar` (block diffusion; `sdar_moe` for mixtures of experts), `a2d-<family>`
            (dense, either attention), `rnd1` (full attention, shifted, mixture of experts) or
            `autoregressive` (under the model type of its family).
        tokenizer_folder: Folder of the tokenizer's files; needed by all but `autoregressive`.
        block_size: Block size that the model was trained with; needed by `sdar`. Under full
            attention, the one to decode with, if any.
        mask_token_id: Id of the MASK token; needed by all but `autoregressive`.
        dynamic_threshold: Confidence threshold recommended to engines that serve the folder.
        dtype: Type of the stored tensors; None keeps the model's.
        max_shard_size: Bytes of one safetensors file.
        overwrite: Replace an existing folder.
        provenance: Where the weights come from, for the model card; None: nothing is known.

    Raises:
        UserError: On every rank: unknown format, a model that the format cannot express, a missing
            or unfit tokenizer, a folder that exists, too little space, or weights that are not all
            finite.
    """
    target = Path(folder)
    tensors = model_tensors(model, architecture, format)
    if format in FORMATS_WITH_HEAD:
        architecture = replace(architecture, tie_word_embeddings=False)
    dtype = dtype or next(model.parameters()).dtype
    shapes = hf_tensor_shapes(parameter_mappings(architecture, format != AUTOREGRESSIVE))

    def prepare(folder: Path) -> None:
        if format not in TARGET_FORMATS:
            raise bad_value(
                "--target-format", format, "is unknown", f"use {' or '.join(TARGET_FORMATS)}"
            )
        request = ExportRequest(
            architecture=architecture,
            dtype=dtype,
            tokenizer_folder=None if tokenizer_folder is None else Path(tokenizer_folder),
            block_size=block_size,
            mask_token_id=mask_token_id,
            dynamic_threshold=dynamic_threshold,
        )
        TARGET_FORMATS[format](request, folder)
        card = model_card(
            architecture,
            name=target.resolve().name,
            format=format,
            dtype=dtype,
            block_size=block_size,
            mask_token_id=mask_token_id,
            dynamic_threshold=dynamic_threshold,
            has_chat_template=has_chat_template(folder),
            provenance=provenance,
        )
        (folder / MODEL_CARD).write_text(card, encoding="utf-8")
        needed = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        check_space(target.parent, "--save", "the model", needed)

    with errors_on_all_ranks():
        for local in local_parameters(model, architecture):
            if not is_finite(local.parameter.detach()):
                names = ", ".join(local.mapping.hf)
                problem = f"the model's {names} would hold NaN or infinite values"
                raise bad_value("--save", str(folder), problem, "export an earlier checkpoint")

    with published_folder(target, overwrite, prepare) as temporary:
        writer = None
        if is_writer():
            writer = HFCheckpointWriter(temporary, shapes, dtype, max_shard_size)
        for name, tensor in tensors:
            if writer is not None:
                writer.add(name, tensor)
        if writer is not None:
            writer.close()


def model_tensors(
    model: torch.nn.Module, architecture: Architecture, format: str
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder in a format, one after the other; all ranks iterate to the end.

    Args:
        model: See `export_hf`.
        architecture: Likewise.
        format: Likewise.

    Yields:
        On rank 0, name and values, in the model's type; on other ranks, which send their shards
        meanwhile, nothing.
    """
    gatherer = ShardGatherer(
        {
            (local.mapping.megatron, local.shard): (local.parameter, local.num_shards)
            for local in local_parameters(model, architecture)
        }
    )
    head = TIED_EMBEDDING if architecture.tie_word_embeddings else None
    if format in FORMATS_WITH_HEAD:
        architecture = replace(architecture, tie_word_embeddings=False)
    mappings = parameter_mappings(architecture, format != AUTOREGRESSIVE)
    return _gathered_tensors(mappings, gatherer, head)


def _gathered_tensors(
    mappings: list[ParameterMapping], gatherer: ShardGatherer, head: str | None
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the folder in model order, on the writer; other ranks only send.

    Args:
        mappings: All parameters, under the names that the format has.
        gatherer: Holds the model's shards.
        head: The parameter that is also the output layer, if the model has tied embeddings.
    """
    written: set[str] = set()
    for mapping in mappings:
        # The output layer of a tied model is a copy of the embedding, which came first.
        if written.issuperset(mapping.hf):
            continue
        written.update(mapping.hf)
        is_head = HEAD in mapping.hf
        shards = gatherer.gather(head if is_head and head else mapping.megatron)
        if shards:
            yield from zip(mapping.hf, mapping.layout.join(shards), strict=True)
