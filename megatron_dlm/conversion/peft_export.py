"""Adapters of a run as a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.

Names are those of the base model's linear layers, as its Hugging Face folder has them. Layers that
share one of Megatron's fused layers share its A: each of them gets a copy, and its own rows of B.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.conversion.gathering import ShardGatherer
from megatron_dlm.conversion.hf_checkpoint import write_safetensors
from megatron_dlm.conversion.hf_import import check_weights_equal
from megatron_dlm.conversion.model_card import MODEL_CARD, Provenance, model_card
from megatron_dlm.conversion.publishing import is_writer, published_folder
from megatron_dlm.errors import bad_value
from megatron_dlm.models.architecture import Architecture, parameter_mappings
from megatron_dlm.models.lora import local_adapters
from megatron_dlm.models.parameter_layout import RowParallel
from megatron_dlm.models.weights import ModelWeights
from megatron_dlm.parallel import errors_on_all_ranks

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_BASE_REMEDY = (
    "write the weights under the adapters with --without-adapters and a --target-format that suits "
    "the model, and name that folder"
)
# Settings of the network that do not show in the shapes of tensors.
_COMPARED = (
    "family",
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "layernorm_epsilon",
    "rotary_base",
    "rope_scaling",
    "moe_router_topk",
    "norm_topk_prob",
)


@dataclass(frozen=True)
class AdapterSettings:
    """Settings of a run's adapters, from its flat configuration.

    Attributes:
        rank: r.
        alpha: They are scaled by alpha / r.
        dropout: Probability of their input's dropout in training.
    """

    rank: int
    alpha: float
    dropout: float

    @classmethod
    def of_run(cls, run_config: dict[str, Any], path: str) -> "AdapterSettings":
        """Read the settings.

        Raises:
            UserError: The run has no adapters.
        """
        rank = run_config.get("lora_rank")
        if rank is None:
            raise bad_value(
                "--load", path, "holds no adapters", "name a run that was trained with --lora-rank"
            )
        return cls(rank, run_config["lora_alpha"] or rank, run_config.get("lora_dropout") or 0.0)


def check_base_model(base: ModelWeights, source: ModelWeights) -> None:
    """Check that a folder describes a run's model without its adapters; reads no weights.

    Raises:
        UserError: It does not.
    """
    path = str(base.path)
    if base.is_megatron:
        raise bad_value(base.field, path, "is no Hugging Face folder", _BASE_REMEDY)
    for name in _COMPARED:
        found = getattr(base.architecture, name)
        if found != (expected := getattr(source.architecture, name)):
            problem = f"has {name} {found}, the run {expected}"
            raise bad_value(base.field, path, problem, _BASE_REMEDY)
    if base.diffusion_kind != source.diffusion_kind:
        problem = (
            "is an autoregressive model, and the run's is not"
            if base.is_autoregressive
            else "attends or predicts otherwise than the run's model does"
        )
        raise bad_value(base.field, path, problem, _BASE_REMEDY)
    sizes = [model.architecture.hf_config.get("block_size") for model in (base, source)]
    if sizes[0] != sizes[1]:
        problem = f"has block_size {sizes[0]}, the run {sizes[1]}"
        raise bad_value(base.field, path, problem, _BASE_REMEDY)


def export_peft(
    model: torch.nn.Module,
    architecture: Architecture,
    folder: str | Path,
    *,
    adapters: AdapterSettings,
    base: ModelWeights,
    dtype: torch.dtype,
    overwrite: bool = False,
    provenance: Provenance | None = None,
) -> None:
    """Write the adapters of a model; a collective call of all ranks.

    Args:
        model: This rank's part of a model with its adapters attached.
        architecture: Architecture of the model.
        folder: Folder to write.
        adapters: Settings of the adapters.
        base: Hugging Face folder of the base model, checked by `check_base_model`.
        dtype: Type of the stored tensors.
        overwrite: Replace an existing folder.
        provenance: Where the weights come from, for the model card; None: nothing is known.

    Raises:
        UserError: On every rank: the base model has other weights, or the folder exists.
    """
    # Layers have the names of the base model's folder.
    named = replace(architecture, hf_config=base.architecture.hf_config)
    with errors_on_all_ranks():
        check_weights_equal(model, named, base.path, base.field, _BASE_REMEDY)
    gatherer = ShardGatherer(
        {
            (local.name, local.shard): (local.tensor, local.num_shards)
            for local in local_adapters(model)
        }
    )
    with published_folder(Path(folder), overwrite, lambda _: None) as temporary:
        tensors, layers = {}, set()
        for layer, lora_a, lora_b in _gathered_adapters(named, gatherer):
            name = f"base_model.model.{layer}"
            # A copy: safetensors refuses tensors that share memory.
            tensors[f"{name}.lora_A.weight"] = lora_a.to("cpu", dtype, copy=True).contiguous()
            tensors[f"{name}.lora_B.weight"] = lora_b.to("cpu", dtype, copy=True).contiguous()
            layers.add(layer.rpartition(".")[2])
        if is_writer():
            write_safetensors(tensors, temporary / WEIGHTS_FILE)
            config = _peft_config(adapters, base, sorted(layers))
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
            card = model_card(
                architecture,
                name=Path(folder).resolve().name,
                format="peft",
                dtype=dtype,
                block_size=architecture.hf_config.get("block_size"),
                base_model=str(base.path),
                provenance=provenance,
            )
            (temporary / MODEL_CARD).write_text(card, encoding="utf-8")


def _gathered_adapters(
    architecture: Architecture, gatherer: ShardGatherer
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, A [r, in] and B [out, r] of each Hugging Face layer, on the writer."""
    for mapping in parameter_mappings(architecture):
        layer = mapping.megatron.removesuffix(".weight")
        if f"{layer}.lora_a" not in gatherer:
            continue
        shards_a, shards_b = (gatherer.gather(f"{layer}.lora_{part}") for part in "ab")
        if not is_writer():
            continue
        is_row = isinstance(mapping.layout, RowParallel)
        parts = shards_b if is_row else mapping.layout.join(shards_b)
        for name, lora_b in zip(mapping.hf, parts, strict=True):
            yield name.removesuffix(".weight"), torch.cat(shards_a, dim=1), lora_b


def _peft_config(
    adapters: AdapterSettings, base: ModelWeights, target_modules: list[str]
) -> dict[str, Any]:
    return {
        "base_model_name_or_path": str(base.path),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapters.alpha,
        # PEFT refuses dropout on experts that transformers keeps in one tensor.
        "lora_dropout": 0.0 if base.architecture.is_moe else adapters.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapters.rank,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM" if base.is_autoregressive else None,
        "use_dora": False,
        "use_rslora": False,
    }
