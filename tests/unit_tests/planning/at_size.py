"""A rank of a job of any size, on tensors without data: all steps of a run but its files.

    python -m tests.unit_tests.planning.at_size cases.json results.json

Process groups, student, teacher, optimizer, the teacher over a batch, an update by Megatron's
schedule, a rollout of some blocks, and what the rank would
save. For each case, bytes of the device: alive before and after the update
(`built`, `resident`), and at most in each phase.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.real_shapes import SHAPES
from megatron_dlm.accounting.fake_cuda import balanced_routing, fake_cuda
from megatron_dlm.accounting.live_memory import LiveMemory
from megatron_dlm.megatron_internals import neighbour_shapes


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case: shape, world, rank, options, lengths, rows, blocks of a rollout, teaches."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from torch.nn import Module

    from benchmarks import iteration as iterations
    from megatron_dlm.models.model_provider import build_frozen_model
    from megatron_dlm.teacher.frozen import frozen_teacher
    from megatron_dlm.training.checkpointing import sharded_state

    prompt, response, found = case["prompt"], case["response"], dict[str, Any]()
    iterations.PROMPT = prompt
    values = {"device": "cuda", "bf16": True, "use_distributed_optimizer": True, **case["options"]}
    with (
        fake_cuda(case["rank"], case["world"]),
        balanced_routing(),
        LiveMemory() as memory,
        iterations.iteration(SHAPES[case["shape"]], copies_head=False, **values) as made,
    ):
        student: Any = made.student
        teacher = frozen_teacher(
            build_frozen_model(made.architecture, made.config), made.config, None
        )
        built = replace(made, teacher_head=teacher.head)
        model: Module = student.model
        found["parameters"] = sum(p.numel() for p in model.parameters())
        found["experts"] = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        rows = built.rows([prompt + 2 * response] * case["rows"])
        tokens = len(rows[0].row.token_ids)
        prepare = student.optimizer.prepare_grads
        parts = built.config.parallel.tensor_model_parallel_size
        with neighbour_shapes((tokens // parts, 1, built.architecture.hidden_size)):
            gc.collect()
            found["built"] = memory.now
            memory.begin()

            def at_the_optimizer() -> Any:
                student.optimizer.prepare_grads = prepare
                found["update"] = memory.begin()
                return prepare()

            student.optimizer.prepare_grads = at_the_optimizer
            built.update(rows)
            gc.collect()
            found["optimizer step"], found["resident"] = memory.begin(), memory.now
        if case.get("teaches"):
            found["teacher"] = _teaching(case, built, teacher, memory)
        if case.get("rollout"):
            found["rollout"] = _rollout(case, built, memory)
        state = sharded_state(student.model, student, is_loading=False)
        found["saved"] = len(list(nested_values(state)))
    gc.collect()
    return found


def _teaching(case: dict[str, Any], built: Any, teacher: Any, memory: LiveMemory) -> int:
    from megatron_dlm.models.forward import row_multiple

    lengths = [case["prompt"] + 2 * case["response"]] * case["rows"]
    trajectories = [built._trajectory(i, length) for i, length in enumerate(lengths)]
    multiple = row_multiple(teacher.model)
    tokens = -(-(len(trajectories[0].token_ids) - 1) // multiple) * multiple
    memory.begin()
    parts = built.config.parallel.tensor_model_parallel_size
    with neighbour_shapes((tokens // parts, 1, built.architecture.hidden_size)):
        teacher.annotate(trajectories)
    return memory.begin()


def _rollout(case: dict[str, Any], built: Any, memory: LiveMemory) -> int:
    from benchmarks.counts import _one_token_a_step

    length, count = case["rollout"] * built.config.model.block_size, case["rows"]
    memory.begin()
    with _one_token_a_step(length):
        built.engine().generate(built.prompts(count, case["prompt"]), length)
    return memory.begin()


def main(cases: str, results: str) -> None:
    """Run the cases of a file."""
    import megatron_dlm.training.run  # noqa: F401

    gc.freeze()  # modules: no collection need look at them
    found = [run(case) for case in json.loads(Path(cases).read_text())]
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
