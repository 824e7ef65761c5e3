"""Groups of parameters with their own settings of the optimizer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_dlm.ranges import AT_LEAST_ZERO

ParamGroupPreset = Literal["rnd1"]


@dataclass(frozen=True)
class ParameterGroup:
    """Settings of the optimizer for the parameters that a pattern matches; None: the run's own.

    The pattern is attention, mlp, experts, router, embedding, norm, output, default (all that is in
    no other group), or a regular expression that is searched in the parameter's name in the whole
    model, which no layout changes. A pattern that matches nothing is an error.
    """

    pattern: str
    lr: Annotated[float | None, AT_LEAST_ZERO] = None
    min_lr: Annotated[float | None, AT_LEAST_ZERO] = None
    weight_decay: Annotated[float | None, AT_LEAST_ZERO] = None


PARAM_GROUP_PRESETS: dict[ParamGroupPreset, tuple[ParameterGroup, ...]] = {
    # RND1 section 4.2, setting 4. Its schedule is constant; with another one, rates decay to 0.
    "rnd1": (
        ParameterGroup("attention", lr=3e-4, min_lr=0.0, weight_decay=0.1),
        ParameterGroup("default", lr=1e-8, min_lr=0.0, weight_decay=0.1),
    ),
}
"""Parameter groups that publications trained with, by name (`--param-group-preset`)."""
