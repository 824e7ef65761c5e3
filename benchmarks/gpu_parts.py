"""The measurements of `benchmarks/gpu.py`: attention, training, rollout and divergence.

Each runs in this process, on its device, and returns what is written into the result file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.iteration import Iteration, iteration
from benchmarks.real_shapes import SHAPES
from megatron_dlm import platform
from megatron_dlm.accounting.machine import measured
from megatron_dlm.config.groups import RolloutGraphs
from megatron_dlm.data.packing import TrainingBatch
from megatron_dlm.distillation.vocab_parallel_divergence import vocab_parallel_divergence
from megatron_dlm.models.attention import flex_attention_over_row, sdpa_attention
from megatron_dlm.models.attention_layout import clean_layout
from megatron_dlm.training.throughput import peak_memory
from megatron_dlm.types.divergence_spec import DivergenceSpec
from megatron_dlm.types.trajectory import Trajectory

VOCAB_SIZE = 151_936


@dataclass(frozen=True)
class Load:
    """How much is measured.

    Attributes:
        device: `cuda`, or `cpu` to see that everything runs.
        shapes: Models.
        row_tokens: Of a row of training, and of the divergence.
        rows: Micro-batches of an update.
        updates: Measured ones; two more warm up.
        sequences: Decoded at once.
        response_length: Their tokens.
        attention_lengths: Rows that attention is compared on.
        vocab_size: Of the divergence.
    """

    device: str = "cuda"
    shapes: tuple[str, ...] = ("qwen3_0.6b", "qwen3_1.7b", "qwen3_4b")
    row_tokens: int = 8_192
    rows: int = 4
    updates: int = 3
    sequences: int = 128
    response_length: int = 256
    attention_lengths: tuple[int, ...] = (1, 119, 128, 129, 4_096, 9_088)
    vocab_size: int = VOCAB_SIZE


DRY = Load(
    device="cpu",
    shapes=("tiny",),
    row_tokens=256,
    rows=1,
    updates=1,
    sequences=4,
    response_length=8,
    attention_lengths=(1, 119, 128, 129),
    vocab_size=512,
)
"""A minute of one processor core at most: does it run?"""

TRAINING_GOAL = {"least": 0.45, "goal": 0.55}
"""Shares of the measured rate of bf16 products."""
GRAPHS: tuple[RolloutGraphs, ...] = ("off", "on")
ROLLOUT_LEAST = {"qwen3_0.6b": 30_000, "qwen3_4b": 12_000}
"""Tokens per second."""
DIVERGENCE_MOST = 2**30
"""Bytes beside the gradients."""
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
"""Largest error over the largest value."""


def compiled_graphs() -> int:
    """Graphs that `torch.compile` has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def row_layout(length: int) -> Tensor:
    """Two documents of clean and noisy blocks of 4, as in training; [4, length]."""
    parts = []
    for document, tokens in enumerate((length - length // 4, length // 4)):
        clean = clean_layout([tokens - tokens // 2], "block_causal", 4)
        noisy = clean[:, : tokens // 2].clone()
        noisy[2] = 1 - noisy[2]
        both = torch.cat((clean, noisy), dim=1)
        both[0] = document
        parts.append(both)
    return torch.cat(parts, dim=1)


def measure_attention(load: Load) -> dict[str, Any]:
    """FlexAttention against the reference attention: results, gradients, and their times.

    Raises:
        AssertionError: They differ.
    """
    platform.select("cuda" if load.device == "cuda" else "cpu")
    has_gradients = platform.is_cuda()  # on a CPU FlexAttention has none
    kinds = [torch.float32, torch.bfloat16] if has_gradients else [torch.float32]
    results: dict[str, Any] = {}
    for length in load.attention_lengths:
        layout = row_layout(length).to(platform.device())
        # The dense scores of the reference in float32 are 8 heads x 9,088^2 x 4 bytes at most.
        inputs = [_normal(length, 1, heads, 128) for heads in (8, 4, 4)]
        reference = _attend(sdpa_attention, inputs, layout, torch.float32, has_gradients)
        errors = {}
        for kind in kinds:
            found = _attend(flex_attention_over_row, inputs, layout, kind, has_gradients)
            errors[str(kind)] = error = max(map(_error, found, reference))
            if not error <= TOLERANCE[kind]:
                raise AssertionError(f"flex differs from sdpa at {length} tokens by {error}")
        results[str(length)] = {
            "error": errors,
            "flex_seconds": _attention_seconds(flex_attention_over_row, inputs, layout),
            "sdpa_seconds": _attention_seconds(sdpa_attention, inputs, layout),
        }
    # Kernels are there now, and other lengths need no new ones.
    graphs = compiled_graphs()
    for length in (256, 640, 1_280, 3_968) if platform.is_cuda() else (130,):
        layout = row_layout(length).to(platform.device())
        inputs = [_normal(length, 1, heads, 128) for heads in (8, 4, 4)]
        for kind in kinds:
            _attend(flex_attention_over_row, inputs, layout, kind, has_gradients)
    return {"lengths": results, **_recompilations(compiled_graphs() - graphs)}


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator(platform.device()).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=platform.device())


def _attend(
    attention: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    layout: Tensor,
    kind: torch.dtype,
    has_gradients: bool,
) -> list[Tensor]:
    """Context, and with gradients those of query, key and value."""
    leaves = [x.to(kind, copy=True).requires_grad_(has_gradients) for x in inputs]
    context = attention(*leaves, layout, 128**-0.5)
    if not has_gradients:
        return [context]
    generator = torch.Generator(context.device).manual_seed(0)
    context.backward(
        torch.randn(context.shape, generator=generator, device=context.device).to(kind)
    )
    return [context.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _error(found: Tensor, reference: Tensor) -> float:
    largest = reference.abs().max().clamp(min=1e-6)
    return float((found.float() - reference).abs().max() / largest)


def _attention_seconds(
    attention: Callable[..., Tensor], inputs: Sequence[Tensor], layout: Tensor
) -> float:
    """Forward, and backward where there is one, in bf16; the median of five, on a CPU of one."""
    kind = torch.bfloat16 if platform.is_cuda() else torch.float32

    def once() -> None:
        _attend(attention, inputs, layout, kind, platform.is_cuda())

    once()
    return statistics.median(_seconds(once) for _ in range(5 if platform.is_cuda() else 1))


def _seconds(work: Callable[[], object]) -> float:
    platform.synchronize()
    started = time.perf_counter()
    work()
    platform.synchronize()
    return time.perf_counter() - started


def _recompilations(number: int) -> dict[str, Any]:
    failed = {"failed": f"{number} graphs were compiled after warm-up"} if number else {}
    return {"recompilations": number, **failed}


def measure_model(shape: str, load: Load) -> dict[str, Any]:
    """Training and rollout of a shape, with random weights.

    Random weights end no response and are sure of nothing: all sequences have full length.
    """
    options: dict[str, Any] = dict(
        device=load.device,
        bf16=load.device == "cuda",
        max_tokens_per_micro_batch=load.row_tokens,
        remasking_strategy="low_confidence_static",
        max_running_requests=load.sequences,
    )
    platform.release_memory()
    with iteration(SHAPES[shape], **options) as built:
        # Four responses fill a row.
        rows = built.rows([load.row_tokens // 4] * (4 * load.rows))
        for _ in range(2):
            built.update(rows)
        warm = compiled_graphs()
        training = _measured_training(built, rows, load)
        recompiled = compiled_graphs() - warm
        prompts = built.prompts(load.sequences, 128)
        engines = {choice: built.engine(rollout_graphs=choice) for choice in GRAPHS}
        rollouts, responses = {}, {}
        for choice, engine in engines.items():
            generate = partial(engine.generate, prompts, load.response_length)
            responses[choice] = [each.response_ids for each in generate()]
            warm = compiled_graphs()
            rollouts[choice] = _measured_rollout(shape, generate)
            recompiled += compiled_graphs() - warm
    same = [torch.equal(*pair) for pair in zip(*responses.values(), strict=True)]
    return {
        "training": training,
        "rollout": rollouts["off"],
        "rollout_with_graphs": {**rollouts["on"], "same_responses": sum(same) / len(same)},
        **_recompilations(recompiled),
    }


def _measured_training(
    built: Iteration, rows: Sequence[TrainingBatch], load: Load
) -> dict[str, Any]:
    machine = measured(torch.bfloat16 if built.config.model.bf16 else torch.float32)
    _reset_peak()
    results = [built.update(rows) for _ in range(load.updates)]
    seconds = statistics.median(r.student_seconds + r.optimizer_seconds for r in results)
    flops = built.useful_flops(rows)
    share = flops / seconds / machine.flops
    return {
        "rows": [len(row.row.token_ids) for row in rows],
        "update_seconds": seconds,
        "optimizer_seconds": statistics.median(r.optimizer_seconds for r in results),
        "tokens_per_second": sum(len(row.row.token_ids) for row in rows) / seconds,
        "useful_flops": flops,
        "measured_rate": machine.flops,
        "share_of_rate": share,
        **TRAINING_GOAL,
        "meets_least": share >= TRAINING_GOAL["least"],
        "peak_memory_gib": peak_memory() / 2**30,
    }


def _measured_rollout(shape: str, generate: Callable[[], list[Trajectory]]) -> dict[str, Any]:
    trajectories: list[Trajectory] = []
    seconds = _seconds(lambda: trajectories.extend(generate()))
    tokens = sum(len(trajectory.response_ids) for trajectory in trajectories)
    least = ROLLOUT_LEAST.get(shape)
    return {
        "sequences": len(trajectories),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "least": least,
        "meets_least": None if least is None else tokens / seconds >= least,
    }


def _reset_peak() -> None:
    if platform.is_cuda():
        torch.cuda.reset_peak_memory_stats()


def measure_divergence(load: Load) -> dict[str, Any]:
    """Memory that the divergence of a row takes beside gradients, and its time, at Qwen3-4B's head.

    Raises:
        AssertionError: It takes more than a GiB on CUDA.
    """
    platform.select("cuda" if load.device == "cuda" else "cpu")
    width = 2_560 if platform.is_cuda() else 32
    kind = torch.bfloat16 if platform.is_cuda() else torch.float32
    tokens, vocab = load.row_tokens, load.vocab_size
    hidden, teacher = (_normal(tokens, width).to(kind) for _ in range(2))
    head, teacher_head = (_normal(vocab, width).mul_(width**-0.5).to(kind) for _ in range(2))
    hidden.requires_grad_()
    head.requires_grad_()
    weights = torch.ones(tokens, device=platform.device())
    spec = DivergenceSpec.parse("forward_kl")

    def loss(count: int) -> Tensor:
        rows = slice(0, count)
        inputs = (hidden[rows], head, teacher[rows], teacher_head, weights[rows])
        return vocab_parallel_divergence(*inputs, spec, vocab)[0]

    loss(64).backward()
    hidden.grad = head.grad = None
    baseline = torch.cuda.memory_allocated() if platform.is_cuda() else 0
    _reset_peak()
    values: list[Tensor] = []
    seconds = _seconds(lambda: values.append(loss(tokens)))
    # Gradients are made in the forward pass: the head's in float32.
    gradients = hidden.numel() * hidden.element_size() + 4 * head.numel()
    extra = peak_memory() - baseline - gradients if platform.is_cuda() else None
    values[0].backward()
    if extra is not None and extra >= DIVERGENCE_MOST:
        raise AssertionError(f"the divergence takes {extra / 2**30:.2f} GiB beside its gradients")
    return {
        "tokens": tokens,
        "vocab_size": vocab,
        "hidden_size": width,
        "extra_bytes": extra,
        "most": DIVERGENCE_MOST,
        "seconds": seconds,
    }
