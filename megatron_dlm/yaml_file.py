"""Read YAML mappings from files, with one-line errors."""

from types import NoneType
from typing import Any

import yaml

from megatron_dlm.errors import bad_value
from megatron_dlm.regular_file import read_regular


def read_yaml_mapping(path: str, field: str, remedy: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a file that holds one YAML mapping (or nothing), in UTF-8.

    Args:
        path: The file.
        field: The flag that it came from.
        remedy: What should be in it, for errors.

    Returns:
        Values and line numbers by key.

    Raises:
        UserError: It cannot be read, is no YAML, is something else, or has a key twice.
    """
    place, problem = path, ""
    try:
        text = read_regular(path).decode("utf-8")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
        if not isinstance(node, yaml.MappingNode | NoneType):
            problem = "is not a mapping of keys to values"
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        problem, remedy = f"cannot be read ({cause})", "give the path of a YAML file"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        cause = getattr(error, "problem", None) or "broken syntax"
        problem, remedy = f"is not YAML ({cause})", "correct that line"
    except (RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
        # Nested deeply, numbers of thousands of digits, tags that do not fit their values.
        problem = f"is not YAML ({error})"
    if problem:
        raise bad_value(field, place, problem, remedy)
    lines: dict[str, int] = {}
    for key, _ in node.value if node else ():
        name, line = str(key.value), key.start_mark.line + 1
        if name.replace("-", "_") in {known.replace("-", "_") for known in lines}:
            raise bad_value(f"{path}:{line}", name, "is given twice", "keep one of the two")
        lines[name] = line
    return {str(key): value for key, value in (values or {}).items()}, lines
