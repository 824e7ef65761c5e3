"""Errors that a user can act on.

Every check of user input raises `UserError`; entry points turn it into one line on one rank and
an exit status (`report_user_errors`). Anything else is a defect and keeps its traceback.
"""

import difflib
import reprlib
from collections.abc import Iterable

_SHORT = reprlib.Repr()
"""Shows any value in one short line: YAML can nest without end."""
_SHORT.maxstring = _SHORT.maxother = 400
_SHORT.maxlong = 40
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 12
_SHORT.maxlevel = 3

LONGEST = 1000
"""Characters of each part of an error."""


class UserError(Exception):
    """Input that cannot work, described in one line: the field, its value and the remedy.

    Line breaks and the middle of what is very long are left out: a message can quote a file.
    """

    def __init__(self, message: str):
        super().__init__(_line(message, 4 * LONGEST))


class TrainingDiverged(UserError):
    """A run that cannot go on as it is, described in one line; it has a status of its own."""


def bad_value(field: str, value: object, problem: str, remedy: str) -> UserError:
    """Build the error for one field.

    Args:
        field: Where the user wrote it: a flag, a configuration key or `file:line`.
        value: The offending value.
        problem: Why it cannot work, as a clause ("does not divide 16 attention heads").
        remedy: What to do instead, as an imperative ("choose 1, 2 or 4").

    The middle of a long field, problem or remedy is left out.
    """
    field, problem, remedy = _line(field), _line(problem), _line(remedy)
    return UserError(f"{field} = {_SHORT.repr(value)}: {problem}; {remedy}")


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(where: str, name: str, known: Iterable[str], what: str) -> UserError:
    """The error for a name that nothing has, with the nearest one that exists."""
    near = nearest_name(name, known)
    remedy = f"did you mean {near}?" if near else "see --help for the names that exist"
    return bad_value(where, name, f"is not a known {what}", remedy)


def _line(text: str, longest: int = LONGEST) -> str:
    """The text on one line, without its middle where that is long."""
    line = " ".join(text.splitlines())
    if len(line) <= longest:
        return line
    return f"{line[: longest // 2]}...{line[-longest // 2 :]}"
