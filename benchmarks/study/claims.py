"""The papers' claims, with the measured numbers and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.study.statistics import (
    Result,
    Sample,
    Verdict,
    pooled_std,
    rate,
    sample,
    verdict_close,
    verdict_greater,
    verdict_within,
)

CLOSE_POINTS = 3.0
"""Points of accuracy up to which two recipes count as close."""
CLOSE_SPEED = 0.1
"""Tokens per forward up to which two stretches of training count as close."""
BEGINNING, MIDDLE, END = (0.0, 0.05), (0.475, 0.525), (0.95, 1.0)
"""Stretches of training."""
RISING = 0.05
"""Smallest rise of a loss, in nats per token, that counts as forgetting; noise is smaller."""
SOLVING = 10.0
"""Smallest percentage of solved problems that counts as learnt; guesses solve fewer."""

Quantity = Callable[[Result], float | None]


@dataclass(frozen=True)
class Claim:
    """One claim with its numbers.

    Attributes:
        source: Paper and table or figure.
        statement: The claim, in terms of this study.
        measured: Both sides and their difference; empty if not measured.
        verdict: None if not measured.
    """

    source: str
    statement: str
    measured: str
    verdict: Verdict | None


def accuracy(evaluation: str, setting: str) -> Quantity:
    """Accuracy in percent."""
    read = rate(evaluation, setting, "accuracy")

    def percent(result: Result) -> float | None:
        value = read(result)
        return None if value is None else 100 * value

    return percent


def speed(evaluation: str, setting: str) -> Quantity:
    """Response tokens per forward that draws tokens."""
    return rate(evaluation, setting, "tokens_per_forward")


def drop(evaluation: str, of: str, under: str) -> Quantity:
    """Points of accuracy that a result loses from one setting to another."""
    before, after = accuracy(evaluation, of), accuracy(evaluation, under)

    def difference(result: Result) -> float | None:
        first, second = before(result), after(result)
        return None if first is None or second is None else first - second

    return difference


def final_loss(curve: str) -> Quantity:
    """Nats per token at the end of training: of `loss` its last twentieth, else the last point."""

    def read(result: Result) -> float | None:
        points = result.get("training", {}).get("curves", {}).get(curve)
        if not points:
            return None
        last = points[-max(1, len(points) // 20) :] if curve == "loss" else points[-1:]
        return float(sum(last) / len(last))

    return read


def rise(curve: str) -> Quantity:
    """How far a curve ends above its own minimum over training; 0 if it ends there."""

    def read(result: Result) -> float | None:
        points = result.get("training", {}).get("curves", {}).get(curve)
        return float(points[-1] - min(points)) if points else None

    return read


def rollout_speed(start: float, end: float) -> Quantity:
    """Mean tokens per forward in rollouts between two fractions of training."""

    def mean(result: Result) -> float | None:
        curve = result.get("training", {}).get("curves", {}).get("tokens_per_forward")
        if not curve:
            return None
        first = min(round(start * len(curve)), len(curve) - 1)
        points = curve[first : max(first + 1, round(end * len(curve)))]
        return float(sum(points) / len(points))

    return mean


def speed_gain(since: tuple[float, float], until: tuple[float, float]) -> Quantity:
    """Tokens per forward that rollouts gain between two stretches of training."""
    before, after = rollout_speed(*since), rollout_speed(*until)

    def gain(result: Result) -> float | None:
        early, late = before(result), after(result)
        return None if early is None or late is None else late - early

    return gain


def papers_claims(results: Sequence[Result]) -> list[Claim]:
    """Every claim of the papers that this study measures."""
    static, dynamic = accuracy("block_4", "static"), accuracy("block_4", "dynamic_0.9")
    lost = drop("block_4", "static", "dynamic_0.9")

    def greater(
        source: str, statement: str, a: tuple[str, Quantity], b: tuple[str, Quantity]
    ) -> Claim:
        return _claim(source, statement, sample(results, *a), sample(results, *b), verdict_greater)

    def close(recipe: str, reference: str, source: str, statement: str) -> Claim:
        a, b = sample(results, recipe, static), sample(results, reference, static)
        return _claim(source, statement, a, b, lambda a, b: verdict_close(a, b, CLOSE_POINTS))

    return [
        *(
            greater(
                "OPDLM table 4",
                f"{title} is more accurate than off-policy ({setting})",
                (recipe, quantity),
                ("off_policy", quantity),
            )
            for recipe, title in (("opdlm_off", "OPDLM_off"), ("opdlm", "OPDLM"))
            for setting, quantity in (("static", static), ("dynamic 0.9", dynamic))
        ),
        *(
            close(
                recipe,
                "opdlm_off",
                "OPDLM table 4",
                f"visited ({title}) and random states are close (static)",
            )
            for recipe, title in (("opdlm", "per block"), ("opdlm_global", "global"))
        ),
        close(
            "opdlm",
            "sft",
            "OPDLM tables 10, 11",
            "OPDLM and SFT are close under static decoding",
        ),
        greater(
            "OPDLM tables 10, 11",
            "SFT loses more points than OPDLM from static to dynamic 0.9",
            ("sft", lost),
            ("opdlm", lost),
        ),
        greater(
            "OPDLM figures 3a, 5",
            "OPDLM: threshold 0.7 decodes more tokens per forward than 0.9",
            ("opdlm", speed("block_4", "dynamic_0.7")),
            ("opdlm", speed("block_4", "dynamic_0.9")),
        ),
        greater(
            "OPDLM figures 3a, 5",
            "OPDLM: threshold 0.7 costs accuracy against 0.9",
            ("opdlm", dynamic),
            ("opdlm", accuracy("block_4", "dynamic_0.7")),
        ),
        greater(
            "OPDLM figure 6",
            "tokens per forward of rollouts rise more in the first half of training than in the "
            "second",
            ("opdlm", speed_gain(BEGINNING, MIDDLE)),
            ("opdlm", speed_gain(MIDDLE, END)),
        ),
        *_forgetting(results),
    ]


def _forgetting(results: Sequence[Result]) -> list[Claim]:
    """RND1: problems of a kind that the corpus lacks, after pretraining on it.

    The loss on them falls while the model learns to denoise, so forgetting is measured by its rise
    above its minimum. Wrong answers to them show forgetting only in a model that solves problems of
    the corpus's kind.
    """
    one_rate, by_group = "scp_one_lr", "scp_rnd1_groups"
    better = "SCP with RND1's learning rates by group forgets less than with one rate "
    recipes = (one_rate, by_group)
    rises = [sample(results, recipe, rise("validation_loss")) for recipe in recipes]
    claim = _claim(
        "RND1 figure 4.1",
        better + "(rise of the diffusion loss of held-out documents of the absent kind above "
        "its minimum, one rate against groups)",
        rises[0],
        rises[1],
        verdict_greater,
    )
    claims = [_unless_below(claim, rises, RISING, f"no run rises by {RISING:g}")]
    for suffix, setting, reading in (
        ("", "static", "decoded by diffusion"),
        ("_autoregressive", "autoregressive", "read out autoregressively"),
    ):
        absent = accuracy(f"unseen{suffix}", setting)
        claim = _claim(
            "RND1 figure 4.1",
            better + f"(accuracy on problems absent from the corpus, {reading})",
            sample(results, by_group, absent),
            sample(results, one_rate, absent),
            verdict_greater,
        )
        present = accuracy(f"seen{suffix}", setting)
        solved = [sample(results, recipe, present) for recipe in recipes]
        reason = f"no run solves {SOLVING:g} % of what the corpus has"
        claims.append(_unless_below(claim, solved, SOLVING, reason))
    return claims


def _unless_below(
    claim: Claim, samples: Sequence[Sample | None], least: float, reason: str
) -> Claim:
    """The claim; not distinguishable if no run of the samples reaches a least value."""
    if claim.verdict is None or any(
        value >= least for each in samples if each for value in each.values
    ):
        return claim
    return replace(claim, measured=f"{claim.measured}; {reason}", verdict="not distinguishable")


def plateau_claims(results: Sequence[Result]) -> list[Claim]:
    """This project's own aim: the long run reaches its plateau, close to its teacher."""
    teacher = sample(results, "teacher", accuracy("autoregressive", "autoregressive"))
    return [
        _plateau(sample(results, "best", speed_gain((0.8, 0.9), (0.9, 1.0)))),
        *(
            _claim(
                "this project",
                f"the long run is within {CLOSE_POINTS:g} points of the teacher ({title})",
                sample(results, "best", accuracy("block_4", setting)),
                teacher,
                lambda a, b: verdict_within(a, b, CLOSE_POINTS),
            )
            for title, setting in (("static", "static"), ("dynamic 0.9", "dynamic_0.9"))
        ),
    ]


def _plateau(gain: Sample | None) -> Claim:
    source, statement = (
        "this project",
        "the long run is trained to its plateau (tokens per forward that its rollouts gain in the "
        f"last tenth of training over the tenth before it: at most {CLOSE_SPEED:g} in every run)",
    )
    if gain is None:
        return Claim(source, statement, "", None)
    rests = max(map(abs, gain.values)) <= CLOSE_SPEED
    measured = f"{format_sample(gain, 2)}"
    return Claim(source, statement, measured, "supported" if rests else "not supported")


def format_sample(value: Sample, digits: int = 1) -> str:
    """Mean ± standard deviation; the mean alone for a single seed."""
    text = f"{value.mean:.{digits}f}"
    return text if value.std is None else f"{text} ± {value.std:.{digits}f}"


def _claim(
    source: str,
    statement: str,
    a: Sample | None,
    b: Sample | None,
    test: Callable[[Sample, Sample], Verdict],
) -> Claim:
    if a is None or b is None:
        return Claim(source, statement, "", None)
    std = pooled_std(a, b)
    spread = "" if std is None else f", std {std:.2f}"
    measured = (
        f"{format_sample(a, 2)} against {format_sample(b, 2)}: {a.mean - b.mean:+.2f}{spread}"
    )
    return Claim(source, statement, measured, test(a, b))
