"""Drawing tokens at a real vocabulary on one CPU core, against the head's product.

    python -m benchmarks.drawing --output benchmarks/results/drawing.json

Head and draw of 64 tokens of 151,936 ids over the head just before: medians of ratios of processor
seconds. Then the rollouts of two Qwen3 with random weights, of 0.1 B parameters and of the tiny
model's shape, 16 sequences in blocks of 4, a step a token, against a plain loop of the same
decoding around transformers' model, with a cache and the same sampling, temperature 1: with
forwards that are replayed (`rollout_graphs`) and with those of the modules, in turns. With
`--parts tiny` nothing else is measured, and what the file has of other parts stays.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.environment import commit, machine, versions

ROWS, COLUMNS, HIDDEN = 64, 151_936, 1024
DRAWS: dict[str, tuple[float, int, float]] = {
    "greedy": (0.0, 0, 1.0),
    "temperature 1": (1.0, 0, 1.0),
    "temperature 0.7": (0.7, 0, 1.0),
    "top-k 50": (1.0, 50, 1.0),
    "top-p 0.95": (1.0, 0, 0.95),
}
SEQUENCES, BLOCK_SIZE, PROMPT_LENGTH = 16, 4, 8
MODELS: dict[str, dict[str, int]] = {
    "0.1 B": dict(
        vocab_size=COLUMNS,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    ),
    "tiny": dict(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    ),
}


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measure_draws(repetitions: int) -> dict[str, Any]:
    from megatron_dlm.rollout.sampling import KeptLogits, sample_tokens
    from megatron_dlm.rollout.uniforms import counter_uniforms

    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, HIDDEN), 0.03 * torch.randn(COLUMNS, HIDDEN)
    counter = torch.arange(ROWS)
    uniforms = counter_uniforms(1, counter, counter, counter)
    kept_logits = KeptLogits()

    def draw(temperature: float, top_k: int, top_p: float) -> None:
        sample_tokens(
            hidden,
            weight,
            uniforms,
            vocab_start=0,
            vocab_size=COLUMNS - 266,
            mask_token_id=COLUMNS - 267,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            kept_logits=kept_logits,
        )

    heads: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in DRAWS}
    for _ in range(repetitions + 1):
        for name, options in DRAWS.items():
            heads.append(seconds(lambda: F.linear(hidden, weight)))
            ratios[name].append(seconds(partial(draw, *options)) / heads[-1])
    return {
        "head_seconds": statistics.median(heads),
        "head_and_draw_over_head": {
            name: statistics.median(values[1:]) for name, values in ratios.items()
        },
    }


def measure_rollout(
    shape: dict[str, int], response_length: int, repetitions: int
) -> dict[str, Any]:
    from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

    from megatron_dlm import platform
    from megatron_dlm.config import Config, ParallelConfig
    from megatron_dlm.conversion.hf_import import load_hf_weights
    from megatron_dlm.models.architecture import read_architecture
    from megatron_dlm.models.model_provider import build_model
    from megatron_dlm.parallel import ParallelGroups, initialized
    from megatron_dlm.rollout.engine import RolloutEngine
    from megatron_dlm.rollout.generation_config import GenerationConfig
    from megatron_dlm.types.special_tokens import SpecialTokens
    from megatron_dlm.types.trajectory import Prompt

    platform.select("cpu")
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **shape)).eval()
    strategy: dict[str, Any] = dict(
        remasking_strategy="low_confidence_static", denoising_steps_per_block=BLOCK_SIZE
    )
    prompts = torch.randint(0, 500, (SEQUENCES, PROMPT_LENGTH))
    size = shape["vocab_size"]
    # No draw is an end: MASK is never drawn.
    special = SpecialTokens(size - 3, size - 2, size - 3, vocab_size=size)

    @torch.no_grad()
    def their_loop() -> None:
        """Block diffusion as plain as it gets: whole logits, softmax, multinomial."""
        cache = DynamicCache()
        theirs(prompts, past_key_values=cache, logits_to_keep=1)
        for start in range(PROMPT_LENGTH, PROMPT_LENGTH + response_length, BLOCK_SIZE):
            block = torch.full((SEQUENCES, BLOCK_SIZE), special.mask_token_id)
            visible = torch.zeros(SEQUENCES, 1, BLOCK_SIZE, start + BLOCK_SIZE)
            for _ in range(BLOCK_SIZE):
                logits = theirs(block, past_key_values=cache, attention_mask=visible).logits
                cache.crop(-BLOCK_SIZE)
                logits[..., special.mask_token_id] = -torch.inf
                probabilities = logits.softmax(-1)
                drawn = torch.multinomial(probabilities.flatten(0, 1), 1).view(block.shape)
                confidence = probabilities.gather(-1, drawn[..., None])[..., 0]
                confidence[block != special.mask_token_id] = -1.0
                best = confidence.argmax(-1, keepdim=True)
                block.scatter_(1, best, drawn.gather(1, best))
            theirs(block, past_key_values=cache, attention_mask=visible, logits_to_keep=1)

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        config = Config(parallel=ParallelConfig(device="cpu"))
        with initialized(config):
            architecture = read_architecture(Path(folder))
            ours = build_model(architecture, config)
            load_hf_weights(ours, architecture, Path(folder))
            replayed, plain = (
                RolloutEngine(
                    ours,
                    generation=GenerationConfig(
                        block_size=BLOCK_SIZE,
                        temperature=1.0,
                        top_k=0,
                        top_p=1.0,
                        max_running_requests=SEQUENCES,
                        rollout_graphs=graphs,
                        **strategy,
                    ),
                    special_tokens=special,
                    seed=1,
                    groups=ParallelGroups.from_parallel_state(),
                )
                for graphs in ("on", "off")
            )
            ours_prompts = [Prompt(i, prompt, {}) for i, prompt in enumerate(prompts)]
            recording = seconds(lambda: replayed.generate(ours_prompts, response_length))
            times = [
                (
                    seconds(lambda: replayed.generate(ours_prompts, response_length)),
                    seconds(lambda: plain.generate(ours_prompts, response_length)),
                    seconds(their_loop),
                )
                for _ in range(repetitions)
            ]
    ours_seconds, plain_seconds, their_seconds = (
        statistics.median(t) for t in zip(*times, strict=True)
    )
    return {
        "parameters": sum(p.numel() for p in theirs.parameters()),
        "sequences": SEQUENCES,
        "response_length": response_length,
        "tokens_per_processor_second": SEQUENCES * response_length / ours_seconds,
        "over_transformers": their_seconds / ours_seconds,
        "over_transformers_without_graphs": their_seconds / plain_seconds,
        "first_rollout_over_later_ones": recording / ours_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--response-length", type=int, default=32)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["draws", *MODELS],
        help="measure these; the rest of OUTPUT stays",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "versions": versions(), "rollouts": {}}
    if arguments.parts and arguments.output.exists():
        result = json.loads(arguments.output.read_text())
    result |= {"rows": ROWS, "vocabulary": COLUMNS, "hidden_size": HIDDEN}
    of_part = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "repetitions": arguments.repetitions,
    }
    parts = arguments.parts or ["draws", *MODELS]
    if "draws" in parts:
        result["draws"] = of_part | measure_draws(arguments.repetitions)
    for name in MODELS.keys() & parts:
        repetitions = max(1, arguments.repetitions // 2)
        of_rollouts = {**of_part, "repetitions": repetitions}
        measured = measure_rollout(MODELS[name], arguments.response_length, repetitions)
        result["rollouts"][name] = of_rollouts | measured
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
