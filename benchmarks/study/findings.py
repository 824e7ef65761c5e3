"""What the study found, as sentences of numbers; one without its measurements is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from benchmarks.study.claims import (
    Quantity,
    accuracy,
    final_loss,
    format_sample,
    papers_claims,
    rise,
    speed,
)
from benchmarks.study.recipes import Sizes, recipes
from benchmarks.study.statistics import Result, Sample, sample

LEARNING = 1.5
"""Nats per token that a run stays below once it has left the plateau of noise, of 2 to 3."""
AT_LEAST = 3
"""Points of a curve below that; the last alone could be chance."""
SOLVED = 50.0
"""Percentage of problems that a run must solve to count as converted."""
PURELY_ON_POLICY = ("opdlm", "opdlm_off", "opdlm_global")
STUDENTS = ("qwen3_64", "qwen3_96")
PAIR = ("opdlm_grown", "d_opsd")
WITH_TEACHER_RESPONSES = {each.name for each in recipes(Sizes()) if each.mixes_teacher_responses}

STATIC, DYNAMIC = accuracy("block_4", "static"), accuracy("block_4", "dynamic_0.9")


def plateau_left(result: Result) -> float | None:
    """Update from which the loss on rollouts stays below `LEARNING`; infinite if it never does.

    None for a run without rollouts, or with responses of the teacher among them: its loss on those
    tells nothing of what the student writes.
    """
    if result["recipe"] in WITH_TEACHER_RESPONSES:
        return None
    curves = result.get("training", {}).get("curves", {})
    if "tokens_per_forward" not in curves or "loss" not in curves:
        return None
    above = [index for index, loss in enumerate(curves["loss"]) if loss >= LEARNING]
    first = above[-1] + 1 if above else 0
    steps = curves["step"]
    return float(steps[first]) if first + AT_LEAST <= len(steps) else float("inf")


def by_seed(value: Sample, digits: int = 1) -> str:
    """The value of each seed; "never" for one that is infinite."""
    return " / ".join(
        "never" if each == float("inf") else f"{each:.{digits}f}" for each in value.values
    )


def findings(results: Sequence[Result]) -> list[str]:
    """All sentences whose numbers were measured, in the order of the page."""
    sentences = (
        _off_policy,
        _cold_start,
        _remedy,
        _long_run,
        _block_sizes,
        _self_distillation,
        _teachers,
        _forgetting,
        _longer_pretraining,
        _claims,
    )
    return [text for text in (sentence(results) for sentence in sentences) if text]


Reader = Callable[[str, Quantity], Sample]


class NotMeasured(Exception):
    """A number of a sentence is missing."""


def _reader(results: Sequence[Result]) -> Reader:
    def read(recipe: str, quantity: Quantity) -> Sample:
        value = sample(results, recipe, quantity)
        if value is None:
            raise NotMeasured
        return value

    return read


def _of_measured(sentence: Callable[[Reader], str]) -> Callable[[Sequence[Result]], str | None]:
    def text(results: Sequence[Result]) -> str | None:
        try:
            return sentence(_reader(results))
        except NotMeasured:
            return None

    return text


def _below(values: Sequence[float], limit: float) -> str:
    return f"{sum(value < limit for value in values)} of {len(values)}"


@_of_measured
def _off_policy(read: Reader) -> str:
    parts = [
        f"{title} {format_sample(read(name, STATIC))} % static and "
        f"{format_sample(read(name, DYNAMIC))} % at dynamic 0.9"
        for name, title in (("sft", "SFT reaches"), ("off_policy", "off-policy distillation"))
    ]
    return f"**On the teacher's responses** {', '.join(parts)}."


@_of_measured
def _cold_start(read: Reader) -> str:
    reached = [value for name in PURELY_ON_POLICY for value in read(name, STATIC).values]
    left = by_seed(read("opdlm", plateau_left), 0)
    return (
        f"**Purely on-policy runs are bimodal**: {_below(reached, SOLVED)} solve less than "
        f"{SOLVED:g} %. A student that was never trained on blocks writes noise, on which the "
        f"teacher has little to say; the seeds of `opdlm` get out of it at update {left}."
    )


def _remedy(results: Sequence[Result]) -> str | None:
    titles = {
        "opdlm": "as it is",
        "half_rate": "half the learning rate",
        "long_warm_up": "five times the warm-up",
        "cool": "temperature 0.5",
        "opdlm_grown": "responses that grow from one block",
    }
    read = {name: sample(results, name, plateau_left) for name in titles}
    left = [
        f"{title} {by_seed(updates, 0)}"
        for name, title in titles.items()
        if (updates := read[name])
    ]
    reached = sample(results, "opdlm_grown", STATIC)
    if reached is None:
        return None
    return (
        "**What ends the plateau** (update at which each seed leaves it; but for the first and the "
        f"last, runs stop early): {', '.join(left)}. Growing responses need none of the teacher's, "
        f"and solve {by_seed(reached)} %."
    )


@_of_measured
def _long_run(read: Reader) -> str:
    teacher = read("teacher", accuracy("autoregressive", "autoregressive"))
    return (
        f"**The long run**, on the teacher's responses first, reaches "
        f"{format_sample(read('best', STATIC))} % static and {format_sample(read('best', DYNAMIC))}"
        f" % at dynamic 0.9, {read('best', speed('block_4', 'dynamic_0.9')).mean:.2f} tokens a "
        f"forward; its teacher has {teacher.mean:.1f} %."
    )


def _block_sizes(results: Sequence[Result]) -> str | None:
    parts = []
    for size, before in ((8, 4), (16, 8)):
        static, dynamic = (
            accuracy(f"block_{size}", setting) for setting in ("static", "dynamic_0.9")
        )
        texts = []
        for recipe, how in (
            (f"blocks_{size}", "from the start"),
            (f"blocks_{size}_after_{before}", f"after blocks of {before}"),
            ("best", "decoded so, but trained with 4"),
        ):
            found = [sample(results, recipe, each) for each in (static, dynamic)]
            values = [each.mean for each in found if each]
            if len(values) == len(found):
                texts.append(f"{' / '.join(f'{value:.1f}' for value in values)} % {how}")
        if texts:
            parts.append(f"blocks of {size} {', '.join(texts)}")
    if not parts:
        return None
    return f"**Larger blocks** (static / dynamic 0.9): {'; '.join(parts)}."


def _self_distillation(results: Sequence[Result]) -> str | None:
    """Before and after, of the seeds that went on."""
    seeds = {result["seed"] for result in results if result["recipe"] == PAIR[1]}
    return _gain([result for result in results if result["seed"] in seeds])


@_of_measured
def _gain(read: Reader) -> str:
    before, after = ([read(name, each) for each in (STATIC, DYNAMIC)] for name in PAIR)
    fast = [read(name, speed("block_4", "dynamic_0.9")).mean for name in PAIR]
    return (
        f"**d-OPSD** takes the students of growing responses from {by_seed(before[0], 1)} to "
        f"{by_seed(after[0], 1)} % static, from {by_seed(before[1], 1)} to "
        f"{by_seed(after[1], 1)} % at dynamic 0.9 and from {fast[0]:.2f} to {fast[1]:.2f} tokens a "
        f"forward."
    )


def _teachers(results: Sequence[Result]) -> str | None:
    autoregressive = accuracy("autoregressive", "autoregressive")
    of_students = []
    for name in STUDENTS:
        parts = []
        for teacher, row in (*zip(STUDENTS, STUDENTS, strict=True), ("qwen3", "teacher")):
            own = sample(results, row, autoregressive)
            student = sample(results, f"{name}_from_{teacher}", STATIC)
            if own and student:
                parts.append(f"{student.mean:.1f} % from {teacher} ({own.mean:.1f} %)")
        if len(parts) > 1:
            of_students.append(f"{name} reaches {', '.join(parts)}")
    if not of_students:
        return None
    return f"**Teachers of several sizes**, static: {'; '.join(of_students)}."


@_of_measured
def _forgetting(read: Reader) -> str:
    def losses(recipe: str) -> str:
        seen, unseen = read(recipe, final_loss("loss")), read(recipe, final_loss("validation_loss"))
        return f"{seen.mean:.2f} and {unseen.mean:.2f}"

    names = ("scp_one_lr", "scp_rnd1_groups")
    highest = max(value for name in names for value in read(name, rise("validation_loss")).values)
    solved = [value for name in names for value in read(name, accuracy("seen", "static")).values]
    return (
        f"**SCP** ends at losses of {losses(names[0])} on text like its corpus and on text that "
        f"this lacks with one learning rate, of {losses(names[1])} with RND1's groups; the second "
        f"ends at most {highest:.2f} above its minimum, and the best run solves {max(solved):.1f} "
        "% of what its corpus has."
    )


@_of_measured
def _longer_pretraining(read: Reader) -> str:
    """By blocks, and from left to right; last, what forgetting is told by: corpora of two kinds."""

    def solved(recipe: str) -> str:
        blocks = _of_both(read, recipe, "", "static")
        return f"{blocks} % (from left to right {_of_both(read, recipe, *left_to_right)} %)"

    left_to_right = ("_autoregressive", "autoregressive")
    return (
        "**Longer SCP** solves, of problems that add and subtract / that multiply, "
        f"{solved('scp_long')} after four times as many updates on a corpus that does not "
        f"multiply, {solved('scp_annealed')} after eight times as many that go from causal to full "
        f"attention, {solved('scp_annealed_all')} after those on a corpus of both. From left to "
        f"right it was {_of_both(read, 'teacher', *left_to_right)} % before."
    )


def _of_both(read: Reader, recipe: str, suffix: str, setting: str) -> str:
    """Accuracy on both kinds of problems."""
    values = [read(recipe, accuracy(f"{kind}{suffix}", setting)) for kind in ("seen", "unseen")]
    return " / ".join(f"{value.mean:.1f}" for value in values)


def _claims(results: Sequence[Result]) -> str | None:
    counts = Counter(claim.verdict for claim in papers_claims(results) if claim.verdict)
    if not counts:
        return None
    text = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
    return f"**Of the papers' claims** that are measured here: {text} ([each](details.md))."
