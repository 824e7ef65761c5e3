"""Rollouts under full attention: against a plain decoding loop on `transformers` in float64."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.errors import UserError
from megatron_dlm.models.forward import Row, pad_row
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.models.stage import PaddedRow, Stage
from megatron_dlm.parallel import initialized
from megatron_dlm.rollout.batch import row_of_layout
from megatron_dlm.rollout.context import CanvasContext
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.trajectory import Prompt, Trajectory
from tests.unit_tests.rollout.full_attention_reference import (
    bidirectional_logits,
    bidirectional_model,
    decode,
)
from tests.unit_tests.rollout.test_engine import fields
from tests.unit_tests.rollout.tiny_models import (
    FULL_ATTENTION,
    MASK,
    load_model,
    make_engine,
    make_prompts,
    save_tiny_model,
)

LENGTHS = [5, 1, 8, 13, 2, 4]
LIMIT = 11


class Models(NamedTuple):
    """The same weights twice."""

    ours: DiffusionGPTModel
    reference: torch.nn.Module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    folder = tmp_path_factory.mktemp("qwen3")
    save_tiny_model(folder)
    with initialized(Config(parallel=ParallelConfig(device="cpu"))):
        yield Models(load_model(folder), bidirectional_model(folder))


def generate(
    models: Models, prompts: list[Prompt], limit: int = LIMIT, **changes: object
) -> list[Trajectory]:
    return make_engine(models.ours, FULL_ATTENTION, **changes).generate(prompts, limit)


def test_the_reference_sees_everything(models: Models) -> None:
    first = bidirectional_logits(models.reference, [3, 4, 5])[0]
    assert not torch.allclose(first, bidirectional_logits(models.reference, [3, 4, 6])[0])


@pytest.mark.parametrize("shifted", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("block_size", [None, 4], ids=["whole", "blocks"])
@pytest.mark.parametrize(
    "changes",
    [
        {"remasking_strategy": "entropy"},
        {"remasking_strategy": "entropy", "denoising_steps_per_block": 2, "temperature": 0.7},
        {"remasking_strategy": "entropy_bounded", "entropy_bound": 2.5},
        {"remasking_strategy": "low_confidence_static", "denoising_steps_per_block": 4},
        {"remasking_strategy": "low_confidence_dynamic", "temperature": 0.0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_decoding_equals_the_definition(
    models: Models, changes: dict, block_size: int | None, shifted: bool
) -> None:
    settings = {**changes, "block_size": block_size, "shifted": shifted}
    engine = make_engine(models.ours, FULL_ATTENTION, **settings)
    prompts = make_prompts(LENGTHS, first_sample=6)
    trajectories = engine.generate(prompts, LIMIT)
    expected = [decode(models.reference, engine.generation, p, LIMIT)[0] for p in prompts]
    assert [fields(t) for t in trajectories] == expected
    if changes == {"remasking_strategy": "entropy"}:  # the cases that must not be missed
        assert {t.finish_reason for t in trajectories} == {"eos", "length"}
        assert any(len(t.tail_ids) for t in trajectories) or block_size is not None


def test_more_steps_than_tokens_is_one_token_a_step(models: Models) -> None:
    prompts = make_prompts(LENGTHS)
    for strategy in ("entropy", "low_confidence_static"):
        one_each = generate(models, prompts, remasking_strategy=strategy)
        assert all(t.denoising_forwards == LIMIT for t in one_each)
        many = generate(
            models, prompts, remasking_strategy=strategy, denoising_steps_per_block=LIMIT + 9
        )
        assert [fields(t) for t in many] == [fields(t) for t in one_each]


@pytest.mark.parametrize("strategy", ["entropy", "low_confidence_static", "entropy_bounded"])
@settings(max_examples=8)
@given(length=st.integers(0, 9), limit=st.integers(1, 12), room=st.integers(0, 5))
def test_whole_sequence_equals_one_block(
    models: Models, strategy: str, length: int, limit: int, room: int
) -> None:
    prompts = make_prompts([length])
    changes = {"remasking_strategy": strategy, "entropy_bound": 1.5}
    whole = generate(models, prompts, limit, **changes)
    one_block = generate(models, prompts, limit, **changes, block_size=length + limit + room)
    assert [fields(t) for t in whole] == [fields(t) for t in one_block]


@pytest.mark.parametrize("block_size", [None, 4])
def test_trajectories_say_what_the_network_saw(
    models: Models, block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt, tokens, steps, canvas and block size give back every canvas that was forwarded."""
    seen: list[list[int]] = []
    prepared = Stage.prepared

    def record(stage: Stage, row: Row) -> PaddedRow:
        seen.append(row.token_ids.tolist())
        return prepared(stage, row)

    monkeypatch.setattr(Stage, "prepared", record)
    rebuilt, lengths = [], []
    for prompt in make_prompts([6, 3, 9, 2, 5]):
        (trajectory,) = generate(
            models, [prompt], 14, block_size=block_size, remasking_strategy="entropy_bounded"
        )
        assert trajectory.canvas_length == len(prompt.token_ids) + 14
        tokens = torch.cat((trajectory.token_ids, trajectory.tail_ids)).tolist()
        steps = [0] * len(prompt.token_ids)
        steps += torch.cat((trajectory.unmask_step, trajectory.tail_unmask_step)).tolist()
        block = [0 if block_size is None else i // block_size for i in range(len(tokens))]
        unseen = [MASK] * (trajectory.canvas_length - len(tokens))
        for current in range(block[-1] + 1):
            last_step = max(s for s, b in zip(steps, block, strict=True) if b == current)
            for step in range(1, last_step + 1):
                known = [
                    s == 0 or b < current or (b == current and s < step)
                    for s, b in zip(steps, block, strict=True)
                ]
                canvas = [t if k else MASK for t, k in zip(tokens, known, strict=True)]
                rebuilt.append(canvas + unseen)
        lengths.append(len(tokens) - len(prompt.token_ids))
    assert rebuilt == seen
    assert (min(lengths) < 14) == (block_size is not None)  # an EOS leaves later blocks undecoded


@pytest.mark.slow
def test_results_do_not_depend_on_the_batch(models: Models) -> None:
    prompts = make_prompts(LENGTHS * 2)
    for block_size in (None, 4):
        expected = [fields(t) for t in generate(models, prompts, block_size=block_size)]
        for slots in (1, 5, 64):
            again = generate(models, prompts, block_size=block_size, max_running_requests=slots)
            assert [fields(t) for t in again] == expected


def test_only_block_causal_rollouts_have_no_canvas(models: Models) -> None:
    assert make_engine(models.ours).generate(make_prompts([3]), 4)[0].canvas_length is None


def test_shifted_needs_a_token_to_predict_from(models: Models) -> None:
    with pytest.raises(ValueError, match="sample 0 has no token"):
        generate(models, make_prompts([0]), shifted=True)


def test_settings_that_cannot_work() -> None:
    block_causal = dict(
        remasking_strategy="entropy",
        dynamic_threshold=0.9,
        denoising_steps_per_block=None,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        max_running_requests=1,
    )
    with pytest.raises(UserError, match=r"--block-size = None: .* only under full attention"):
        GenerationConfig(**block_causal, block_size=None)
    with pytest.raises(UserError, match=r"config.json: shifted = True"):
        GenerationConfig(**block_causal, block_size=4, shifted=True)


@pytest.mark.parametrize("lengths", [[5, 2], [4, 4], []], ids=["unaligned", "aligned", "idle"])
def test_forwards_share_a_layout_while_no_sequence_ends(lengths: list[int]) -> None:
    """Masks are found by the storage of the layout; padding must not make another one."""
    context = CanvasContext(multiple=4)
    starts, ends = np.zeros(len(lengths), dtype=np.int64), np.array(lengths, dtype=np.int64)
    tokens = torch.zeros(max(sum(lengths), 1), dtype=torch.int64)

    def layout() -> torch.Tensor:
        row = row_of_layout(tokens, tokens, context.attention(starts, ends, ends))
        attention = pad_row(row, 4).attention
        assert isinstance(attention, torch.Tensor)
        return attention

    first = layout()
    assert first.shape == (4, -(-len(tokens) // 4) * 4)
    assert first[0].tolist().count(-1) == first.shape[1] - sum(lengths)
    assert layout().data_ptr() == first.data_ptr()
