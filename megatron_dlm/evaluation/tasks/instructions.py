"""IFEval: prompts with instructions that a program can check."""

from megatron_dlm.evaluation.tasks.base import Record, Task, ask


def _ifeval(record: Record) -> Record:
    names, arguments = record["instruction_id_list"], record["kwargs"]
    return ask(record["prompt"], instruction_id_list=names, kwargs=arguments)


TASKS = (Task("ifeval", "instructions", _ifeval, "google/IFEval train"),)
