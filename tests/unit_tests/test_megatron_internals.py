"""What this project uses of Megatron-Core beside its interface is there, in the version installed.

`make test` and `make test-core-latest` run this with the oldest and the newest version.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import (
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)

import megatron_dlm
from megatron_dlm import megatron_internals
from megatron_dlm.models.experts import GroupedExperts
from megatron_dlm.models.lora_layers import LoRAColumnParallelLinear, LoRARowParallelLinear
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.models.moe_layer import GroupedMoELayer, SparseTopKRouter, TorchTopKRouter
from megatron_dlm.models.self_attention import RotatedSelfAttention
from megatron_dlm.models.token_dispatch import DeepEPTokenDispatcher, SortingTokenDispatcher

PACKAGE = Path(megatron_dlm.__file__).parent
OWN = Path(megatron_internals.__file__)
STEPS = (
    "dispatch_preprocess",
    "token_dispatch",
    "dispatch_postprocess",
    "combine_preprocess",
    "token_combine",
    "combine_postprocess",
)
OVERRIDES: dict[type, tuple[type, tuple[str, ...]]] = {
    TorchTopKRouter: (TopKRouter, ("gating",)),
    SparseTopKRouter: (TopKRouter, ("routing",)),
    SortingTokenDispatcher: (MoETokenDispatcher, STEPS),
    DeepEPTokenDispatcher: (MoEFlexTokenDispatcher, ("dispatch_postprocess",)),
    GroupedMoELayer: (MoELayer, ()),
    GroupedExperts: (MegatronModule, ("sharded_state_dict",)),
    RotatedSelfAttention: (SelfAttention, ("forward", "get_query_key_value_tensors")),
    LoRAColumnParallelLinear: (ColumnParallelLinear, ("forward", "sharded_state_dict")),
    LoRARowParallelLinear: (RowParallelLinear, ("forward", "sharded_state_dict")),
    DiffusionGPTModel: (GPTModel, ("forward",)),
}
"""Methods in place of Megatron's, which nobody would call if Megatron's had another name."""

CALLED = (
    (MoELayer, "forward", STEPS),
    (TopKRouter, "forward", ("gating", "routing")),
    (SelfAttention, "forward", ("get_query_key_value_tensors",)),
)
"""Which method, with those that it calls, calls what `OVERRIDES` replaces."""


@pytest.mark.parametrize("name", megatron_internals.NAMES)
def test_it_exists(name: str) -> None:
    module, _, path = name.partition(": ")
    found: Any = importlib.import_module(f"megatron.core.{module}")
    owner, _, attribute = path.rpartition(".")
    if owner:
        found = getattr(found, owner)
    stored = getattr(found, "__init__", None) if owner else None
    is_stored = stored is not None and attribute in inspect.unwrap(stored).__code__.co_names
    assert hasattr(found, attribute) or is_stored


def _names_of_megatron(tree: ast.AST) -> set[str]:
    """Names that a module imports from Megatron-Core, and attributes with an underscore."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core"):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


PRIVATE = {re.split(r"[ .]", name)[-1] for name in megatron_internals.NAMES}


def test_no_other_module_names_it() -> None:
    named = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in PACKAGE.rglob("*.py")
        if path != OWN
        for name in _names_of_megatron(ast.parse(path.read_text())) & PRIVATE
    }
    assert named == set()


def test_no_other_module_imports_a_private_name() -> None:
    imported = {
        f"{path.relative_to(PACKAGE)}: {alias.name}"
        for path in PACKAGE.rglob("*.py")
        if path != OWN
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core")
        for alias in node.names
        if alias.name.startswith("_")
    }
    assert imported == set()


def test_the_list_is_what_the_module_uses() -> None:
    used = _names_of_megatron(ast.parse(OWN.read_text()))
    assert used >= PRIVATE
    assert {name for name in used if name.startswith("_")} <= PRIVATE


@pytest.mark.parametrize("ours", OVERRIDES, ids=lambda cls: cls.__name__)
def test_what_is_replaced_is_what_megatron_has(ours: type) -> None:
    parent, methods = OVERRIDES[ours]
    assert issubclass(ours, parent)
    for method in methods:
        theirs = inspect.signature(getattr(parent, method)).parameters
        own = inspect.signature(getattr(ours, method)).parameters
        positional = [
            name
            for name, parameter in theirs.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and parameter.default is parameter.empty
        ]
        takes_all = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in own.values())
        assert takes_all or list(own)[: len(positional)] == positional, method


@pytest.mark.parametrize(("cls", "method", "called"), CALLED)
def test_it_is_called(cls: type, method: str, called: tuple[str, ...]) -> None:
    """The names occur in the class or its parents, in a method other than the one of that name."""
    assert hasattr(cls, method)
    names = {
        name
        for owner in cls.__mro__
        for member, function in vars(owner).items()
        for name in _code_names(function)
        if member not in called
    }
    assert names >= set(called)


def _code_names(function: Any) -> set[str]:
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return set() if code is None else set(code.co_names)


def test_gradient_buffers_can_be_given_back() -> None:
    for method in ("offload_grad_buffers", "restore_grad_buffers"):
        assert callable(getattr(DistributedDataParallel, method))
