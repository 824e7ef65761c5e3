"""Kernels, bytes, copies and waits of a training iteration on CUDA, counted without a GPU.

One rollout of a few sequences, the teacher over it, and an update run on tensors without data
(`megatron_dlm.accounting.fake_cuda`), at the widths of a real model and two depths; all layers are
alike, so the difference of the two is a layer.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.environment import commit, versions
from megatron_dlm.accounting.fake_cuda import balanced_routing, fake_cuda
from megatron_dlm.accounting.operations import Counts, OperationCounter

DEPTHS = (1, 2)
BLOCK_SIZE = 4
PROMPT_LENGTH = 200


@dataclass(frozen=True)
class Layout:
    """How a shape is run: on rank 0 of so many, experts split over all of them."""

    world_size: int
    options: dict[str, Any]


LAYOUTS = {
    "qwen3_0.6b": Layout(1, {}),
    "qwen3_30b_a3b": Layout(8, {"expert_model_parallel_size": 8}),
}


def count_iteration(shape: str, num_layers: int, sequences: int = 16) -> dict[str, Counts]:
    """Counts of each phase of an iteration of `opdlm`; within `fake_cuda`."""
    import torch

    from benchmarks.real_shapes import REAL_SHAPES
    from megatron_dlm.config import Config
    from megatron_dlm.config.groups import RolloutGraphs
    from megatron_dlm.distillation.vocab_parallel_top_k import vocab_parallel_top_k
    from megatron_dlm.models.architecture import architecture_from_hf
    from megatron_dlm.models.forward import clean_row, forward_hidden, row_multiple
    from megatron_dlm.models.model_provider import build_frozen_model, build_model
    from megatron_dlm.models.row_packing import RowPacking
    from megatron_dlm.objectives import OBJECTIVES
    from megatron_dlm.parallel import ParallelGroups, initialized
    from megatron_dlm.rollout.engine import RolloutEngine
    from megatron_dlm.rollout.generation_config import GenerationConfig
    from megatron_dlm.teacher.frozen import FrozenTeacher
    from megatron_dlm.training.student import build_student
    from megatron_dlm.training.train_step import train_step
    from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION
    from megatron_dlm.types.special_tokens import SpecialTokens
    from megatron_dlm.types.teacher_targets import HiddenTargets
    from megatron_dlm.types.trajectory import Prompt

    layout = LAYOUTS[shape]
    config = Config().changed(
        device="cuda",
        bf16=True,
        objective="opdlm",
        block_size=BLOCK_SIZE,
        use_distributed_optimizer=True,
        num_rollouts=10,
        rollout_batch_size=8,
        global_batch_size=8,
        **layout.options,
    )
    architecture = architecture_from_hf(REAL_SHAPES[shape] | {"num_hidden_layers": num_layers})
    vocab_size = architecture.vocab_size
    tokens = SpecialTokens(510, 508, 511, vocab_size=vocab_size)
    phases: dict[str, Counts] = {}
    with initialized(config), balanced_routing():
        groups = ParallelGroups.from_parallel_state()
        student = build_student(build_model(architecture, config), config)
        teacher = FrozenTeacher(build_frozen_model(architecture, config), RowPacking(1))
        objective = OBJECTIVES["opdlm"](config, tokens.mask_token_id, vocab_size)
        generation = GenerationConfig.from_config(config, BLOCK_DIFFUSION, BLOCK_SIZE)

        # What is found out once in a process is no part of a step.
        forward_hidden(student.model, [clean_row([torch.arange(1, 9)], "causal")])

        def engine_with(graphs: RolloutGraphs, steps: _EachStep) -> RolloutEngine:
            return RolloutEngine(
                student.model,
                generation=replace(generation, rollout_graphs=graphs),
                special_tokens=tokens,
                seed=0,
                groups=groups,
                stop=steps,  # type: ignore[arg-type]
            )

        steps = _EachStep()
        engine = engine_with("off", steps)
        prompts = [Prompt(i, torch.arange(1, PROMPT_LENGTH + 1) + i) for i in range(sequences)]
        with _one_token_a_step(3 * BLOCK_SIZE):
            trajectories = engine.generate(prompts, 3 * BLOCK_SIZE)
        steps.end()
        # The first holds the prompts, the next ones of a block hold it alone.
        phases["prefill step"], phases["rollout step"] = steps.counts[0], steps.counts[1]
        phases["step of a new block"] = steps.counts[BLOCK_SIZE]
        if layout.world_size == 1:
            steps = _EachStep()
            engine = engine_with("on", steps)
            with _one_token_a_step(3 * BLOCK_SIZE):
                engine.generate(prompts, 3 * BLOCK_SIZE)
            steps.end()
            # Of a bucket of sizes, the first step is without a graph, the second one is captured.
            phases["replayed step"] = steps.counts[3]

        with _counted(phases, "teacher"):
            teacher.annotate(trajectories[:1])
        with _counted(phases, "teacher's top-k"):
            targets = trajectories[0].targets
            assert isinstance(targets, HiddenTargets)
            assert teacher.head is not None
            vocab_parallel_top_k(targets.hidden, teacher.head, 16, vocab_size)
        document = objective.update_document(trajectories[0], 0, 0)
        batches = objective.rows([document], row_multiple(student.model))
        with OperationCounter() as counter:
            optimizer: Any = student.optimizer
            prepare = optimizer.prepare_grads

            def at_the_optimizer() -> Any:
                phases.setdefault("update", counter.take())
                optimizer.prepare_grads = prepare
                return prepare()

            optimizer.prepare_grads = at_the_optimizer
            train_step(
                student.ddp,
                optimizer,
                student.scheduler,
                objective,
                batches,
                teacher.head,
                groups,
            )
        phases["optimizer"] = counter.take()
    return phases


@contextmanager
def _one_token_a_step(steps: int) -> Iterator[None]:
    """The host reads, of tensors without values, that each sequence committed one more token."""
    from megatron_dlm.rollout.batch import DecodingBatch

    read = DecodingBatch._read
    taken: dict[int, int] = defaultdict(int)  # steps of each group

    def made_up(batch: DecodingBatch, report: Any, works: bool) -> tuple[Any, bool]:
        host, _ = read(batch, report, works)
        if len(host) == 0:
            return host, works
        taken[batch._turn] += 1
        now = taken[batch._turn]
        first = now % BLOCK_SIZE
        host[:] = 0
        host[:, BLOCK_SIZE + first : 2 * BLOCK_SIZE] = 1  # masks of the next forward
        host[:, -2], host[:, -1] = first == 0, now == steps
        return host, works or now < steps

    with patch.object(DecodingBatch, "_read", made_up):
        yield


class _EachStep:
    """Takes the place of the check for a request to stop, which comes before every forward."""

    def __init__(self) -> None:
        self.counts: list[Counts] = []
        self._counter: OperationCounter | None = None

    def end(self) -> None:
        """End the step that is counted."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None

    def check(self, in_flight: int = 1) -> None:
        """Begin to count a step."""
        self.end()
        self._counter = OperationCounter()
        self._counter.__enter__()
        self.counts.append(self._counter.counts)


@contextmanager
def _counted(phases: dict[str, Counts], name: str) -> Iterator[None]:
    with OperationCounter() as counter:
        yield
    phases[name] = counter.counts


@dataclass(frozen=True)
class Phase:
    """Counts of one phase: `model` = `rest` + layers x `layer`.

    Of the last layer a part may be left out (`models.layer`): `rest` is less by it.
    """

    layer: dict[str, int]
    rest: dict[str, int]
    model: dict[str, int]
    layer_by_name: dict[str, int]
    rest_by_name: dict[str, int]


def count_shape(shape: str) -> dict[str, Phase]:
    """Counts of each phase of a shape, in a process that computes nothing else (`fake_cuda`)."""
    from benchmarks.real_shapes import REAL_SHAPES

    num_layers = REAL_SHAPES[shape]["num_hidden_layers"]
    with fake_cuda(0, LAYOUTS[shape].world_size):
        shallow, deep = (count_iteration(shape, depth) for depth in DEPTHS)
    return {name: _phase(shallow[name], deep[name], num_layers) for name in shallow}


def _phase(shallow: Counts, deep: Counts, num_layers: int) -> Phase:
    names = [field.name for field in fields(Counts) if field.name != "by_name"]
    one = {name: getattr(shallow, name) for name in names}
    layer = {name: getattr(deep, name) - one[name] for name in names}
    return Phase(
        layer=layer,
        rest={name: one[name] - layer[name] for name in names},
        model={name: one[name] + (num_layers - 1) * layer[name] for name in names},
        layer_by_name=dict(deep.by_name - shallow.by_name),
        rest_by_name=dict(shallow.by_name - (deep.by_name - shallow.by_name)),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Count the named shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    counts = {shape: count_shape(shape) for shape in options.shapes}
    result = {
        "commit": commit(),
        "versions": versions(),
        "counts": {
            shape: {name: asdict(phase) for name, phase in phases.items()}
            for shape, phases in counts.items()
        },
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
