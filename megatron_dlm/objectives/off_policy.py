"""Off-policy distillation: responses that the AR teacher wrote once, random states."""

from megatron_dlm.config.objective_traits import OBJECTIVE_TRAITS
from megatron_dlm.objectives.distillation import DistillationObjective


class OffPolicy(DistillationObjective):
    """Distillation at random states of the teacher's responses."""

    traits = OBJECTIVE_TRAITS["off_policy"]
