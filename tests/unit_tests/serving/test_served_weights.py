"""Weights that are half replaced have no version."""

import pytest
import torch

from megatron_dlm.config import Config
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.rollout.external.weight_group import Bucket
from megatron_dlm.serving.api_error import ApiError
from megatron_dlm.serving.served_weights import INCOMPLETE, ServedWeights
from tests.unit_tests.config.configurations import architecture

NORM, OTHER = "model.norm.weight", "model.layers.0.input_layernorm.weight"


class OfOneProcess:
    """A group whose only message is there already."""

    def __init__(self, *tensors: tuple[str, torch.Tensor]) -> None:
        self.tensors = list(tensors)

    def receive(self, *_: object, **__: object) -> list[tuple[str, torch.Tensor]]:
        return self.tensors


@pytest.mark.usefixtures("single_process")
def test_a_version_is_of_whole_weights() -> None:
    sizes = architecture()
    model, changes = build_model(sizes, Config()), []
    weights = ServedWeights(model, sizes, lambda: changes.append(weights.version))
    values = torch.full((sizes.hidden_size,), 3.0)
    nothing = Bucket([], [], [])

    def receive(name: str, tensor: torch.Tensor, version: str | None) -> None:
        weights._groups["g"] = OfOneProcess((name, tensor))  # type: ignore[assignment]
        weights.receive("g", nothing, flat=False, version=version)

    with pytest.raises(ApiError, match="no update of weights is open"):
        receive(NORM, values, "1")
    weights.begin_update()
    with pytest.raises(ApiError, match="an update of weights is open"):
        weights.begin_update()
    receive(NORM, values, "1")
    assert weights.version == "1"
    receive(OTHER, values, None)
    assert weights.version == INCOMPLETE
    assert torch.equal(model.decoder.final_layernorm.weight, values)
    receive(NORM, 2 * values, "2")
    assert weights.version == "2"
    with pytest.raises(ApiError, match="the model has no other"):
        receive("other", values, "3")
    assert weights.version == INCOMPLETE
    weights.end_update()
    with pytest.raises(ApiError, match="no update of weights is open"):
        weights.end_update()
    assert changes == ["default", "1", INCOMPLETE, "2"]
