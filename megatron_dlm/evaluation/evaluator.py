"""From generated trajectories to accuracy and decoding speed.

Independent of how the trajectories were generated. Counts are kept apart from rates, so that ranks
can add up their counts before dividing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from megatron_dlm.evaluation.tasks import Task
from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class ScoredResponse:
    """One response with its score.

    Attributes:
        sample_index: The trajectory's.
        text: The response without special tokens.
        predicted: The extracted answer; None if there is none.
        expected: The reference.
        correct: Whether they match.
    """

    sample_index: int
    text: str
    predicted: str | None
    expected: str
    correct: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class EvaluationResult:
    """Rates over all evaluated prompts.

    Attributes:
        accuracy: correct / total.
        correct: Number of responses with the right answer.
        total: Number of responses.
        tokens_per_forward: Response tokens per forward that drew tokens; None if none was counted.
        tokens_per_total_forward: The same with prefill and commit forwards in the count.
        mean_response_length: In tokens, EOS included.
        eos_rate: Fraction of responses that ended by EOS and not at the length limit.
    """

    accuracy: float
    correct: int
    total: int
    tokens_per_forward: float | None
    tokens_per_total_forward: float | None
    mean_response_length: float
    eos_rate: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class EvaluationCounts:
    """Sums over trajectories; add the counts of several ranks with ``+`` or via `to_list`.

    Tokens decoded after the end of a response (the tail) do not count: they are not part of the
    answer, so they must not make decoding look faster.
    """

    correct: int = 0
    total: int = 0
    response_tokens: int = 0
    denoising_forwards: int = 0
    total_forwards: int = 0
    ended_by_eos: int = 0

    def __add__(self, other: "EvaluationCounts") -> "EvaluationCounts":
        return EvaluationCounts(
            *(a + b for a, b in zip(self.to_list(), other.to_list(), strict=True))
        )

    def to_list(self) -> list[int]:
        """Return the counts in field order, for an all-reduce."""
        return list(astuple(self))

    @classmethod
    def from_list(cls, counts: Sequence[int]) -> Self:
        """Undo `to_list`."""
        return cls(*(int(count) for count in counts))

    def result(self) -> EvaluationResult:
        """Compute the rates.

        Raises:
            ValueError: Nothing was counted.
        """
        if self.total == 0:
            raise ValueError("no trajectory was evaluated")
        return EvaluationResult(
            accuracy=self.correct / self.total,
            correct=self.correct,
            total=self.total,
            tokens_per_forward=_rate(self.response_tokens, self.denoising_forwards),
            tokens_per_total_forward=_rate(self.response_tokens, self.total_forwards),
            mean_response_length=self.response_tokens / self.total,
            eos_rate=self.ended_by_eos / self.total,
        )


def score(
    trajectories: Iterable[Trajectory], tokenizer: PreTrainedTokenizerBase, task: Task
) -> list[ScoredResponse]:
    """Decode and score responses.

    Args:
        trajectories: Their `record` holds the reference.
        tokenizer: Decodes `response_ids`; special tokens are left out.
        task: Decides what is correct.

    Raises:
        UserError: A record has no reference.
    """
    scored = []
    for trajectory in trajectories:
        text = str(tokenizer.decode(trajectory.response_ids.tolist(), skip_special_tokens=True))
        expected = task.reference(trajectory.record, f"sample {trajectory.sample_index}")
        predicted = task.extract(text)
        scored.append(
            ScoredResponse(
                sample_index=trajectory.sample_index,
                text=text,
                predicted=predicted,
                expected=expected,
                correct=task.matches(predicted, expected),
            )
        )
    return scored


def count(trajectories: Sequence[Trajectory], scored: Sequence[ScoredResponse]) -> EvaluationCounts:
    """Sum up trajectories and their scores, which are in the same order."""
    pairs = list(zip(trajectories, scored, strict=True))
    return EvaluationCounts(
        correct=sum(verdict.correct for _, verdict in pairs),
        total=len(pairs),
        response_tokens=sum(len(t.response_ids) for t, _ in pairs),
        denoising_forwards=sum(t.denoising_forwards for t, _ in pairs),
        total_forwards=sum(t.total_forwards for t, _ in pairs),
        ended_by_eos=sum(t.finish_reason == "eos" for t, _ in pairs),
    )


def evaluate(
    trajectories: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase, task: Task
) -> EvaluationResult:
    """Score trajectories that are all on this process; `score` and `count` serve several ranks."""
    return count(trajectories, score(trajectories, tokenizer, task)).result()


def _rate(tokens: int, forwards: int) -> float | None:
    return tokens / forwards if forwards else None
