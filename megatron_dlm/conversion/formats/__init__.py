"""Target formats of exports: for each a function that writes all files but the weights.

A format is a function that checks the request and writes config.json, tokenizer and other files.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_dlm.conversion.formats.autoregressive import write_autoregressive
from megatron_dlm.conversion.formats.diffusion_files import has_two_modes, unfit_for_sdar
from megatron_dlm.conversion.formats.masked_lm import write_a2d, write_rnd1, write_two_mode
from megatron_dlm.conversion.formats.request import ExportRequest
from megatron_dlm.conversion.formats.sdar import write_sdar
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.models.families import exported_as

AUTOREGRESSIVE = "autoregressive"
"""The only format whose folders bring no modelling code."""

TARGET_FORMATS: dict[str, Callable[[ExportRequest, Path], None]] = {
    "sdar": write_sdar,
    **{name: partial(write_a2d, family=family) for name, family in exported_as("a2d").items()},
    **{
        name: partial(write_two_mode, family=family)
        for name, family in exported_as("two-mode").items()
    },
    "rnd1": write_rnd1,
    AUTOREGRESSIVE: write_autoregressive,
}

FORMATS_WITH_HEAD = frozenset({"sdar"})
"""Formats that hold the output layer even where it is tied to the embeddings, and say that it is
not: SGLang's loader looks it up in any case."""


def default_format(architecture: Architecture) -> str:
    """The default format of a block-diffusion model: `sdar` where it fits, else its family's."""
    if has_two_modes(architecture):
        return f"two-mode-{architecture.family}"
    return "sdar" if unfit_for_sdar(architecture) is None else f"a2d-{architecture.family}"


__all__ = [
    "AUTOREGRESSIVE",
    "FORMATS_WITH_HEAD",
    "TARGET_FORMATS",
    "ExportRequest",
    "default_format",
]
