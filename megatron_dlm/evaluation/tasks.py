"""Evaluation tasks: what a correct response is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.evaluation.math_scoring import is_math, math_answer, math_answers_match
from megatron_dlm.evaluation.scoring import answers_match, final_answer
from megatron_dlm.extras import check_installed


@dataclass(frozen=True)
class Task:
    """A way to score responses.

    Attributes:
        name: Its name on the command line.
        reference_field: The field of a prompt record that holds the reference.
        extract: Takes the text of a response and returns its answer; None if there is none.
        matches: Whether an extracted answer equals the reference.
        can_read: Whether answers can be compared with a reference.
        package: Package of an extra that scoring imports; None for none.
    """

    name: str
    reference_field: str
    extract: Callable[[str], str | None]
    matches: Callable[[str | None, str], bool]
    can_read: Callable[[str], bool] = bool
    package: str | None = None

    def reference(self, record: Mapping[str, Any], where: str) -> str:
        """Return the reference of a record: its field, or what follows the last ``####`` in that.

        GSM8K gives an answer this way, after the solution.

        Raises:
            UserError: The field is missing or is neither text nor a number.
        """
        value = record.get(self.reference_field)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(
                f'{where}: "{self.reference_field}" = {value!r}: task {self.name!r} needs text or a'
                " number to compare with; add the field or choose another task"
            )
        text = str(value)
        return (final_answer(text) or "") if "####" in text else text

    def check(self, prompts: PromptDataset) -> None:
        """Check that every record can be scored, before anything is generated.

        Raises:
            UserError: A reference is missing or cannot be read, which names file and line; or a
                package is missing.
        """
        if self.package is not None:
            check_installed(self.package, "task", self.name)
        for where, record in prompts.file.records():
            reference = self.reference(record, where)
            if not self.can_read(reference):
                raise UserError(
                    f'{where}: "{self.reference_field}" = {record[self.reference_field]!r}: task '
                    f"{self.name!r} cannot read it, so no answer could be right; repair it or "
                    "choose another task"
                )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="exact_match",
            reference_field="answer",
            extract=final_answer,
            matches=answers_match,
        ),
        Task(
            name="math_verify",
            reference_field="answer",
            extract=math_answer,
            matches=math_answers_match,
            can_read=is_math,
            package="math_verify",
        ),
    )
}


def get_task(name: str, field: str = "--task") -> Task:
    """Return a task by name.

    Raises:
        UserError: There is no such task.
    """
    if name not in TASKS:
        raise bad_value(field, name, "unknown task", f"choose one of {', '.join(sorted(TASKS))}")
    return TASKS[name]
