"""Responses that a rollout leaves unfinished have what they had by then, and go on from there."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.rollout.cutoff import Cutoff, cut
from megatron_dlm.types.trajectory import Prompt, Trajectory
from tests.unit_tests.rollout.tiny_models import (
    EOS,
    fields,
    make_engine,
    make_prompts,
    several_ends,
    tiny_model,
)

BLOCK_SIZE, LONGEST = 4, 30
PROMPTS = make_prompts([5, 1, 8, 13, 2, 4, 11, 7, 3, 6])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionGPTModel]:
    with tiny_model(tmp_path_factory.mktemp("qwen3")) as model:
        yield model


@pytest.fixture(scope="module")
def whole(model: DiffusionGPTModel) -> dict[int, Trajectory]:
    """What the prompts are answered without interruption."""
    engine = make_engine(model, special_tokens=several_ends((EOS, 3)))
    return {t.sample_index: t for t in engine.generate(PROMPTS, LONGEST)}


def blocks_after(trajectory: Trajectory, forwards: int) -> tuple[list[int], int]:
    """Step by step: the tokens of the blocks that are complete by then, and their forwards."""
    tokens = trajectory.response_ids.tolist() + trajectory.tail_ids.tolist()
    steps = trajectory.unmask_step.tolist() + trajectory.tail_unmask_step.tolist()
    done, used = 0, 0
    while done < len(tokens):
        end = done + BLOCK_SIZE - (len(trajectory.prompt_ids) + done) % BLOCK_SIZE
        step = 0
        while step < max(steps[done:end]):
            if used + step == forwards:
                return tokens[:done], used
            step += 1
        done, used = end, used + step
    return tokens, used


@pytest.mark.parametrize("slots", [10, 3])
@pytest.mark.parametrize("wanted", [1, 4, 7, 9])
@pytest.mark.slow
def test_what_is_left_is_a_beginning_of_the_whole_and_goes_on_to_it(
    model: DiffusionGPTModel, whole: dict[int, Trajectory], wanted: int, slots: int
) -> None:
    assert len({t.denoising_forwards for t in whole.values()}) > 4
    engine = make_engine(model, special_tokens=several_ends((EOS, 3)), max_running_requests=slots)
    slowest = max(whole.values(), key=lambda t: t.denoising_forwards).sample_index
    cutoff = Cutoff(wanted, {slowest}, None)
    found = engine.generate_together(PROMPTS, LONGEST, one_queue=True, cutoff=cutoff)
    assert [t.sample_index for t in found] == [p.sample_index for p in PROMPTS]
    others = sorted(t.denoising_forwards for s, t in whole.items() if s != slowest)
    limit = others[wanted - 1]
    left = []
    for trajectory in found:
        expected = whole[trajectory.sample_index]
        if expected.denoising_forwards <= limit or trajectory.sample_index == slowest:
            assert fields(trajectory) == fields(expected)
            continue
        beginning = cut(trajectory, None, limit, BLOCK_SIZE)
        tokens, used = blocks_after(expected, limit)
        assert beginning.response_ids.tolist() == tokens
        assert beginning.unmask_step.tolist() == expected.unmask_step[: len(tokens)].tolist()
        assert (beginning.denoising_forwards, beginning.is_finished) == (used, False)
        left.append(beginning)
    prompts = [replace(PROMPTS[t.sample_index], beginning=t) for t in left]
    # Twice: after a forward or two more, most have not finished another block.
    for trajectory in engine.generate_together(
        prompts, LONGEST, one_queue=True, cutoff=Cutoff(0, (), None)
    ):
        beginning = left[[t.sample_index for t in left].index(trajectory.sample_index)]
        again = cut(trajectory, beginning, 0, BLOCK_SIZE)
        assert again.response_ids.tolist() == beginning.response_ids.tolist()
        assert again.denoising_forwards == beginning.denoising_forwards
        assert again.rollouts == 2
    for trajectory in engine.generate(prompts, LONGEST):
        assert fields(trajectory) == fields(whole[trajectory.sample_index])
        assert trajectory.total_forwards == whole[trajectory.sample_index].total_forwards
        assert trajectory.rollouts == 2


def test_a_response_may_have_become_longer_than_what_is_allowed_now(
    model: DiffusionGPTModel, whole: dict[int, Trajectory]
) -> None:
    expected = max(whole.values(), key=lambda t: len(t.response_ids))
    beginning = cut(expected, None, 20, BLOCK_SIZE)
    length = len(beginning.response_ids)
    assert length > 4
    prompt = replace(PROMPTS[expected.sample_index], beginning=beginning)
    engine = make_engine(model, special_tokens=several_ends((EOS, 3)))
    (trajectory,) = engine.generate([prompt], 4)
    assert trajectory.response_ids.tolist() == expected.response_ids[: length + 1].tolist()


def test_prompts_know_what_is_decoded_of_them() -> None:
    beginning = Trajectory(0, torch.tensor([1]), torch.tensor([5, 6, 7]), torch.tensor([1, 1, 2]))
    prompt = Prompt(0, torch.tensor([1]), beginning=beginning, max_response_length=9)
    assert prompt.known_ids.tolist() == [1, 5, 6, 7]
    assert [prompt.response_limit(n) for n in (2, 4, 20)] == [4, 4, 9]
