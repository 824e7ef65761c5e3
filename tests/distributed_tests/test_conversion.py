"""Under every layout, imported logits are transformers' and exported tensors the source's."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file

from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.conversion.hf_export import export_hf
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import initialize
from tests.distributed_tests.spawn import run_distributed
from tests.families import OTHER_FAMILIES
from tests.functional_tests.entry_points import run_ranks
from tests.unit_tests.conversion.megatron_models import VOCAB_SIZE, megatron_logits, random_tokens
from tests.unit_tests.conversion.tokenizers import MASK_TOKEN_ID, save_tokenizer


@dataclass(frozen=True)
class Layout:
    """A layout of the processes, and which model: of experts, tied, of another family."""

    tp: int = 1
    pp: int = 1
    virtual: int = 1
    ep: int = 1
    expert_tp: int | None = None
    sequence_parallel: bool = False
    moe: bool = False
    tied: bool = False
    family: str = "qwen3"

    @property
    def config(self) -> Config:
        return Config(
            parallel=ParallelConfig(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                num_virtual_stages_per_pipeline_rank=self.virtual,
                expert_model_parallel_size=self.ep,
                expert_tensor_parallel_size=self.expert_tp,
                sequence_parallel=self.sequence_parallel,
            )
        )

    def source(self, folder: str) -> Path:
        return Path(folder, f"source_{self.family}_{self.moe}_{self.tied}_{self.virtual}")


# In a world of four, the processes that a layout leaves over are data-parallel replicas.
WORLD_SIZE = 4
LAYOUTS = [
    Layout(tp=2),
    Layout(tp=2, tied=True),
    Layout(pp=2),
    Layout(pp=2, tied=True),
    Layout(pp=2, virtual=2, tied=True),
    Layout(tp=2, pp=2, tied=True),
    Layout(ep=2, moe=True),
    Layout(ep=2, pp=2, moe=True, tied=True),
    Layout(tp=2, sequence_parallel=True, moe=True),
    # experts split in another way than attention
    Layout(tp=2, ep=2, expert_tp=1, sequence_parallel=True, moe=True),
    *(
        layout
        for family in OTHER_FAMILIES
        for layout in (
            Layout(tp=2, sequence_parallel=True, family=family),
            Layout(pp=2, family=family),
        )
    ),
]


def import_and_export(layout: Layout, folder: str, target: str) -> torch.Tensor | None:
    """Logits of the imported model, whole vocabulary, on the last stage."""
    source = layout.source(folder)
    architecture = read_architecture(source)
    model = build_model(architecture, layout.config)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    load_hf_weights(model, architecture, source)
    export_hf(model, architecture, target, format="autoregressive")
    if layout.tied:
        # A format that holds the output layer all the same.
        export_hf(
            model,
            architecture,
            f"{target}_sdar",
            tokenizer_folder=f"{folder}/tokenizer",
            block_size=4,
            mask_token_id=MASK_TOKEN_ID,
        )
    logits = megatron_logits(model, random_tokens())
    if logits is None:
        return None
    shards = [torch.empty_like(logits) for _ in range(layout.tp)]
    group = parallel_state.get_tensor_model_parallel_group()
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, dim=1)


def refused_everywhere(layout: Layout, folder: str) -> None:
    """What only the writing rank can see is an error on every rank, so that none waits."""
    source = layout.source(folder)
    architecture = read_architecture(source)
    model = build_model(architecture, layout.config)
    with pytest.raises(UserError, match="already exists"):
        export_hf(model, architecture, source, format="autoregressive")


def run_layouts(rank: int, folder: str) -> list[torch.Tensor | None]:
    results = []
    for number, layout in enumerate(LAYOUTS):
        initialize(layout.config)
        results.append(import_and_export(layout, folder, f"{folder}/out_{number}"))
        if number == 0:
            refused_everywhere(layout, folder)
        parallel_state.destroy_model_parallel()
    return results


def test_layouts(tmp_path):
    # Here and not above: the spawned processes import this file and need none of it.
    from tests.unit_tests.conversion.hf_models import hf_logits, random_hf_model, save_hf_model

    save_tokenizer(tmp_path / "tokenizer")
    expected = {}
    for layout in LAYOUTS:
        source = layout.source(str(tmp_path))
        if source not in expected:
            hf_model = random_hf_model(
                moe=layout.moe,
                family=layout.family,
                tied=layout.tied,
                num_hidden_layers=2 * layout.virtual,
            )
            save_hf_model(hf_model, source)
            expected[source] = hf_logits(hf_model, random_tokens())
    results = run_distributed(run_layouts, WORLD_SIZE, str(tmp_path))
    for number, layout in enumerate(LAYOUTS):
        source = layout.source(str(tmp_path))
        logits = [result[number] for result in results if result[number] is not None]
        assert len(logits) == WORLD_SIZE // layout.pp
        for of_rank in logits:
            assert (of_rank[:, :VOCAB_SIZE] - expected[source]).abs().max() < 1e-4, layout
            assert not of_rank[:, VOCAB_SIZE:].any(), layout
        original = load_file(source / "model.safetensors")
        exported = load_file(tmp_path / f"out_{number}" / "model.safetensors")
        assert exported.keys() == original.keys(), layout
        for name, tensor in original.items():
            assert torch.equal(exported[name], tensor), (layout, name)
        if layout.tied:
            exported = load_file(tmp_path / f"out_{number}_sdar" / "model.safetensors")
            original["lm_head.weight"] = original["model.embed_tokens.weight"]
            assert exported.keys() == original.keys(), layout
            for name, tensor in original.items():
                assert torch.equal(exported[name], tensor), (layout, name)


def test_command_reshards(tmp_path):
    from tests.unit_tests.conversion.hf_models import random_hf_model, save_hf_model

    source = save_hf_model(random_hf_model(tied=True), tmp_path / "source")
    tokenizer = ("--tokenizer", tmp_path)
    megatron, exported = tmp_path / "megatron", tmp_path / "exported"
    load = ("--load", source, "--save", megatron, "--target-format", "megatron")
    done = run_ranks(2, "convert", *tokenizer, *load, "--tensor-model-parallel-size", 2)
    assert done.status == 0, done.stderr
    save_tokenizer(tmp_path)
    export = ("--load", megatron, "--save", exported, "--target-format", "autoregressive")
    done = run_ranks(2, "convert", *tokenizer, *export, "--pipeline-model-parallel-size", 2)
    assert done.status == 0, done.stderr
    original = load_file(source / "model.safetensors")
    again = load_file(Path(exported, "model.safetensors"))
    assert again.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(again[name], tensor), name
