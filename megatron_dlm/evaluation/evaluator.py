"""From generated trajectories to accuracy and decoding speed.

Independent of how the trajectories were generated. What is kept of a response is enough to rate it
later, and in parallel with others.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from megatron_dlm.evaluation.rewards import RIGHT, Reward
from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class Response:
    """What is kept of a generated response; JSON can hold its fields.

    Attributes:
        sample_index: The trajectory's.
        text: Without special tokens.
        tokens: Its length, EOS included.
        denoising_forwards: That drew tokens.
        total_forwards: With prefill and commit forwards.
        finish_reason: `eos` or `length`.
        drafted_tokens: As in `Trajectory`.
        accepted_tokens: Likewise.
    """

    sample_index: int
    text: str
    tokens: int
    denoising_forwards: int
    total_forwards: int
    finish_reason: str
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @classmethod
    def of(cls, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Decode the response of a trajectory."""
        ids = trajectory.response_ids.tolist()
        return cls(
            sample_index=trajectory.sample_index,
            text=str(tokenizer.decode(ids, skip_special_tokens=True)),
            tokens=len(ids),
            denoising_forwards=trajectory.denoising_forwards,
            total_forwards=trajectory.total_forwards,
            finish_reason=trajectory.finish_reason,
            drafted_tokens=trajectory.drafted_tokens,
            accepted_tokens=trajectory.accepted_tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class EvaluationResult:
    """Rates over all evaluated prompts.

    Attributes:
        accuracy: correct / total.
        correct: Number of right responses.
        total: Number of responses.
        mean_reward: Of all responses; a reward may give parts.
        tokens_per_forward: Response tokens per forward that drew tokens; None if none was counted.
        tokens_per_total_forward: The same with prefill and commit forwards in the count.
        mean_response_length: In tokens, EOS included.
        eos_rate: Fraction of responses that ended by EOS and not at the length limit.
        acceptance_rate: Fraction of the drafts that verification accepted; None where nothing was
            drafted.
    """

    accuracy: float
    correct: int
    total: int
    mean_reward: float
    tokens_per_forward: float | None
    tokens_per_total_forward: float | None
    mean_response_length: float
    eos_rate: float
    acceptance_rate: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


def rates(responses: Sequence[Response], rewards: Sequence[float]) -> EvaluationResult:
    """Rates over responses and their rewards, which are in the same order.

    Tokens decoded after the end of a response (the tail) do not count: they are not part of the
    answer, so they must not make decoding look faster.

    Raises:
        ValueError: There are none.
    """
    if not responses:
        raise ValueError("no response was evaluated")
    tokens = sum(response.tokens for response in responses)
    correct = sum(reward >= RIGHT for _, reward in zip(responses, rewards, strict=True))
    return EvaluationResult(
        accuracy=correct / len(responses),
        correct=correct,
        total=len(responses),
        mean_reward=sum(rewards) / len(responses),
        tokens_per_forward=_rate(tokens, sum(r.denoising_forwards for r in responses)),
        tokens_per_total_forward=_rate(tokens, sum(r.total_forwards for r in responses)),
        mean_response_length=tokens / len(responses),
        eos_rate=sum(r.finish_reason == "eos" for r in responses) / len(responses),
        acceptance_rate=_rate(
            sum(r.accepted_tokens for r in responses), sum(r.drafted_tokens for r in responses)
        ),
    )


def evaluate(
    trajectories: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase, reward: Reward
) -> EvaluationResult:
    """Rate trajectories that are all on this process; their `record` has what the reward reads."""
    responses = [Response.of(trajectory, tokenizer) for trajectory in trajectories]
    records = [trajectory.record for trajectory in trajectories]
    return rates(responses, reward.rate(records, [response.text for response in responses]))


def _rate(part: int, whole: int) -> float | None:
    return part / whole if whole else None
