"""A tool refuses decoding options that none of its settings uses, and impossible settings."""

from typing import Any

import pytest

from megatron_dlm.config import ParallelConfig
from megatron_dlm.evaluation.options import (
    GreedyDecodingConfig,
    InferenceArguments,
    InferenceConfig,
    InferenceSetup,
    resolve_inference,
)
from megatron_dlm.rollout.generation_config import GenerationConfig
from tests.refusal import refusal
from tests.tiny import REPOSITORY

Settings = tuple[str, ...]


def setup(block_size: int | None = 4, decoding: Any = "auto", **options: Any) -> InferenceSetup:
    """The tiny autoregressive model; with a block size, decoded as a diffusion model."""
    load = str(REPOSITORY / "examples" / "tiny" / "qwen3")
    arguments = InferenceArguments(
        InferenceConfig(load=load, block_size=block_size, decoding=decoding),
        GreedyDecodingConfig(**options),
        ParallelConfig(device="cpu"),
    )
    return resolve_inference(arguments, 1)


STATIC = {"remasking_strategy": "low_confidence_static"}
ENTROPY = {"remasking_strategy": "entropy"}


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"dynamic_threshold": 0.5}, ()),
        ({"dynamic_threshold": 0.5}, ("static", "dynamic")),
        ({**STATIC, "denoising_steps_per_block": 2}, ()),
        ({"denoising_steps_per_block": 2}, ("static", "dynamic:0.9")),
        ({"denoising_steps_per_block": 3}, ("entropy",)),
        ({"remasking_strategy": "entropy_bounded", "entropy_bound": 0.5}, ()),
        ({"temperature": 1.0, "top_k": 5, "top_p": 0.5}, ()),
        ({"temperature": 1.0, "top_k": 5, "decoding": "autoregressive"}, ()),
        ({"max_running_requests": 2, "block_size": None}, ()),
        ({"decoding": "diffusion"}, ()),
    ],
)
def test_what_a_setting_reads_is_accepted(options: dict[str, Any], settings: Settings) -> None:
    assert refusal(setup(**options).settings, settings) is None


@pytest.mark.parametrize(
    ("options", "settings", "named"),
    [
        ({**STATIC, "dynamic_threshold": 0.5}, (), ["--dynamic-threshold = 0.5", "by static"]),
        ({"dynamic_threshold": 0.5}, ("static", "dynamic:0.9"), ["--dynamic-threshold = 0.5"]),
        ({"denoising_steps_per_block": 2}, (), ["steps-per-block = 2", "by dynamic_0.9"]),
        ({"denoising_steps_per_block": 2}, ("static:4", "dynamic"), ["steps-per-block = 2"]),
        ({**ENTROPY, "entropy_bound": 0.5}, (), ["--entropy-bound = 0.5", "by entropy has no use"]),
        (ENTROPY, ("static",), ["--remasking-strategy = 'entropy'"]),
        ({**STATIC, "decoding": "autoregressive"}, (), ["--remasking-strategy", "autoregressive"]),
        ({"dynamic_threshold": 0.5, "block_size": None}, (), ["threshold", "add --block-size"]),
        ({"top_k": 5}, (), ["--top-k = 5: --temperature 0 has no use", "temperature above 0"]),
        ({"top_p": 0.5}, ("static",), ["--top-p = 0.5: --temperature 0 has no use"]),
        ({"decoding": "autoregressive"}, ("static",), ["--decoding = 'autoregressive'"]),
        ({}, ("static:3",), ["--settings = 'static:3'", "block size 4", "1, 2 or 4"]),
        ({}, ("static:0",), ["--settings = 'static:0'"]),
        ({}, ("dynamic:2",), ["--settings = 'dynamic:2'"]),
        ({}, ("entropy:0",), ["--settings = 'entropy:0'"]),
        ({}, ("entropy_bounded:-1",), ["--settings = 'entropy_bounded:-1'"]),
        ({}, ("entropy_bounded:nan",), ["--settings = 'entropy_bounded:nan'"]),
        ({}, ("autoregressive:2",), ["--settings = 'autoregressive:2'"]),
        ({}, ("dynamic", "dynamic:0.9"), ["names dynamic_0.9 twice"]),
        ({}, ("static@8", "static@8"), ["names static@8 twice"]),
        ({}, ("static:4@6",), ["--settings = 'static:4@6'", "block size 6", "1, 2, 3 or 6"]),
        ({}, ("dynamic@0",), ["--settings = 'dynamic@0': '0' is no block size"]),
        ({}, ("dynamic@",), ["--settings = 'dynamic@': '' is no block size"]),
        ({}, ("autoregressive@4",), ["--settings = 'autoregressive@4': has no blocks"]),
        (
            {"denoising_steps_per_block": 3},
            ("static",),
            ["--denoising-steps-per-block = 3", "block size 4"],
        ),
    ],
)
def test_what_no_setting_reads_is_refused(
    options: dict[str, Any], settings: Settings, named: list[str]
) -> None:
    message = refusal(setup(**options).settings, settings) or ""
    assert all(part in message for part in named), message


def test_a_setting_wins_over_the_options_and_leaves_the_rest() -> None:
    def numbers(generation: GenerationConfig) -> tuple[Any, ...]:
        return (
            generation.remasking_strategy,
            generation.denoising_steps_per_block,
            generation.dynamic_threshold,
            generation.entropy_bound,
        )

    given = setup(denoising_steps_per_block=2, dynamic_threshold=0.5, entropy_bound=0.3)
    texts = ("static", "static:4", "entropy:3", "dynamic", "dynamic:0.7", "entropy_bounded")
    found = {name: numbers(one) for name, one in given.settings(texts).items()}
    assert found == {
        "static_2": ("low_confidence_static", 2, 0.5, 0.3),
        "static": ("low_confidence_static", 4, 0.5, 0.3),
        "entropy_3": ("entropy", 3, 0.5, 0.3),
        "dynamic_0.5": ("low_confidence_dynamic", 2, 0.5, 0.3),
        "dynamic_0.7": ("low_confidence_dynamic", 2, 0.7, 0.3),
        "entropy_bounded_0.3": ("entropy_bounded", 2, 0.5, 0.3),
    }


def test_settings_have_block_sizes_of_their_own() -> None:
    texts = ("dynamic:0.7", "dynamic:0.7@8", "static:2@16")
    found = setup(4).settings(texts)
    assert {name: one.block_size for name, one in found.items()} == {
        "dynamic_0.7": 4,
        "dynamic_0.7@8": 8,
        "static_2@16": 16,
    }
    assert found["dynamic_0.7@8"].dynamic_threshold == 0.7
