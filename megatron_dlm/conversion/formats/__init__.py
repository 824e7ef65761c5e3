"""What a Hugging Face folder holds beside the weights: one function a target format.

A format is a function that checks the request and writes config.json, tokenizer and other files.
"""

from collections.abc import Callable
from pathlib import Path

from megatron_dlm.conversion.formats.autoregressive import write_autoregressive
from megatron_dlm.conversion.formats.masked_lm import write_a2d_qwen3, write_rnd1
from megatron_dlm.conversion.formats.request import ExportRequest
from megatron_dlm.conversion.formats.sdar import write_sdar

TARGET_FORMATS: dict[str, Callable[[ExportRequest, Path], None]] = {
    "sdar": write_sdar,
    "a2d-qwen3": write_a2d_qwen3,
    "rnd1": write_rnd1,
    "autoregressive": write_autoregressive,
}

FORMATS_WITH_HEAD = frozenset({"sdar"})
"""Formats that hold the output layer even where it is tied to the embeddings, and say that it is
not: SGLang's loader looks it up in any case."""

__all__ = ["FORMATS_WITH_HEAD", "TARGET_FORMATS", "ExportRequest"]
