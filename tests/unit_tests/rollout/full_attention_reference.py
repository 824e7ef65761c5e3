"""Full-attention decoding from its definition: one sequence, plain lists, float64.

The network is `transformers`' Qwen3 with a mask of zeros in place of the causal one.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.uniforms import counter_uniforms
from megatron_dlm.types.trajectory import Prompt
from tests.unit_tests.rollout.tiny_models import EOS, MASK, SEED, VOCAB_SIZE


def bidirectional_model(folder: Path) -> torch.nn.Module:
    """The model of a folder in float64, for `bidirectional_logits`."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float64
    )
    return model.eval()


@torch.no_grad()
def bidirectional_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Logits [S, V] where every token sees every token."""
    length = len(tokens)
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64)
    return model(torch.tensor([tokens]), attention_mask=mask).logits[0]


def commit(
    generation: GenerationConfig,
    masked: list[int],
    confidence: dict[int, float],
    entropy: dict[int, float],
    step: int,
    masked_at_start: int,
    width: int,
) -> list[int]:
    """Positions that a step keeps."""
    confident = sorted(masked, key=lambda position: (-confidence[position], position))
    steps = generation.denoising_steps_per_block or width
    strategy = generation.remasking_strategy
    if strategy == "low_confidence_static":
        counts = [width // steps + (number < width % steps) for number in range(steps)]
        return confident[: counts[step - 1]]
    if strategy == "low_confidence_dynamic":
        passing = [p for p in masked if confidence[p] > generation.dynamic_threshold]
        return passing or confident[:1]
    if strategy == "entropy":
        uncertain = sorted(masked, key=lambda position: (entropy[position], position))
        stay = masked_at_start * max(steps - step, 0) // steps
        return uncertain[: max(len(masked) - stay, 1)]
    kept = confident[:1]
    for position in confident[1:]:
        values = [entropy[p] for p in [*kept, position]]
        if sum(values) - max(values) > generation.entropy_bound:
            break
        kept.append(position)
    return kept


def decode(
    model: torch.nn.Module, generation: GenerationConfig, prompt: Prompt, max_response_length: int
) -> tuple[tuple, list[list[int]]]:
    """What the engine should return, as `fields` of a trajectory, and every canvas it went through.

    Temperature only; top-k and top-p are off.
    """
    prompt_ids = prompt.token_ids.tolist()
    start, end = len(prompt_ids), len(prompt_ids) + max_response_length
    canvas = prompt_ids + [MASK] * max_response_length
    steps, canvases = [0] * end, []
    size = generation.block_size
    blocks = [(start, end)]
    if size is not None:
        grid = range(start // size * size, end, size)
        blocks = [(max(start, first), min(first + size, end)) for first in grid]
    width = size or max_response_length
    for block_start, block_end in blocks:
        masked, step = list(range(block_start, block_end)), 1
        while masked:
            canvases.append(list(canvas))
            logits = bidirectional_logits(model, canvas)[:, :VOCAB_SIZE].clone()
            logits[:, MASK] = -torch.inf
            tokens, confidence, entropy = {}, {}, {}
            for position in masked:
                row = logits[position - 1 if generation.shifted else position]
                probability = row.softmax(0)
                tokens[position] = int(row.argmax())
                if generation.temperature:
                    counters = [torch.tensor([x]) for x in (prompt.sample_index, position, step)]
                    reached = (row / generation.temperature).softmax(0).cumsum(0)
                    uniform = counter_uniforms(SEED, *counters)
                    tokens[position] = int((reached > uniform).int().argmax())
                confidence[position] = float(probability[tokens[position]])
                entropy[position] = float(-torch.special.xlogy(probability, probability).sum())
            for position in commit(
                generation, masked, confidence, entropy, step, block_end - block_start, width
            ):
                canvas[position], steps[position] = tokens[position], step
                masked.remove(position)
            step += 1
        if EOS in canvas[block_start:block_end]:
            break
    generated, steps = canvas[start:block_end], steps[start:block_end]
    length, reason = len(generated), "length"
    if EOS in generated:
        length, reason = generated.index(EOS) + 1, "eos"
    result = (
        prompt.sample_index,
        prompt_ids,
        generated[:length],
        steps[:length],
        generated[length:],
        steps[length:],
        reason,
        len(canvases),
    )
    return result, canvases
