"""Loops for callers: compiled once, loaded by each process.

Numba takes a process over a second and 100 MB before it calls what it compiled earlier. So it is
imported where something has to be compiled only: its code is kept in a file, which llvmlite, what
Numba compiles with, loads in some hundredths of a second.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_dlm.entry import rank
from megatron_dlm.errors import UserError
from megatron_dlm.output_file import write_file
from megatron_dlm.terminal import say

# llvmlite is imported where it is used, since what runs on CUDA does not need it.

_lock = threading.Lock()


@functools.cache
def loops_for(dtype: torch.dtype) -> Any:
    """All loops for one floating type, by name.

    For what they annotate with `Floats`, `Doubles` or `Integers` they take a contiguous tensor on
    the CPU of that type, or None.

    Args:
        dtype: float32 or float64, what `Floats` are.

    Raises:
        UserError: They have to be compiled, and Numba is told to do otherwise.
    """
    import llvmlite.binding as llvm

    with _lock:
        arguments, code = _read(dtype) or _compiled_and_kept(dtype)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _processor())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    of: dict[str, Any] = {
        "Floats": _tensors(dtype),
        "Doubles": _tensors(torch.float64),
        "Integers": _tensors(torch.int64),
        "int": ctypes.c_int64,
        "float": ctypes.c_double,
    }
    functions = {}
    for name, kinds in arguments.items():
        prototype = ctypes.CFUNCTYPE(None, *(of[kind] for kind in kinds))
        functions[name] = prototype(engine.get_function_address(name))
    return SimpleNamespace(**functions, _engine=engine)


def _tensors(dtype: torch.dtype) -> type:
    """What converts a tensor to where its numbers lie."""

    class Numbers(ctypes.c_void_p):
        @classmethod
        def from_param(cls, x: Tensor | None) -> Any:
            if x is None:
                return None
            if x.dtype != dtype or not x.is_cpu or not x.is_contiguous():
                raise ValueError(f"{x.dtype} on {x.device}, strides {x.stride()}: not {dtype}")
            return ctypes.c_void_p(x.data_ptr())

    return Numbers


def _processor() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )


def _key_now() -> str:
    """Digest of what code is made from and for."""
    import llvmlite.binding as llvm

    sources = sorted(Path(__file__).parent.glob("*.py"))
    switches = sorted(name for name in os.environ if name.startswith("NUMBA_"))
    made_from = (
        *(source.read_bytes() for source in sources),
        *(version(package).encode() for package in ("numba", "llvmlite", "numpy")),
        *(f"{name}={os.environ[name]}".encode() for name in switches),
        llvm.get_process_triple().encode(),
        llvm.get_host_cpu_name().encode(),
        llvm.get_host_cpu_features().flatten().encode(),
    )
    return hashlib.sha256(b"\0".join(made_from)).hexdigest()[:24]


_key = functools.cache(_key_now)
"""That of this process, whose modules stay as they are."""


def _files(dtype: torch.dtype) -> Iterator[Path]:
    """Where the code of these loops for this processor may be kept."""
    name = f"{str(dtype).removeprefix('torch.')}.{_key()}.o"
    yield Path(importlib.util.cache_from_source(__file__)).with_name(name)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache"))
    with suppress(RuntimeError):  # nobody's home is known
        yield caches.expanduser() / "megatron_dlm" / name


def _read(dtype: torch.dtype) -> tuple[dict[str, list[str]], bytes] | None:
    for file in _files(dtype):
        with suppress(OSError, ValueError):
            digest, arguments, code = file.read_bytes().split(b"\n", 2)
            if digest == _digest(arguments + code):
                return json.loads(arguments), code
    return None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _compiled_and_kept(dtype: torch.dtype) -> tuple[dict[str, list[str]], bytes]:
    if rank() == 0:
        say("compiling loops for this processor, once: about 10 s", error=True)
    key = _key()  # before what it is made from is imported
    from megatron_dlm.cpu_loops.compiler import compiled

    arguments, code = compiled(str(dtype).removeprefix("torch."), _processor())
    if key == _key_now():  # nobody has edited the sources
        head = json.dumps(arguments).encode()
        _keep(b"\n".join((_digest(head + code), head, code)), _files(dtype))
    return arguments, code


def _keep(content: bytes, places: Iterable[Path]) -> None:
    """Write the first file that can be; where none can, others compile what this process has."""
    for file in places:
        with suppress(UserError, OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, content)
            return
