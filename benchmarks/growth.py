"""How costs grow with sequence, block, vocabulary, experts and ranks, with an exponent for each.

    python -m benchmarks.growth --output benchmarks/results/growth

FLOPs, pairs and forwards are counted where they happen, on the host; kernels, bytes and collectives
on tensors without data (`megatron_dlm.accounting.fake_cuda`), of one layer of Qwen3-0.6B or, with
experts, of Qwen3-30B-A3B. None of these depends on the machine. An update's processor seconds are
those of a tiny model, so that the CPU shows the same growth. Writes growth.json and growth.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.environment import commit, machine, versions

LENGTHS = (1_024, 2_048, 4_096, 8_192, 16_384)
BLOCKS = (4, 8, 16, 32)
VOCABULARIES = (32_768, 65_536, 131_072, 262_144)
EXPERTS = (16, 32, 64, 128)
RANKS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Growth:
    """A cost along an axis.

    Attributes:
        cost: What grows.
        axis: With what.
        nature: The exponent that the method itself has.
        why: Where that is above one, or above what the axis suggests.
        sizes: On the axis.
        values: Of the cost.
    """

    cost: str
    axis: str
    nature: float
    why: str
    sizes: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """Slope of the least-squares line through the logarithms."""
        x, y = ([math.log(max(v, 1e-12)) for v in values] for values in (self.sizes, self.values))
        return statistics.linear_regression(x, y).slope

    @property
    def last_exponent(self) -> float:
        """Slope between the two largest sizes, where a small quadratic part shows first."""
        (x0, x1), (y0, y1) = self.sizes[-2:], self.values[-2:]
        return math.log(y1 / y0) / math.log(x1 / x0) if y0 and y1 else 0.0


def _growths(
    axis: str,
    sizes: Sequence[int],
    measure: Callable[[int], dict[str, float]],
    nature: Mapping[str, tuple[float, str]],
) -> list[Growth]:
    """Measure costs at each size of an axis."""
    measured = [measure(size) for size in sizes]
    return [
        Growth(cost, axis, *nature[cost], tuple(sizes), tuple(point[cost] for point in measured))
        for cost in measured[0]
    ]


def on_host(
    lengths: Sequence[int] = LENGTHS, blocks: Sequence[int] = BLOCKS, response: int = 64
) -> list[Growth]:
    """Costs that the host's own code decides: rows, pairs, masks and forwards."""
    from torch import Tensor

    from benchmarks.iteration import iteration
    from benchmarks.real_shapes import SHAPES
    from megatron_dlm.accounting.flops import ForwardFlops, visible_pairs
    from megatron_dlm.models.architecture import architecture_from_hf
    from megatron_dlm.models.attention import FLEX_TILE
    from megatron_dlm.models.block_mask import tile_visibility

    flops = ForwardFlops.of(architecture_from_hf(SHAPES["qwen3_0.6b"]))
    tiny = {**SHAPES["tiny"], "max_position_embeddings": 2 * max(lengths)}
    found: list[Growth] = []
    with iteration(tiny, device="cpu", max_tokens_per_micro_batch=max(lengths)) as built:

        def row(length: int) -> dict[str, float]:
            costs: dict[str, float] = {}
            for name, parts in (("one document", [length]), ("documents of 1k", length // 1_024)):
                documents = parts if isinstance(parts, list) else [1_024] * parts
                (batch,) = built.rows(documents)
                layout = batch.row.attention
                assert isinstance(layout, Tensor)
                pairs, tokens = visible_pairs(layout), layout.shape[1]
                supervised = len(batch.supervised)
                costs[f"pairs of an update, {name}"] = pairs
                costs[f"FLOPs of an update, {name}"] = 3 * flops.forward(tokens, pairs, supervised)
                table = tile_visibility(layout, layout, FLEX_TILE)
                costs[f"tiles that attention visits, {name}"] = int(table.some.sum())
            return costs

        one = "a token sees all blocks before its own"
        found += _growths(
            "sequence",
            lengths,
            row,
            {
                "pairs of an update, one document": (2, one),
                "FLOPs of an update, one document": (2, one),
                "tiles that attention visits, one document": (2, one),
                "pairs of an update, documents of 1k": (1, ""),
                "FLOPs of an update, documents of 1k": (1, ""),
                "tiles that attention visits, documents of 1k": (1, ""),
            },
        )
        static = {"remasking_strategy": "low_confidence_static", "max_running_requests": 2}

    def rollout(block: int) -> dict[str, float]:
        options: dict[str, Any] = dict(device="cpu", block_size=block, temperature=0.0, **static)
        with iteration(tiny, **options) as built:
            engine = built.engine()
            # Random weights: the first tokens of each response are what counts, none ends early.
            texts = engine.generate(built.prompts(2), response)
            work = engine.work.take()
        tokens = sum(len(text.response_ids) + len(text.tail_ids) for text in texts)
        total = flops.forward(sum(work.tokens), sum(work.pairs), sum(work.logits))
        return {
            "FLOPs of a decoded token": total / tokens,
            "forwards of a decoded token": 2 * len(work.tokens) / tokens,
            "tokens in the forwards of a decoded token": sum(work.tokens) / tokens,
        }

    steps = "each step of a block computes all of it, and keeps one token"
    found += _growths(
        "block",
        blocks,
        rollout,
        {
            "FLOPs of a decoded token": (1, steps),
            "forwards of a decoded token": (0, ""),
            "tokens in the forwards of a decoded token": (1, steps),
        },
    )
    return found


def on_device(points: int = 5) -> list[Growth]:
    """Costs of the device, counted without one, at the first so many sizes of each axis."""
    import torch

    from benchmarks.iteration import Iteration, iteration
    from benchmarks.real_shapes import SHAPES
    from megatron_dlm.accounting.fake_cuda import balanced_routing, fake_cuda
    from megatron_dlm.accounting.operations import OperationCounter

    dense = {**SHAPES["qwen3_0.6b"], "num_hidden_layers": 1}
    sparse = {**SHAPES["qwen3_30b_a3b"], "num_hidden_layers": 1}

    def update(built: Iteration, lengths: Sequence[int]) -> dict[str, float]:
        rows = built.rows(lengths)
        with OperationCounter() as counter:
            built.update(rows)
        counts = counter.counts
        return {
            "kernels of an update": counts.kernels,
            "bytes of an update": counts.bytes,
            "waits of an update": counts.synchronisations + counts.copies_to_host,
        }

    def step(built: Iteration) -> dict[str, float]:
        from megatron_dlm.models.forward import clean_row, forward_hidden

        rows = [clean_row([torch.arange(1, 65)], "causal")]
        forward_hidden(built.student.model, rows)  # what is found out once in a process
        with OperationCounter() as counter:
            forward_hidden(built.student.model, rows)
        counts = counter.counts
        return {
            "kernels of a step": counts.kernels,
            "bytes of a step": counts.bytes,
            "collective bytes of a step": counts.collective_bytes,
        }

    def build(model: dict[str, Any], **options: Any) -> Any:
        values: dict[str, Any] = dict(device="cuda", bf16=True, use_distributed_optimizer=True)
        return iteration(model, **values, **options)

    def by_length(length: int) -> dict[str, float]:
        with build(dense, max_tokens_per_micro_batch=length) as built:
            return update(built, [length])

    def by_vocabulary(size: int) -> dict[str, float]:
        with build({**dense, "vocab_size": size}, max_tokens_per_micro_batch=2_048) as built:
            return update(built, [2_048])

    def by_experts(number: int) -> dict[str, float]:
        model = {**sparse, "num_experts": number}
        with build(model, max_tokens_per_micro_batch=2_048) as built:
            costs = update(built, [2_048]) | step(built)
        del costs["collective bytes of a step"]
        return costs

    def by_ranks(number: int) -> dict[str, float]:
        ranks: dict[str, Any] = dict(expert_model_parallel_size=number, global_batch_size=number)
        with (
            fake_cuda(0, number),
            build(sparse, **ranks, rollout_batch_size=number) as built,
            balanced_routing(),
        ):
            return step(built) | {
                name: value for name, value in update(built, [2_048]).items() if "waits" not in name
            }

    chunks = "chunks of the output layer's logits"
    natures = {
        "kernels of an update": (0, ""),
        "bytes of an update": (1, ""),
        "waits of an update": (0, ""),
        "kernels of a step": (0, ""),
        "bytes of a step": (1, "weights of all experts are read"),
        "collective bytes of a step": (1, "short rows are gathered: a rank gets those of all"),
    }
    found: list[Growth] = []
    with fake_cuda():
        found += _growths(
            "sequence",
            LENGTHS[:points],
            by_length,
            {**natures, "kernels of an update": (1, chunks)},
        )
        found += _growths(
            "vocabulary",
            VOCABULARIES[:points],
            by_vocabulary,
            {
                **natures,
                "kernels of an update": (1, chunks),
                "bytes of an update": (
                    2,
                    f"{chunks}: more of them, as a chunk has fixed memory, "
                    "and each adds to the gradient of the whole layer",
                ),
            },
        )
        found += _growths("experts", EXPERTS[:points], by_experts, natures)
    found += _growths("ranks", RANKS[:points], by_ranks, natures)
    return found


def on_cpu(lengths: Sequence[int] = LENGTHS[:3]) -> list[Growth]:
    """Processor seconds of updates of a tiny model; the fastest of three."""
    from benchmarks.iteration import iteration
    from benchmarks.real_shapes import SHAPES

    tiny = {**SHAPES["tiny"], "max_position_embeddings": 2 * max(lengths)}
    with iteration(tiny, device="cpu", max_tokens_per_micro_batch=max(lengths)) as built:

        def update(length: int) -> dict[str, float]:
            costs = {}
            for name, parts in (
                ("one document", [length]),
                ("documents of 1k", [1_024] * (length // 1_024)),
            ):
                rows, seconds = built.rows(parts), []
                for _ in range(3):
                    started = time.process_time()
                    built.update(rows)
                    seconds.append(time.process_time() - started)
                costs[f"processor seconds of an update, {name}"] = min(seconds)
            return costs

        return _growths(
            "sequence",
            lengths,
            update,
            {
                "processor seconds of an update, one document": (2, "attention"),
                "processor seconds of an update, documents of 1k": (1, ""),
            },
        )


def draw(growths: Sequence[Growth], path: Path) -> None:
    """A panel for each axis: costs over their first value, with exponents."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(growth.axis for growth in growths))
    with mpl.rc_context({"svg.hashsalt": "megatron-dlm", "svg.fonttype": "none", "font.size": 8}):
        figure, panels = plt.subplots(1, len(axes), figsize=(4.2 * len(axes), 5))
        for axis, panel in zip(axes, panels, strict=True):
            for growth in (g for g in growths if g.axis == axis):
                first = growth.values[0] or 1.0
                label = f"{growth.cost}: {growth.exponent:.2f}"
                panel.plot(growth.sizes, [v / first for v in growth.values], "o-", label=label)
            panel.set(xscale="log", yscale="log", xlabel=axis, title=axis)
            sizes = max((g.sizes for g in growths if g.axis == axis), key=len)
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
            panel.minorticks_off()
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
        panels[0].set_ylabel("cost over that of the smallest size")
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and time everything; each kind in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="without .json and .svg")
    output = parser.parse_args(arguments).output
    context = multiprocessing.get_context("spawn")
    growths: list[Growth] = []
    for kind in (on_host, on_device, on_cpu):
        with context.Pool(1) as pool:
            growths += pool.apply(kind)
    result = {
        "commit": commit(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "growth": [
            {**asdict(g), "exponent": round(g.exponent, 3), "last": round(g.last_exponent, 3)}
            for g in growths
        ],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(growths, output.with_suffix(".svg"))
    for growth in growths:
        print(f"{growth.axis:12}{growth.cost:60}{growth.exponent:6.2f}{growth.last_exponent:6.2f}")


if __name__ == "__main__":
    main()
