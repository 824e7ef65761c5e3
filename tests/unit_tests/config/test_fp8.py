"""FP8 options say what is missing, and reach Megatron under its names."""

import pytest
import torch
from packaging.version import Version

from megatron_dlm.config.rules import values
from megatron_dlm.errors import UserError
from megatron_dlm.models.fp8 import check_fp8_sizes
from megatron_dlm.models.model_provider import transformer_config
from megatron_dlm.platform.fp8 import Parts
from tests.unit_tests.config.configurations import OPDLM, architecture, config_with

ASKED = {
    **OPDLM,
    "fp8_format": "hybrid",
    "transformer_impl": "transformer_engine",
    "bf16": True,
}
HOPPER = Parts(Version("2.8"), Version("9.0"), Version("12.9"))


def _have(monkeypatch: pytest.MonkeyPatch, parts: Parts | None) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: parts)
    if parts is not None:
        version = str(parts.transformer_engine)
        monkeypatch.setattr("megatron_dlm.platform.fp8.version", lambda name: version)
        capability = parts.capability.release[:2]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "cuda", str(parts.cuda))


@pytest.mark.parametrize(
    ("changes", "parts", "named"),
    [
        ({}, None, ["--fp8-format = 'hybrid'", "transformer_engine", "not installed"]),
        ({"transformer_impl": "local"}, HOPPER, ["add --transformer-impl transformer_engine"]),
        ({"bf16": False}, HOPPER, ["bfloat16; add --bf16"]),
        ({"device": "cpu"}, HOPPER, ["--fp8-format", "needs a GPU"]),
        (
            {"fp8_recipe": "mxfp8"},
            HOPPER,
            ["--fp8-recipe = 'mxfp8'", "capability 10.0", "is 9.0", "delayed or tensorwise or blo"],
        ),
        ({}, Parts(Version("2.8"), Version("8.0"), Version("12.9")), ["8.9", "is 8.0", "leave"]),
        (
            {"fp8_recipe": "blockwise"},
            Parts(Version("2.8"), Version("9.0"), Version("12.6")),
            ["PyTorch for CUDA 12.9", "is 12.6", "choose delayed or tensorwise"],
        ),
        (
            {"fp8_recipe": "tensorwise"},
            Parts(Version("2.1"), Version("9.0"), Version("12.6")),
            ["transformer_engine 2.2", "is 2.1", "choose delayed,"],
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            HOPPER,
            ["--recompute-modules", "delayed"],
        ),
    ],
)
def test_what_is_missing_is_named(
    changes: dict[str, object],
    parts: Parts | None,
    named: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _have(monkeypatch, parts)
    refusal = str(next(values._fp8(config_with(ASKED, **changes))))
    option, _, reason = refusal.partition(": ")
    flag = "--" + option.replace("_", "-")
    value = config_with(ASKED, **changes).model.__dict__[option]
    for part in named:
        assert part in f"{flag} = {value!r}: {reason}"


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_where_nothing_is_missing_all_is_well(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _have(monkeypatch, HOPPER)
    assert not list(values._fp8(config_with(ASKED, fp8_recipe=recipe)))


@pytest.mark.parametrize("options", [("e4m3", "blockwise"), ("hybrid", "delayed")])
def test_megatron_gets_its_own_names(options: tuple[str, str]) -> None:
    config = config_with(ASKED, fp8_format=options[0], fp8_recipe=options[1], device="cpu")
    made = transformer_config(architecture(), config)
    assert (made.fp8, made.fp8_recipe) == options
    assert transformer_config(architecture(), config.changed(fp8_format=None)).fp8 is None


def test_parts_of_weights_are_whole_tiles() -> None:
    """The model has a hidden size of 48 and 96 feed-forward units; its 4 keys are 4 wide."""
    check_fp8_sizes(architecture(), config_with(ASKED))
    for changes, part in (
        ({"fp8_recipe": "mxfp8"}, "tiles of 32, and a process has hidden size of 48"),
        ({"tensor_model_parallel_size": 2}, "queries of 24"),
    ):
        with pytest.raises(UserError, match=part):
            check_fp8_sizes(architecture(), config_with(ASKED, **changes))
