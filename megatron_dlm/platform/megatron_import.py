"""Import Megatron-Core without what this process has no use for.

While it is imported, Megatron-Core decorates its fused functions with `torch.compile`, for which
PyTorch imports its whole compiler, and imports TensorBoard for a type. Both together take longer
than the rest of Megatron-Core. Without a GPU nothing is compiled (see `megatron_dlm.platform.cpu`),
so there the functions stay as they are; with one they are decorated as ever.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

import torch

_TENSORBOARD = "torch.utils.tensorboard"


def lean_spec(path: Sequence[str] | None) -> ModuleSpec | None:
    """How to import the package `megatron.core`, found in the folders of `path`; None: it is not.

    Its submodules, whenever they are imported, follow: they take the decorator from the package.
    """
    spec = PathFinder.find_spec("megatron.core", path)
    if spec is not None and isinstance(spec.loader, SourceFileLoader):
        spec.loader = _LeanLoader(spec.loader.name, spec.loader.path)
    return spec


class _LeanLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Run the package's code, with PyTorch as it was before and after."""
        with _without_tensorboard(), _without_compiler():
            super().exec_module(module)


@contextmanager
def _without_tensorboard() -> Iterator[None]:
    absent = _TENSORBOARD not in sys.modules
    if absent:
        sys.modules[_TENSORBOARD] = None  # type: ignore[assignment]  # "not installed"
    try:
        yield
    finally:
        if absent:
            del sys.modules[_TENSORBOARD]


@contextmanager
def _without_compiler() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    compile = torch.compile
    torch.compile = _unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
