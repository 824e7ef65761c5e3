"""Properties of each objective, known before PyTorch is loaded.

Rules, data reading and the training loop use these traits and never an objective's name.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, RND1, DiffusionKind

ObjectiveName = Literal["opdlm", "opdlm_off", "off_policy", "sft", "scp", "next_token", "d_opsd"]
StateSelection = Literal["per_block", "global", "all", "random"]
ResponseSource = Literal["rollout", "teacher", "data", "corpus"]
"""The student, the autoregressive teacher (once), `--train-data`, or windows of `--data-path`."""


@dataclass(frozen=True)
class ObjectiveTraits:
    """Properties of an objective."""

    response_sources: tuple[ResponseSource, ...]  # of several, the first whose data are given
    state_selections: tuple[StateSelection, ...] = ()  # the default first; none: autoregressive
    diffusion_kind: DiffusionKind | None = None  # of the trained model; None: it keeps its kind
    uses_teacher: bool = False  # a frozen teacher's predictions are the targets
    self_distillation: bool = False  # that teacher is the same diffusion model, and is shown more
    verifies: bool = False  # a prompt is answered again until `--reward` rates it right
    weighs_tokens: bool = False  # `--loss-weighting` chooses the weight w(t) of a token
    chooses_attention: bool = False  # `--attention-pattern` chooses the attention


VISITED: tuple[StateSelection, ...] = ("per_block", "global", "all")
OBJECTIVE_TRAITS: dict[ObjectiveName, ObjectiveTraits] = {
    "opdlm": ObjectiveTraits(("rollout",), VISITED, BLOCK_DIFFUSION, uses_teacher=True),
    "opdlm_off": ObjectiveTraits(("rollout",), ("random",), BLOCK_DIFFUSION, uses_teacher=True),
    "off_policy": ObjectiveTraits(("teacher",), ("random",), BLOCK_DIFFUSION, uses_teacher=True),
    "sft": ObjectiveTraits(("data", "teacher"), ("random",), BLOCK_DIFFUSION, weighs_tokens=True),
    "scp": ObjectiveTraits(
        ("corpus",), ("random",), RND1, weighs_tokens=True, chooses_attention=True
    ),
    "next_token": ObjectiveTraits(("corpus", "data")),
    "d_opsd": ObjectiveTraits(
        ("rollout",), ("all",), uses_teacher=True, self_distillation=True, verifies=True
    ),
}
