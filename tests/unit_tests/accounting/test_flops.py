"""FLOPs by formula against PyTorch's counter and against pairs counted one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_dlm.accounting.flops import BACKWARD, ForwardFlops, causal_pairs, visible_pairs
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.models.attention_layout import clean_layout, pad_layout, visible
from megatron_dlm.models.model import head_weight
from megatron_dlm.rollout.context import CachedContext
from megatron_dlm.rollout.kv_cache import CacheView
from megatron_dlm.rollout.work import RolloutWork
from tests.tiny import DENSE, MOE
from tests.unit_tests.rollout.tiny_models import make_engine, make_prompts


def _one_by_one(layout: torch.Tensor) -> int:
    return int(visible(layout[:, :, None], layout[:, None, :]).sum())


@st.composite
def _layouts(draw: st.DrawFn) -> torch.Tensor:
    """Rows of documents with a clean stream and noisy blocks of several streams, and padding."""
    tokens = []
    for document in range(draw(st.integers(0, 3))):
        for stream, block in sorted(
            draw(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=8))
        ):
            for position in range(draw(st.integers(1, 3))):
                tokens.append((document, block, stream, 3 * block + position))
    layout = torch.tensor(tokens, dtype=torch.int32).view(-1, 4).t().contiguous()
    return pad_layout(layout, layout.shape[1] + draw(st.integers(0, 4)))


@given(_layouts())
def test_visible_pairs_are_those_of_the_rule(layout: torch.Tensor) -> None:
    assert visible_pairs(layout) == _one_by_one(layout)


def test_visible_pairs_of_annealed_attention() -> None:
    """Each pair of these is drawn."""
    generator = torch.Generator().manual_seed(0)
    layout = clean_layout([300, 20], "block_causal", 4)
    drawn = torch.randint(0, 2**24, (2, 320), generator=generator, dtype=torch.int32)
    layout = torch.cat((layout, drawn))
    assert _one_by_one(layout[:4]) < visible_pairs(layout) == _one_by_one(layout)


@given(st.integers(1, 40))
def test_causal_pairs(length: int) -> None:
    assert causal_pairs(length) == _one_by_one(clean_layout([length], "causal", 1))


def _grouped_product(left: list[int], right: list[int], *_: Any, **__: Any) -> int:
    """Of groups of rows, or over them: PyTorch's counter does not know the product of experts."""
    return 2 * left[0] * left[1] * right[-1]


@pytest.mark.parametrize(
    "sizes", [{"model_type": "qwen3", **DENSE}, {"model_type": "qwen3_moe", **MOE}]
)
@pytest.mark.usefixtures("single_process")
def test_flops_are_those_that_pytorch_counts(sizes: dict[str, Any]) -> None:
    """One document under full attention: the reference computes visible pairs only."""
    from megatron_dlm.config import Config, ParallelConfig
    from megatron_dlm.models.model_provider import build_model

    architecture = architecture_from_hf({"rope_theta": 1e4, **sizes})
    model = build_model(architecture, Config(parallel=ParallelConfig(device="cpu")))
    length, supervised = 24, 5
    layout = clean_layout([length], "full", 1)
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_product}
    )
    row = torch.zeros(1, length, dtype=torch.int64), layout[3].long()[None], layout
    with torch.no_grad():
        model(*row)  # the first forward tries the product of experts out
    with counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model(*row)
        logits = hidden[:supervised, 0] @ head_weight(model).t()
        forward = counter.get_total_flops()
        logits.sum().backward()
    flops = ForwardFlops.of(architecture)
    assert forward == flops.forward(length, length**2, supervised)
    assert counter.get_total_flops() == (1 + BACKWARD) * forward


@pytest.mark.usefixtures("single_process")
def test_work_of_a_rollout_is_what_its_forwards_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit_tests.rollout.tiny_models import load_model, save_tiny_model

    save_tiny_model(tmp_path)
    engine = make_engine(load_model(tmp_path))
    seen: list[list[int]] = []
    attention = CachedContext.attention
    block_size = 4

    def asked(self: CachedContext, starts: Any, ends: Any, noisy_starts: Any) -> CacheView:
        spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
        pairs = [
            sum(key // block_size <= query // block_size for key in range(end))
            for start, end in spans
            for query in range(start, end)
        ]
        seen.append([len(pairs), sum(pairs), sum(end for _, end in spans)])
        return attention(self, starts, ends, noisy_starts)

    monkeypatch.setattr(CachedContext, "attention", asked)
    trajectories = engine.generate(make_prompts([3, 9, 0, 6, 13]), 12)
    work = engine.work.take()
    assert [list(of) for of in zip(work.tokens, work.pairs, work.keys, strict=True)] == seen
    steps = [t.denoising_forwards for t in trajectories]
    assert sum(work.logits) >= sum(steps)  # each forward of a sequence draws at least one
    assert len(work.logits) >= max(steps)
    assert engine.work == RolloutWork()
