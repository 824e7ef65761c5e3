"""Packages that only some options need, installed as extras."""

import importlib.util

from megatron_dlm.errors import bad_value

EXTRAS = {
    "datasets": "data",
    "fastapi": "serve",
    "langdetect": "eval",
    "lm_eval": "harness",
    "math_verify": "eval",
    "matplotlib": "plots",
    "prometheus_client": "serve",
    "uvicorn": "serve",
    "wandb": "wandb",
}
"""Extra that brings each package; the extras are in pyproject.toml."""


def check_installed(package: str, field: str, value: object) -> None:
    """Check that a package of an extra can be imported; imports nothing.

    Args:
        package: One of `EXTRAS`, as it is imported.
        field: Option that needs it.
        value: Value of the option.

    Raises:
        UserError: It is missing.
    """
    if importlib.util.find_spec(package) is None:
        raise bad_value(
            field,
            value,
            f"the package {package} is not installed",
            f"install it with pip install 'megatron-dlm[{EXTRAS[package]}]', or do without",
        )
