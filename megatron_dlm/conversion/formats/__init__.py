"""What a Hugging Face folder holds beside the weights: one file a target format.

A format is a function that checks the request and writes config.json, tokenizer and other files.
"""

from collections.abc import Callable
from pathlib import Path

from megatron_dlm.conversion.formats.qwen3 import write_qwen3
from megatron_dlm.conversion.formats.request import ExportRequest
from megatron_dlm.conversion.formats.sdar import write_sdar

TARGET_FORMATS: dict[str, Callable[[ExportRequest, Path], None]] = {
    "sdar": write_sdar,
    "qwen3": write_qwen3,
}

__all__ = ["TARGET_FORMATS", "ExportRequest"]
