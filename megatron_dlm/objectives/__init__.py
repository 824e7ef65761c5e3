"""Objectives by their `--objective` name."""

from megatron_dlm.config.objective_traits import ObjectiveName
from megatron_dlm.objectives.base import Objective
from megatron_dlm.objectives.d_opsd import DOPSD
from megatron_dlm.objectives.distillation import DistillationObjective
from megatron_dlm.objectives.next_token import NextToken
from megatron_dlm.objectives.opdlm import OPDLM
from megatron_dlm.objectives.scp import SCP
from megatron_dlm.objectives.sft import SFT

OBJECTIVES: dict[ObjectiveName, type[Objective]] = {
    "opdlm": OPDLM,
    "opdlm_off": DistillationObjective,
    "off_policy": DistillationObjective,
    "sft": SFT,
    "scp": SCP,
    "next_token": NextToken,
    "d_opsd": DOPSD,
}
