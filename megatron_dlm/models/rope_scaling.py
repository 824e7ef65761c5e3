"""The rotary embedding that a config.json asks for: its base and how its frequencies are scaled.

Two scalings stretch a model to longer texts than it was trained on first: `llama3` (Llama 3.1) and
`yarn` (Peng et al. 2023). Their keys are those of transformers.
"""

from collections.abc import Mapping
from typing import Any

from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.models.config_keys import ROPE_KEYS, checked_keys

_ORIGINAL = "original_max_position_embeddings"
_NEEDED = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL),
}
_OPTIONAL = {
    "llama3": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}


def read_rotary_embedding(
    config: Mapping[str, Any], where: str, default_base: float | None = None
) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary embedding, read from the same keys as transformers does.

    `rope_scaling`, the older key, is used if it is not empty, else `rope_parameters`. A top-level
    `rope_theta` counts only if neither has one; a top-level `original_max_position_embeddings`
    overrides theirs.

    Args:
        config: config.json without its nulls.
        where: Name of the file for error messages.
        default_base: Base if the file states none.

    Returns:
        The base, and the keys of the scaling with `rope_type` among them; None without scaling.

    Raises:
        KeyError: There is no base.
        UserError: The scaling is unknown, incomplete or impossible.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    stated = config.get(key, {})
    parameters = checked_keys(stated, ROPE_KEYS, f"{where}: {key}")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UserError(
            f"{where}: {key} differ from layer to layer; use a checkpoint with one for all layers"
        )
    base = parameters.get("rope_theta", config.get("rope_theta", default_base))
    if base is None:
        raise KeyError("rope_theta")
    for rotated in (parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor")):
        if rotated not in (None, 1, 1.0):
            raise bad_value(
                f"{where}: partial_rotary_factor",
                rotated,
                "is not supported",
                "use a checkpoint that rotates whole heads",
            )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(base), None
    if kind not in _NEEDED:
        raise UserError(
            f"{where}: {key} = {kind!r}: is not supported; use the unscaled checkpoint, or one with"
            f" {' or '.join(_NEEDED)}"
        )
    if _ORIGINAL in config:
        parameters[_ORIGINAL] = config[_ORIGINAL]
    for needed in _NEEDED[kind]:
        if needed not in parameters:
            raise bad_value(
                f"{where}: {key}: {needed}",
                None,
                f"this key is missing, which {kind} needs",
                "use the config.json that was published with the weights",
            )
    scaling = {"rope_type": kind}
    scaling |= {
        name: parameters[name] for name in (*_NEEDED[kind], *_OPTIONAL[kind]) if name in parameters
    }
    if "truncate" in stated and stated["truncate"] is None:
        scaling["truncate"] = False  # as transformers reads a null
    if base == 1:
        raise bad_value(f"{where}: rope_theta", base, "is no base to scale", "state the true one")
    _check(scaling, f"{where}: {key}")
    return float(base), scaling


def _check(scaling: Mapping[str, Any], where: str) -> None:
    """Check that the upper bound is above the lower one."""
    bounds = {
        "llama3": (("low_freq_factor", 0.0), ("high_freq_factor", 0.0)),
        "yarn": (("beta_slow", 1.0), ("beta_fast", 32.0)),
    }
    (low, low_default), (high, high_default) = bounds[scaling["rope_type"]]
    if scaling.get(high, high_default) <= scaling.get(low, low_default):
        raise bad_value(
            f"{where}: {high}",
            scaling.get(high, high_default),
            f"is not above {low} = {scaling.get(low, low_default)}",
            "use the config.json that was published with the weights",
        )
