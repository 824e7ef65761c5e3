"""Evaluation tasks by name: benchmarks, and prompts as they are with a reward's name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.rewards import REWARDS
from megatron_dlm.evaluation.tasks import choices, code, instructions, mathematics, reasoning
from megatron_dlm.evaluation.tasks.base import Task

__all__ = ["TASKS", "Task", "get_task"]

TASKS: dict[str, Task] = {
    task.name: task
    for module in (mathematics, choices, instructions, code, reasoning)
    for task in module.TASKS
} | {name: Task(name=name, reward=name) for name in REWARDS}


def get_task(name: str, field: str = "--task") -> Task:
    """Return a task by name, or the `TASK` of a Python file or an import path.

    Args:
        name: One of `TASKS`; ``my_task.py``, a file that defines `TASK`; or
            ``package.module:function``, a reward for prompts as they are.
        field: The option that names it, for error messages.

    Raises:
        UserError: There is no such task.
    """
    if name in TASKS:
        return TASKS[name]
    if name.endswith(".py"):
        return _of_file(name, field)
    if ":" in name:
        return Task(name=name, reward=name)
    known = ", ".join(sorted(TASKS))
    problem, remedy = "unknown task", f"choose one of {known}, or name a .py file with a TASK"
    raise bad_value(field, name, problem, remedy)


def _of_file(name: str, field: str) -> Task:
    path = Path(name)
    if not path.is_file():
        raise bad_value(field, name, "there is no such file", "name a .py file with a TASK")
    spec = importlib.util.spec_from_file_location(f"user_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        problem = f"cannot be run ({type(error).__name__}: {error})"
        raise bad_value(field, name, problem, "repair it") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        remedy = "define TASK, a megatron_dlm.evaluation.tasks.Task"
        raise bad_value(field, name, "defines no task", remedy)
    return task
