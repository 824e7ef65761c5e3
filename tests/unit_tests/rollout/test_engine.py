import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.models.attention_layout import Field, clean_layout
from megatron_dlm.models.forward import Row, forward_hidden
from megatron_dlm.models.model import DiffusionGPTModel, head_weight
from megatron_dlm.models.stage import Stage
from megatron_dlm.parallel import initialized
from megatron_dlm.rollout import sampling
from megatron_dlm.rollout.block_grid import sequence_length
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.sampling import SampledTokens, sample_tokens
from megatron_dlm.rollout.uniforms import counter_uniforms
from megatron_dlm.types.trajectory import Prompt
from tests.unit_tests.rollout.tiny_models import (
    EOS,
    GENERATION,
    MASK,
    SPECULATIVE,
    VOCAB_SIZE,
    fields,
    load_model,
    make_engine,
    make_prompts,
    save_tiny_model,
    several_ends,
)

SEVERAL_ENDS = (EOS, 3, 20, 41)
LENGTHS = [5, 1, 8, 13, 2, 4, 11, 7]


class Models(NamedTuple):
    """The same weights twice."""

    ours: DiffusionGPTModel
    transformers: torch.nn.Module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    folder = tmp_path_factory.mktemp("qwen3")
    reference = save_tiny_model(folder)
    with initialized(Config(parallel=ParallelConfig(device="cpu"))):
        yield Models(load_model(folder), reference)


@pytest.fixture
def model(models: Models) -> DiffusionGPTModel:
    return models.ours


def draw_without_cache(
    model: DiffusionGPTModel,
    generation: GenerationConfig,
    tokens: Tensor,
    source: Tensor,
    target: Tensor,
    sample_index: int,
    step: int,
) -> SampledTokens:
    """Recompute the whole sequence, then draw at positions `target` from the hidden at `source`."""
    layout = clean_layout([len(tokens)], "block_causal", generation.block_size)
    if generation.context_attention == "causal":  # but for the block in decoding, the last one
        start = len(tokens) - generation.block_size
        layout[Field.BLOCK] = layout[Field.POSITION].clamp(max=start)
    hidden = forward_hidden(model.eval(), [Row(tokens, torch.arange(len(tokens)), layout)])
    assert hidden is not None
    counters = (torch.full_like(target, sample_index), target, torch.full_like(target, step))
    packed = sample_tokens(
        hidden[0][source],
        head_weight(model),
        counter_uniforms(11, *counters),
        vocab_start=0,
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
    )
    return SampledTokens.unpack(packed)


def decode_without_cache(
    model: DiffusionGPTModel,
    generation: GenerationConfig,
    prompt: Prompt,
    max_response_length: int,
    ends: tuple[int, ...] = (EOS,),
) -> tuple:
    """One sequence, block by block from the definition, every forward over the whole sequence."""
    block_size, prompt_length = generation.block_size, len(prompt.token_ids)
    tokens, steps = prompt.token_ids.tolist(), [0] * prompt_length
    forwards = 0
    while True:
        block_start = len(tokens) // block_size * block_size
        masked = list(range(len(tokens), block_start + block_size))
        tokens += [MASK] * len(masked)
        steps += [0] * len(masked)
        step = 1
        while masked:
            positions = torch.tensor(masked)
            drawn = draw_without_cache(
                model,
                generation,
                torch.tensor(tokens),
                positions,
                positions,
                prompt.sample_index,
                step,
            )
            forwards += 1
            confidence = dict(zip(masked, drawn.confidence.tolist(), strict=True))
            ranking = sorted(masked, key=lambda position: (-confidence[position], position))
            if generation.remasking_strategy == "low_confidence_static":
                chosen = ranking[: block_size // generation.denoising_steps_per_block]
            else:
                passing = [p for p in masked if confidence[p] > generation.dynamic_threshold]
                chosen = passing or ranking[:1]
            for position, token in zip(masked, drawn.token_ids.tolist(), strict=True):
                if position in chosen:
                    tokens[position], steps[position] = token, step
            masked = [position for position in masked if position not in chosen]
            step += 1
        generated = tokens[prompt_length:]
        if set(ends) & set(generated) or len(generated) >= max_response_length:
            break
    length, reason = max_response_length, "length"
    if set(ends) & set(generated[:length]):
        length, reason = min(generated.index(end) for end in ends if end in generated) + 1, "eos"
    steps = steps[prompt_length:]
    return (
        prompt.sample_index,
        prompt.token_ids.tolist(),
        generated[:length],
        steps[:length],
        generated[length:],
        steps[length:],
        reason,
        forwards,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"remasking_strategy": "low_confidence_static"},
        {"remasking_strategy": "low_confidence_static", "denoising_steps_per_block": 2},
        {"temperature": 0.0, "dynamic_threshold": 0.9},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"block_size": 3, "denoising_steps_per_block": 3, "max_running_requests": 64},
        {"block_size": 8, "denoising_steps_per_block": 4, "dynamic_threshold": 0.3},
        {"block_size": 1, "denoising_steps_per_block": 1},
        {"context_attention": "causal"},
        {"context_attention": "causal", "temperature": 0.0, "chunked_prefill_size": 4},
        {"context_attention": "causal", "block_size": 3, "denoising_steps_per_block": 3},
    ],
    ids=str,
)
def test_cached_decoding_equals_full_forwards(model: DiffusionGPTModel, changes: dict) -> None:
    engine = make_engine(model, **changes)
    prompts = make_prompts(LENGTHS)
    trajectories = engine.generate(prompts, 18)
    assert [fields(t) for t in trajectories] == [
        decode_without_cache(model, engine.generation, prompt, 18) for prompt in prompts
    ]
    if not changes:  # the cases that the comparison must not miss
        assert {t.finish_reason for t in trajectories} == {"eos", "length"}
        assert any(len(t.tail_ids) for t in trajectories)
        assert max(int(t.unmask_step.max()) for t in trajectories) > 1
        assert any((t.unmask_step[:-1] == t.unmask_step[1:]).any() for t in trajectories)
    for prompt, trajectory in zip(prompts, trajectories, strict=True):
        assert trajectory.record is prompt.record


def test_confidence_is_that_of_the_step_that_committed_a_token(model: DiffusionGPTModel) -> None:
    """Against draws without a cache from the states that the trajectory says were visited."""
    prompts = make_prompts(LENGTHS[:5])
    engine = make_engine(model, keeps_confidence=True)
    trajectories = engine.generate(prompts, 11)
    plain = make_engine(model).generate(prompts, 11)
    assert [fields(t) for t in trajectories] == [fields(t) for t in plain]
    assert all(t.confidence is None for t in plain)
    for trajectory in trajectories:
        first, size = len(trajectory.prompt_ids), GENERATION.block_size or 0
        tokens = torch.cat((trajectory.token_ids, trajectory.tail_ids))
        steps = torch.cat((trajectory.unmask_step, trajectory.tail_unmask_step))
        steps = torch.cat((torch.zeros(first, dtype=torch.int64), steps))
        expected = torch.zeros(len(tokens))
        for start in range(first // size * size, len(tokens), size):
            of_block = steps[start : start + size]
            for step in range(1, int(of_block.max()) + 1):
                state = torch.where(of_block < step, tokens[start : start + size], MASK)
                drawn_at = start + (of_block >= step).nonzero()[:, 0]
                drawn = draw_without_cache(
                    model,
                    GENERATION,
                    torch.cat((tokens[:start], state)),
                    drawn_at,
                    drawn_at,
                    trajectory.sample_index,
                    step,
                )
                chosen = steps[drawn_at] == step
                expected[drawn_at[chosen]] = drawn.confidence[chosen]
        assert trajectory.confidence is not None
        torch.testing.assert_close(trajectory.confidence, expected[first:])


def test_confidence_of_next_token_decoding_is_that_of_transformers(models: Models) -> None:
    prompts = make_prompts(LENGTHS[:4])
    generation = GenerationConfig.autoregressive(temperature=0.8, max_running_requests=3)
    engine = make_engine(models.ours, generation, keeps_confidence=True)
    for trajectory in engine.generate(prompts, 9):
        first = len(trajectory.prompt_ids)
        logits = models.transformers(trajectory.token_ids[None]).logits[0, first - 1 : -1]
        logits[:, MASK] = -torch.inf
        expected = logits.softmax(-1).gather(1, trajectory.response_ids[:, None])[:, 0]
        torch.testing.assert_close(trajectory.confidence, expected.detach())


@pytest.mark.slow
def test_any_of_several_ids_ends_a_response(model: DiffusionGPTModel) -> None:
    engine = make_engine(model, special_tokens=several_ends(SEVERAL_ENDS))
    prompts = make_prompts(LENGTHS * 2)
    trajectories = engine.generate(prompts, 18)
    assert [fields(t) for t in trajectories] == [
        decode_without_cache(model, engine.generation, prompt, 18, SEVERAL_ENDS)
        for prompt in prompts
    ]
    ended_by = {int(t.response_ids[-1]) for t in trajectories if t.finish_reason == "eos"}
    assert len(ended_by) > 1  # or the comparison has not seen more than one of them


def test_forwards_are_those_of_the_model(
    model: DiffusionGPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and commits have no forwards of their own: every one denoises."""
    calls, run = 0, Stage.run

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(*args)

    monkeypatch.setattr(Stage, "run", counted)
    engine = make_engine(model)
    for prompt in make_prompts(LENGTHS):
        calls = 0
        (trajectory,) = engine.generate([prompt], 18)
        assert trajectory.total_forwards == trajectory.denoising_forwards == calls


@pytest.mark.parametrize("changes", [{}, {"context_attention": "causal"}, SPECULATIVE], ids=str)
def test_results_do_not_depend_on_the_batch(
    model: DiffusionGPTModel, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts([*LENGTHS, 64])
    prompts += [dataclasses.replace(prompts[-1], sample_index=100 + i) for i in range(3)]
    expected = [fields(t) for t in make_engine(model, **changes).generate(prompts, 14)]
    for slots in (1, 5, 64):
        engine = make_engine(model, max_running_requests=slots, **changes)
        assert [fields(t) for t in engine.generate(prompts, 14)] == expected
    backwards = make_engine(model, **changes).generate(prompts[::-1], 14)
    assert [fields(t) for t in backwards[::-1]] == expected
    monkeypatch.setattr(sampling, "MAX_LOGITS", 300)
    assert [fields(t) for t in make_engine(model, **changes).generate(prompts, 14)] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_pattern": "full"},
        {"attention_pattern": "full", "block_size": None},
        SPECULATIVE,
    ],
    ids=["block_causal", "full by blocks", "full as a whole", "speculative"],
)
def test_a_prompt_may_have_a_limit_of_its_own(model: DiffusionGPTModel, changes: dict) -> None:
    """In a batch as alone, in a rollout that is limited for all."""
    limits = [3, None, 14, 1, 30, 5, 8, 2]
    prompts = make_prompts(LENGTHS)
    limited = [
        dataclasses.replace(prompt, max_response_length=limit)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    batch = make_engine(model, **changes).generate(limited, 14)
    for prompt, limit, trajectory in zip(prompts, limits, batch, strict=True):
        (alone,) = make_engine(model, **changes).generate([prompt], min(limit or 14, 14))
        assert fields(trajectory) == fields(alone)
        assert trajectory.canvas_length == alone.canvas_length


def test_the_cache_is_as_long_as_what_will_be_in_it() -> None:
    def length(*sizes: tuple[int, int | None]) -> int:
        prompts = [Prompt(0, torch.zeros(p), max_response_length=limit) for p, limit in sizes]
        return max((sequence_length(p, GENERATION, 50) for p in prompts), default=0)

    assert length((100, 4), (8, 60), (7, None)) == 104
    assert length((10, None), (20, 12)) == 60
    assert length() == 0


def test_another_seed_or_sample_index_gives_other_responses(model: DiffusionGPTModel) -> None:
    prompt = make_prompts([6])[0]
    renumbered = [Prompt(index, prompt.token_ids) for index in range(6)]
    responses = {tuple(t.response_ids.tolist()) for t in make_engine(model).generate(renumbered, 8)}
    assert len(responses) == 6
    engine = make_engine(model)
    engine.seed += 1
    assert fields(engine.generate([prompt], 8)[0]) != fields(
        make_engine(model).generate([prompt], 8)[0]
    )


def test_end_of_sequence_in_the_prompt_does_not_end_the_response(model: DiffusionGPTModel) -> None:
    prompt = Prompt(0, torch.tensor([EOS, 3, EOS, 5, 9, EOS]))  # remainder [9, EOS] of block 1
    trajectory = make_engine(model).generate([prompt], 3)[0]
    engine = make_engine(model)
    assert fields(trajectory) == decode_without_cache(model, engine.generation, prompt, 3)
    assert torch.equal(trajectory.token_ids[:6], prompt.token_ids)


@pytest.mark.parametrize("ends", [(EOS,), SEVERAL_ENDS])
def test_autoregressive_decoding_equals_transformers(models: Models, ends: tuple[int, ...]) -> None:
    engine = make_engine(
        models.ours,
        GenerationConfig.autoregressive(temperature=0.0, max_running_requests=3),
        special_tokens=several_ends(ends),
    )
    prompts = make_prompts(LENGTHS)
    for prompt, trajectory in zip(prompts, engine.generate(prompts, 12), strict=True):
        output = models.transformers.generate(
            prompt.token_ids[None],
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=EOS,
            suppress_tokens=[MASK],
        )
        expected = output[0, len(prompt.token_ids) :]
        assert trajectory.response_ids.tolist() == expected.tolist()
        assert trajectory.finish_reason == ("eos" if int(expected[-1]) in ends else "length")
        assert not trajectory.unmask_step.any()
        assert len(trajectory.tail_ids) == 0
        assert trajectory.denoising_forwards == len(expected)


def test_autoregressive_sampling_equals_full_forwards(model: DiffusionGPTModel) -> None:
    generation = GenerationConfig.autoregressive(temperature=0.8, top_k=9, max_running_requests=2)
    prompts = make_prompts(LENGTHS)
    for prompt, trajectory in zip(
        prompts, make_engine(model, generation).generate(prompts, 9), strict=True
    ):
        tokens = prompt.token_ids.tolist()
        while len(tokens) < len(prompt.token_ids) + 9:
            drawn = draw_without_cache(
                model,
                generation,
                torch.tensor(tokens),
                torch.tensor([len(tokens) - 1]),
                torch.tensor([len(tokens)]),
                prompt.sample_index,
                1,
            )
            tokens.append(int(drawn.token_ids[0]))
            if tokens[-1] == EOS:
                break
        assert trajectory.token_ids.tolist() == tokens


def test_training_state_is_left_as_it_was(model: DiffusionGPTModel) -> None:
    model.train()
    model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    trajectories = make_engine(model).generate(make_prompts([3]), 5)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not trajectories[0].response_ids.is_inference()
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_new_weights_are_used_at_once(model: DiffusionGPTModel) -> None:
    engine, prompts = make_engine(model), make_prompts(LENGTHS)
    before = [fields(t) for t in engine.generate(prompts, 10)]
    weight = model.decoder.layers[0].mlp.linear_fc1.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight.neg_()
    changed = [fields(t) for t in engine.generate(prompts, 10)]
    assert changed != before
    assert changed == [decode_without_cache(model, engine.generation, p, 10) for p in prompts]
    with torch.no_grad():
        weight.copy_(original)
    assert [fields(t) for t in engine.generate(prompts, 10)] == before


def test_no_prompts_and_bad_arguments(model: DiffusionGPTModel) -> None:
    assert make_engine(model).generate([], 4) == []
    with pytest.raises(ValueError, match="max_response_length = 0"):
        make_engine(model).generate(make_prompts([3]), 0)
    generation = GenerationConfig.autoregressive(temperature=0.0, max_running_requests=1)
    with pytest.raises(ValueError, match="sample 0 has no token"):
        make_engine(model, generation).generate(make_prompts([0]), 4)


def test_a_prompt_may_be_empty_in_block_diffusion(model: DiffusionGPTModel) -> None:
    # The hidden states of a first block of MASK alone are equal: no two draws of this sample are.
    engine, prompts = make_engine(model), make_prompts([0, 5], first_sample=2)
    assert [fields(t) for t in engine.generate(prompts, 7)] == [
        decode_without_cache(model, engine.generation, prompt, 7) for prompt in prompts
    ]
