"""OPDLM_off: the student's own rollouts, but random instead of visited states (OPDLM, table 4)."""

from megatron_dlm.config.objective_traits import OBJECTIVE_TRAITS
from megatron_dlm.objectives.distillation import DistillationObjective


class OPDLMOff(DistillationObjective):
    """Distillation at random states of the student's rollouts."""

    traits = OBJECTIVE_TRAITS["opdlm_off"]
