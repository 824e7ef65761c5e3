"""Numbers that no model can work with are errors of their field."""

import json

import pytest
from pydantic import ValidationError

from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.requests import ChatRequest, validation_error
from tests.unit_tests.rollout.tiny_models import GENERATION

HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("field", "value", "strategy"),
    [
        ("temperature", "Infinity", None),
        ("temperature", "NaN", None),
        ("temperature", "1e38", None),
        ("temperature", HUGE, None),
        ("top_p", HUGE, None),
        ("dynamic_threshold", HUGE, None),
        ("dynamic_threshold", "Infinity", None),
        ("denoising_steps_per_block", "1" + "0" * 30, "entropy"),
        ("denoising_steps_per_block", HUGE, "low_confidence_static"),
    ],
)
def test_a_number_out_of_range_is_named(field: str, value: str, strategy: str | None) -> None:
    body = {"model": "m", "messages": [], field: json.loads(value)}
    if strategy is not None:
        body["remasking_strategy"] = strategy
    try:
        with pytest.raises(ApiError) as caught:
            ChatRequest.model_validate(body).generation(GENERATION)
        error = caught.value
    except ValidationError as invalid:
        error = validation_error(list(invalid.errors()))
    assert (error.status, error.param) == (400, field)


def test_the_ends_of_the_ranges_are_accepted() -> None:
    fields = {"temperature": 100, "denoising_steps_per_block": 2**20}
    body = {"model": "m", "messages": [], "remasking_strategy": "entropy", **fields}
    generation = ChatRequest.model_validate(body).generation(GENERATION)
    assert generation.temperature == 100
    assert generation.denoising_steps_per_block == 2**20
