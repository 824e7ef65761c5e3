"""Groups of parameters with their own settings of the optimizer."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, StrictFloat

from megatron_dlm.config.marks import AT_LEAST_ZERO, Text

ParamGroupPreset = Literal["rnd1"]
NotNegative = Annotated[StrictFloat | None, AfterValidator(AT_LEAST_ZERO.check)]


@dataclass(frozen=True)
class ParameterGroup:
    """Settings of the optimizer for the parameters that a pattern matches.

    Attributes:
        pattern: attention, mlp, experts, router, embedding, norm, output, default (all that is in
            no other group), or a regular expression searched in the parameter's name in the whole
            model, which no layout changes. A pattern that matches nothing is an error.
        lr: Peak learning rate, 0 for parameters that stay (None: `--lr`).
        min_lr: Learning rate at the end of the decay (None: `--min-lr`).
        weight_decay: Weight decay (None: `--weight-decay`).
    """

    __pydantic_config__: ClassVar = ConfigDict(
        extra="forbid", allow_inf_nan=False, revalidate_instances="always"
    )
    pattern: Text
    lr: NotNegative = None
    min_lr: NotNegative = None
    weight_decay: NotNegative = None


PARAM_GROUP_PRESETS: dict[ParamGroupPreset, tuple[ParameterGroup, ...]] = {
    # RND1 section 4.2, setting 4. Its schedule is constant; with another one, rates decay to 0.
    "rnd1": (
        ParameterGroup("attention", lr=3e-4, min_lr=0.0, weight_decay=0.1),
        ParameterGroup("default", lr=1e-8, min_lr=0.0, weight_decay=0.1),
    ),
}
"""Parameter groups that publications trained with, by name (`--param-group-preset`)."""
