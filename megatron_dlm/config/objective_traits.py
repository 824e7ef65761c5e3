"""Properties of each objective, known before PyTorch is loaded.

Rules, data reading and the training loop use these traits and never an objective's name.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, RND1, DiffusionKind

ObjectiveName = Literal["opdlm", "opdlm_off", "off_policy", "sft", "scp", "next_token", "d_opsd"]
StateSelection = Literal["per_block", "global", "all", "random"]
ResponseSource = Literal["rollout", "teacher", "data", "corpus"]


@dataclass(frozen=True)
class ObjectiveTraits:
    """Properties of an objective.

    Attributes:
        method: What it does to a model, as a model card says it.
        response_sources: Where the responses of x_0 can come from: the student's `rollout`, the
            autoregressive `teacher` (generated once), `data` (`--train-data`), or windows of a
            pretraining `corpus` (`--data-path`). Of several, the one whose data are given is used.
        uses_teacher: Whether a frozen teacher annotates trajectories: with its hidden states, or
            with its most likely tokens where these were stored or the student teaches itself.
        state_selections: Which denoising states it can be trained on, the default first; none for
            a model that stays autoregressive.
        diffusion_kind: Kind of the trained model, written into its config.json; None for a model
            that keeps its kind.
        self_distillation: Whether student and teacher are one diffusion model, the teacher frozen
            and shown more of the sequence.
        verifies: Whether the student answers a prompt again until `--reward` rates it right.
        weighs_tokens: Whether `--loss-weighting` chooses the weight w(t) of a token.
        chooses_attention: Whether `--attention-pattern` chooses the attention of that model.
    """

    method: str
    response_sources: tuple[ResponseSource, ...]
    uses_teacher: bool
    state_selections: tuple[StateSelection, ...] = ()
    diffusion_kind: DiffusionKind | None = None
    self_distillation: bool = False
    verifies: bool = False
    weighs_tokens: bool = False
    chooses_attention: bool = False


OBJECTIVE_TRAITS: dict[ObjectiveName, ObjectiveTraits] = {
    "opdlm": ObjectiveTraits(
        "on-policy distillation (OPDLM): it wrote responses by block diffusion, and was trained "
        "at the states that it had visited towards the distributions of an autoregressive teacher",
        ("rollout",),
        True,
        ("per_block", "global", "all"),
        BLOCK_DIFFUSION,
    ),
    "opdlm_off": ObjectiveTraits(
        "distillation on its own responses: it wrote them by block diffusion, and was trained at "
        "random states of them towards the distributions of an autoregressive teacher",
        ("rollout",),
        True,
        ("random",),
        BLOCK_DIFFUSION,
    ),
    "off_policy": ObjectiveTraits(
        "off-policy distillation: an autoregressive teacher wrote responses, and it was trained at "
        "random states of them towards that teacher's distributions",
        ("teacher",),
        True,
        ("random",),
        BLOCK_DIFFUSION,
    ),
    "sft": ObjectiveTraits(
        "supervised fine-tuning (BD3LM): it was trained to fill in MASKs of given responses",
        ("data", "teacher"),
        False,
        ("random",),
        BLOCK_DIFFUSION,
        weighs_tokens=True,
    ),
    "scp": ObjectiveTraits(
        "continual pretraining (SCP of RND1): it was trained to fill in MASKs of a corpus",
        ("corpus",),
        False,
        ("random",),
        RND1,
        weighs_tokens=True,
        chooses_attention=True,
    ),
    "next_token": ObjectiveTraits(
        "autoregressive training on the next token", ("corpus", "data"), False
    ),
    "d_opsd": ObjectiveTraits(
        "self-distillation (d-OPSD): of its right responses, it was trained at the states that it "
        "had visited towards its own distributions with later text shown",
        ("rollout",),
        True,
        ("all",),
        self_distillation=True,
        verifies=True,
    ),
}
