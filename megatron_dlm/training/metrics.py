"""Reports of a run: printed lines on rank 0, `metrics.jsonl` and TensorBoard."""

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.output_file import write_file
from megatron_dlm.terminal import format_duration, say, wrapped
from megatron_dlm.training.metrics_file import MetricsFile


@dataclass
class PhaseTimes:
    """Seconds of wall clock.

    `rollout` and `teacher` are added to the first update after them, `validation` and `evaluation`
    to the update before them. The columns of `metrics.jsonl` therefore add up to the run's time in
    each phase; `evaluation` is only in lines of updates that have one.
    """

    rollout: float = 0.0
    teacher: float = 0.0
    student: float = 0.0
    optimizer: float = 0.0
    validation: float = 0.0
    evaluation: float = 0.0


@dataclass(frozen=True)
class Throughput:
    """Speed of an update and of the phases before it, all ranks; None where there was no phase.

    FLOPs are those of the model's products that are needed (`accounting.flops`).

    Attributes:
        student_tflops: 10^12 FLOPs per second and GPU (or process) of forward and backward.
        teacher_tflops: The same of the frozen teacher's forward passes.
        rollout_tflops: The same of the rollout.
        mfu: Model FLOPs utilisation: `student_tflops` as a share of the rate of large matrix
            products measured on this device; None with `--no-measure-machine`.
        rollout_tokens_per_second: Response tokens.
        rollout_tokens_per_second_per_gpu: The same of each GPU (or process).
        rollout_floor_share: Time that the rollout's forwards take at least, by measured matrix rate
            and memory bandwidth, as a share of the time it took; None likewise.
        peak_memory_gb: 10^9 bytes of this rank's tensors at their most; on a CPU of its process.
        padding_share: Tokens of the rows that belong to no document.
        rollout_stage_idle: Share of the rollout's time that pipeline stages wait for others, mean
            over all ranks; None without a pipeline.
        teacher_stage_idle: The same of the teacher.
        student_stage_idle: The same of forward and backward.
    """

    student_tflops: float
    teacher_tflops: float | None
    rollout_tflops: float | None
    mfu: float | None
    rollout_tokens_per_second: float | None
    rollout_tokens_per_second_per_gpu: float | None
    rollout_floor_share: float | None
    peak_memory_gb: float
    padding_share: float
    rollout_stage_idle: float | None = None
    teacher_stage_idle: float | None = None
    student_stage_idle: float | None = None


@dataclass(frozen=True)
class LengthHistogram:
    """Responses by length: bin i counts lengths from i bin_width + 1 to (i + 1) bin_width tokens.

    Attributes:
        bin_width: In tokens.
        counts: Responses in each bin, longer ones in the last.
    """

    bin_width: int
    counts: list[int]


@dataclass(frozen=True)
class Staleness:
    """How old the responses of a rollout batch are (`--partial-rollouts`).

    Attributes:
        continued_share: Share of them that an earlier rollout began.
        mean_rollouts: Rollouts between the one that began a response and the current one, mean.
        left: Responses that wait for the next rollout.
    """

    continued_share: float
    mean_rollouts: float
    left: int


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer update, one line of `metrics.jsonl`.

    Attributes:
        step: Optimizer updates done, from 1.
        rollout: Rollout (or data-set) batches begun, from 1.
        loss: Per supervised token (or row, with `row_mean`), with the weighted loss of the
            autoregressive mode where the context is causal.
        grad_norm: Before clipping.
        lr: Learning rate of this update by parameter group.
        supervised_tokens: In this update's global batch.
        response_tokens_total: Response tokens generated or read so far, all ranks; of a prompt that
            was answered again, those of the last response.
        trained_tokens_total: Response tokens trained on so far, all ranks: those of every response,
            or corpus window, in every update that trains on it.
        flops_total: Training FLOPs so far as OPDLM counts them (equation 7): those tokens times
            6 N_student + 2 N_teacher; without a teacher, 6 N_student. N are the parameters that a
            token meets: embeddings once where they are tied, of experts those that the router
            chooses. Rollouts do not count.
        response_length: Mean response length of the current rollout batch, tokens.
        tokens_per_forward: Response tokens per forward of a sequence in the current rollout; None
            for objectives without one.
        eos_rate: Share of the current batch's responses that ended in EOS.
        accuracy: Share of the current batch's prompts whose first response is right; None where
            responses are not verified.
        solved_rate: Share of them with a right response within `--max-tries`; None likewise.
        time: Seconds by phase.
        throughput: Speed; None where nothing was measured.
        validation_loss: Of the held-out data after this update; None where it was not measured.
        skipped_updates: Updates so far that were left out because they diverged
            (`--on-divergence`); where loss or gradient norm is no finite number, files have null.
        loss_by_position: Mean unweighted loss of the supervised tokens in each of up to 16 equal
            stretches of a block, from its start; None without blocks.
        causal_loss: Mean loss of the autoregressive mode, without its weight
            (`--causal-loss-weight`); None without a causal context.
        student_entropy: In nats, mean over up to 64 supervised tokens of each data-parallel rank's
            first micro-batch.
        tokens_by_step: Mean tokens that the first, second, ... denoising forward of a block commits
            in the current rollout, tail included; None without rollouts.
        response_lengths: Of the current rollout batch.
        staleness: Of the current rollout batch; None where every rollout finishes its responses.
        weight_lag: Updates before this one that the weights which decoded the current rollout do
            not have; None where the training processes decode.
        evaluation: Rates of the student's answers to held-out prompts after this update, by
            decoding setting (`EvaluationResult`); where it did not answer them, files have no such
            entry.
    """

    step: int
    rollout: int
    loss: float
    grad_norm: float
    lr: dict[str, float]
    supervised_tokens: int
    response_tokens_total: int
    trained_tokens_total: int
    flops_total: int
    response_length: float
    tokens_per_forward: float | None
    eos_rate: float
    accuracy: float | None
    solved_rate: float | None
    time: PhaseTimes
    throughput: Throughput | None = None
    validation_loss: float | None = None
    skipped_updates: int = 0
    loss_by_position: list[float | None] | None = None
    causal_loss: float | None = None
    student_entropy: float | None = None
    tokens_by_step: list[float] | None = None
    response_lengths: LengthHistogram | None = None
    staleness: Staleness | None = None
    weight_lag: int | None = None
    evaluation: dict[str, dict[str, Any]] | None = None


class MetricsLogger:
    """Writes the metrics of a run; on ranks other than 0 every method does nothing.

    Args:
        run_folder: Where `metrics.jsonl` and `tensorboard/` go; None writes no files.
        enabled: Whether this is rank 0.
        total_steps: Steps of the run, to estimate the time left.
        first_step: Steps done before this process started; later lines of an earlier attempt move
            from `metrics.jsonl` to `metrics_superseded.jsonl`.
        log_interval: Steps between two printed lines.
        tensorboard: Whether to write TensorBoard events.
        wandb_project: Also log to this Weights & Biases project.
        run_config: Flat configuration, for Weights & Biases.
    """

    def __init__(
        self,
        run_folder: str | None,
        *,
        enabled: bool,
        total_steps: int,
        first_step: int = 0,
        log_interval: int = 1,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        run_config: dict[str, Any] | None = None,
    ) -> None:
        self._enabled = enabled
        self._total_steps = total_steps
        self._first_step = first_step
        self._log_interval = log_interval
        self._started = time.perf_counter()
        self._window = PhaseTimes()
        self._window_tokens = 0
        self._rollout: int | None = None
        self._file: MetricsFile | None = None
        self._board: Any = None
        self._wandb: Any = None
        if not enabled or run_folder is None:
            return
        folder = Path(run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(folder / "metrics.jsonl", first_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Hide steps from here on that an earlier attempt wrote.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=wandb_project,
                dir=str(folder),
                config=run_config,
                id=_wandb_run_id(folder),
                resume="allow",
            )
            # A resumed run repeats steps, which W&B's own counter would refuse.
            self._wandb.define_metric("*", step_metric="step")

    def print(self, text: str) -> None:
        """Print a line."""
        if self._enabled:
            say(text)

    def step(self, metrics: StepMetrics) -> None:
        """Record one optimizer update."""
        if not self._enabled:
            return
        record = asdict(metrics)
        for name in ("loss", "grad_norm"):
            record[name] = record[name] if math.isfinite(record[name]) else None
        if metrics.evaluation is None:
            del record["evaluation"], record["time"]["evaluation"]
        if self._file is not None:
            self._file.write(record)
        if self._board is not None or self._wandb is not None:
            lengths = metrics.response_lengths
            is_first = metrics.rollout != self._rollout
            self._rollout = metrics.rollout
            scalars = _scalars(
                {name: v for name, v in record.items() if name != "response_lengths"}
            )
            if lengths is not None and is_first and any(lengths.counts):
                self._log_lengths(lengths, metrics.step)
            self._log_scalars(scalars, metrics.step)
            if self._wandb is not None:
                self._wandb.log({"step": metrics.step, **scalars})
        self._window_tokens += metrics.supervised_tokens
        for name, seconds in asdict(metrics.time).items():
            setattr(self._window, name, getattr(self._window, name) + seconds)
        due = metrics.step % self._log_interval == 0 or metrics.step == self._total_steps
        if due or metrics.validation_loss is not None or metrics.evaluation is not None:
            self._print_step(metrics)

    def evaluation_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Show answers to held-out prompts: text in TensorBoard, a table in Weights & Biases.

        Args:
            step: Optimizer updates done; the metrics of this one come afterwards.
            samples: See `AnsweredPrompts`.
        """
        if self._board is not None:
            for decoding in dict.fromkeys(sample["decoding"] for sample in samples):
                own = [sample for sample in samples if sample["decoding"] == decoding]
                text = "\n\n---\n\n".join(map(_as_markdown, own))
                self._board.add_text(f"evaluation/{decoding}", text, step)
        if self._wandb is not None and samples:
            import wandb

            columns = list(samples[0])
            rows = [[step, *(sample[column] for column in columns)] for sample in samples]
            table = wandb.Table(columns=["step", *columns], data=rows)
            self._wandb.log({"step": step, "evaluation/samples": table}, commit=False)

    def late_evaluation(
        self, step: int, evaluation: Mapping[str, Mapping[str, Any]], seconds: float
    ) -> None:
        """Add the evaluation of an update whose other metrics an earlier start has recorded.

        Args:
            step: That update, the last one before this start.
            evaluation: See `StepMetrics`.
            seconds: That it took.
        """
        if not self._enabled:
            return
        if self._file is not None:
            self._file.add_evaluation(step, evaluation, seconds)
        scalars = _scalars({"evaluation": evaluation})
        self._log_scalars(scalars, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **scalars})
        parts = [f"step {step}/{self._total_steps}", *_evaluation_parts(evaluation)]
        self.print(wrapped(parts))

    def _log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Add all to TensorBoard as one event: `add_scalar` takes ten times as long, one by one."""
        if self._board is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._board.file_writer.add_summary(Summary(value=values), step)

    def _log_lengths(self, lengths: LengthHistogram, step: int) -> None:
        """Add the histogram of a rollout batch, taking each response for the middle of its bin."""
        width, counts = lengths.bin_width, lengths.counts
        edges = [i * width for i in range(len(counts) + 1)]
        if self._board is not None:
            middles = [edge + width / 2 for edge in edges[:-1]]
            self._board.add_histogram_raw(
                "response_lengths",
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=sum(n * middle for n, middle in zip(counts, middles, strict=True)),
                sum_squares=sum(n * middle**2 for n, middle in zip(counts, middles, strict=True)),
                bucket_limits=edges[1:],
                bucket_counts=counts,
                global_step=step,
            )
        if self._wandb is not None:
            import wandb

            histogram = wandb.Histogram(np_histogram=(counts, edges))
            self._wandb.log({"step": step, "response_lengths": histogram}, commit=False)

    def _print_step(self, metrics: StepMetrics) -> None:
        done = metrics.step - self._first_step
        elapsed = time.perf_counter() - self._started
        left = elapsed / done * (self._total_steps - metrics.step)
        window = self._window
        seconds = window.rollout + window.teacher + window.student + window.optimizer
        parts = [f"step {metrics.step}/{self._total_steps}", f"loss {metrics.loss:.4f}"]
        if metrics.validation_loss is not None:
            parts.append(f"validation loss {metrics.validation_loss:.4f}")
        parts += _evaluation_parts(metrics.evaluation or {})
        parts += [f"grad {metrics.grad_norm:.2f}", f"lr {max(metrics.lr.values()):.2e}"]
        if metrics.tokens_per_forward is not None:
            parts.append(f"tok/fwd {metrics.tokens_per_forward:.2f} eos {metrics.eos_rate:.0%}")
        if metrics.accuracy is not None:
            parts.append(f"right {metrics.accuracy:.0%} solved {metrics.solved_rate:.0%}")
        parts.append(f"{self._window_tokens / max(seconds, 1e-9):,.0f} supervised tok/s")
        speed = metrics.throughput
        if speed is not None:
            parts.append(f"memory {speed.peak_memory_gb:.2f} GB")
            if speed.mfu is not None:
                parts.append(f"MFU {speed.mfu:.1%}")
            if speed.student_stage_idle is not None:
                rollout = speed.rollout_stage_idle
                parts.append(
                    "stages idle "
                    + ("" if rollout is None else f"rollout {rollout:.0%} ")
                    + f"student {speed.student_stage_idle:.0%}"
                )
        parts.append(
            f"rollout {window.rollout:.1f}s teacher {window.teacher:.1f}s "
            f"student {window.student:.1f}s"
        )
        parts.append(f"elapsed {format_duration(elapsed)} left {format_duration(left)}")
        self.print(wrapped(parts))
        self._window, self._window_tokens = PhaseTimes(), 0

    def close(self) -> None:
        """Flush and close what is open."""
        for writer in (self._file, self._board):
            if writer is not None:
                writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _evaluation_parts(evaluation: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Accuracy and speed under each decoding setting, for a line of progress."""
    parts = []
    for name, rates in evaluation.items():
        speed = rates["tokens_per_forward"]
        text = f"held out {name} {rates['accuracy']:.1%}"
        parts.append(text if speed is None else f"{text} tok/fwd {speed:.2f}")
    return parts


def _as_markdown(sample: Mapping[str, Any]) -> str:
    """An answer to a held-out prompt, for TensorBoard."""
    speed = sample["tokens_per_forward"]
    facts = [
        f"prompt {sample['sample']}",
        "right" if sample["correct"] else "wrong",
        f"{sample['response_tokens']} tokens, {sample['finish_reason']}",
        "" if speed is None else f"{speed:.2f} tokens a forward",
    ]
    texts = [("prompt", sample["prompt"]), ("response", sample["response"])]
    if sample["reference"] is not None:
        texts.append(("reference", str(sample["reference"])))
    parts = [f"**{', '.join(fact for fact in facts if fact)}**"]
    for name, text in texts:
        indented = "\n".join(f"    {line}" for line in text.split("\n"))  # a block of code
        parts.append(f"{name}:\n\n{indented}")
    return "\n\n".join(parts)


def _wandb_run_id(folder: Path) -> str:
    """The id under which Weights & Biases knows the run of a folder: the same after a resume."""
    file = folder / "wandb_run_id.txt"
    if not file.is_file():
        write_file(file, secrets.token_hex(4) + "\n", "--save")
    return file.read_text().strip()


def _scalars(record: Mapping[Any, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            value = dict(enumerate(value, start=1))
        if isinstance(value, dict):
            flat |= _scalars(value, f"{prefix}{name}/")
        elif value is not None and name != "step":
            flat[f"{prefix}{name}"] = value
    return flat
