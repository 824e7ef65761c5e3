"""Read JSON objects from files, with one-line errors."""

import json
from pathlib import Path
from typing import Any

from megatron_dlm.errors import bad_value
from megatron_dlm.regular_file import read_regular


def read_json_object(file: Path, field: str) -> dict[str, Any]:
    """Read a file that holds one JSON object, in UTF-8.

    Args:
        file: The file.
        field: The flag that the file or its folder came from.

    Raises:
        UserError: It cannot be read, is no JSON, or holds something else than an object.
    """
    remedy = "fetch or repair the file"
    try:
        value = json.loads(read_regular(file).decode("utf-8"))
    except OSError as error:
        problem = f"cannot be read ({error.strerror or type(error).__name__})"
        raise bad_value(field, str(file), problem, remedy) from error
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON (line {error.lineno}: {error.msg})"
        raise bad_value(field, str(file), problem, remedy) from error
    except UnicodeDecodeError as error:
        raise bad_value(field, str(file), "is not UTF-8 text", remedy) from error
    except RecursionError as error:
        raise bad_value(field, str(file), "is nested too deeply", remedy) from error
    except ValueError as error:  # Python reads no number of thousands of digits.
        raise bad_value(field, str(file), f"cannot be read ({error})", remedy) from error
    if not isinstance(value, dict):
        raise bad_value(field, str(file), "is no JSON object", remedy)
    return value
