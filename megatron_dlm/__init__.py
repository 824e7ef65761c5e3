"""Autoregressive language models into block-diffusion models, on Megatron-Core."""

import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dlm.api import Model, Response, convert, generate, load, loss

__version__ = "0.1.0"

__all__ = ["Model", "Response", "__version__", "convert", "generate", "load", "loss"]

# Megatron-Core warns at import about every optional package that is not installed. Those that a run
# asks for are checked by `megatron_dlm.config.validation`, with an error that says so.
warnings.filterwarnings("ignore", module=r"megatron\.")
# Its distributed checkpoints use interfaces that PyTorch is about to replace.
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
# Of every model, 0.19 says that its class will have a successor.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)


class _MegatronFinder:
    """Lets the package that knows the device import Megatron-Core, whoever asks for it first."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: object = None
    ) -> ModuleSpec | None:
        if name != "megatron.core":
            return None
        from megatron_dlm.platform.megatron_import import lean_spec

        return lean_spec(path)


sys.meta_path.insert(0, _MegatronFinder())


def __getattr__(name: str) -> Any:
    """Import the Python interface when it is first used: it loads PyTorch and Megatron-Core."""
    if name in __all__:
        return getattr(importlib.import_module("megatron_dlm.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
