"""Import Megatron-Core without what this process has no use for.

While it is imported, Megatron-Core decorates its fused functions with `torch.compile`, for which
PyTorch imports its whole compiler, and imports TensorBoard for a type and W&B for servers. Together
they take longer than the rest of Megatron-Core. Without a GPU nothing is compiled (see
`megatron_dlm.platform.cpu`), so there the functions stay as they are; with one they are decorated
as ever.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

import torch

_UNUSED = ("torch.utils.tensorboard", "wandb")
"""Megatron-Core does without them where they are not installed."""


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
        with _without_unused(), _without_compiler():
            super().exec_module(module)


@contextmanager
def _without_unused() -> Iterator[None]:
    absent = [name for name in _UNUSED if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # "not installed"
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


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
