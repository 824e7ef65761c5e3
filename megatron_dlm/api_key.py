"""The key that requests to servers carry: one variable for whoever asks and whoever answers."""

import os

API_KEY_VARIABLE = "MEGATRON_DLM_API_KEY"
"""Environment variable with the key."""


def authorization(key: str | None) -> dict[str, str]:
    """The header of a request with a key; none without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def key_of_environment() -> str | None:
    """The key in `API_KEY_VARIABLE`; None where it is not set."""
    return os.environ.get(API_KEY_VARIABLE)
