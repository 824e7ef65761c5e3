"""Numba compiles the loops."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from numba import cfunc, config, types

from megatron_dlm.cpu_loops import decoding, layers  # noqa: F401, register their loops
from megatron_dlm.cpu_loops.loop import LOOPS
from megatron_dlm.errors import bad_value

_OF_C = {"exp", "log", "sqrt", "memcpy", "memset"}
"""What loops may call of C's library."""


def compiled(floats: str, processor: Any) -> tuple[dict[str, list[str]], bytes]:
    """Compile the loops of `layers` and `decoding`.

    Args:
        floats: "float32" or "float64", what `Floats` are.
        processor: LLVM's target machine, this one.

    Returns:
        What the arguments of each loop are annotated with, and an object file that has a function
        of C by the loop's name.

    Raises:
        UserError: Numba is told not to compile, or to check indices, which raises.
        RuntimeError: Loops call what a process without Numba does not have.
    """
    for switch in ("DISABLE_JIT", "BOUNDSCHECK"):
        if getattr(config, switch):
            problem = "kernels on the CPU cannot be compiled with it"
            raise bad_value(f"NUMBA_{switch}", getattr(config, switch), problem, "unset it")
    of = {
        "Floats": types.CPointer(getattr(types, floats)),
        "Doubles": types.CPointer(types.float64),
        "Integers": types.CPointer(types.int64),
        "int": types.int64,
        "float": types.float64,
    }
    in_ir = {"int": "i64", "float": "double"}
    arguments: dict[str, list[str]] = {}
    module = llvm.parse_assembly("")
    for name, loop in LOOPS.items():
        if loop.only_float32 and floats != "float32":
            continue
        *kinds, _ = loop.function.__annotations__.values()
        signature = types.void(*(of[kind] for kind in kinds))
        freedoms = set(loop.fastmath)
        function = cfunc(signature, fastmath=freedoms, error_model="numpy")(loop.function)
        module.link_in(llvm.parse_assembly(function.inspect_llvm()))
        # Numba's entry makes an exception of the number that a loop returns, which raises none.
        inner = function.native_name.removeprefix("cfunc.")
        own = ", ".join(f"{in_ir.get(kind, 'ptr')} %a{i}" for i, kind in enumerate(kinds))
        entry = f"""
            declare i32 @"{inner}"(ptr, ptr, {own})
            define void @{name}({own}) {{
                %result = alloca ptr
                %error = alloca ptr
                call i32 @"{inner}"(ptr %result, ptr %error, {own})
                ret void
            }}"""
        module.link_in(llvm.parse_assembly(entry))
        arguments[name] = kinds
    _drop_what_is_not_called(module, set(arguments), processor)
    return arguments, processor.emit_object(module)


def _drop_what_is_not_called(module: Any, entries: set[str], processor: Any) -> None:
    """Keep `entries` and what they call.

    Raises:
        RuntimeError: They call what a process without Numba does not have.
    """
    for function in module.functions:
        if not function.is_declaration and function.name not in entries:
            function.linkage = "internal"
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(processor, llvm.create_pipeline_tuning_options()))
    everything = [*module.functions, *module.global_variables]
    missing = {each.name for each in everything if each.is_declaration} - _OF_C
    # What LLVM itself makes calls of is in C's library too.
    missing = {name for name in missing if not name.startswith("llvm.")}
    if missing:
        raise RuntimeError(f"loops call {sorted(missing)}, which a process without Numba has not")
