"""How fast a run is, and how near to what its devices can do."""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_dlm import platform
from megatron_dlm.accounting.flops import BACKWARD, ForwardFlops, causal_pairs, visible_pairs
from megatron_dlm.accounting.machine import measured
from megatron_dlm.data.packing import TrainingBatch
from megatron_dlm.idle import NEIGHBOURS
from megatron_dlm.models.attention_layout import PADDING_DOCUMENT, Field
from megatron_dlm.models.model import chunks_of
from megatron_dlm.rollout.work import RolloutWork
from megatron_dlm.teacher.frozen import FrozenTeacher
from megatron_dlm.training.metrics import PhaseTimes, Throughput
from megatron_dlm.training.run import Run
from megatron_dlm.types.teacher_targets import HiddenTargets
from megatron_dlm.types.trajectory import Trajectory


@dataclass
class _Local:
    """What this replica did in an update and the phases before it; sums over replicas are global.

    Attributes:
        student: FLOPs of the student's forward and backward passes, loss included.
        teacher: FLOPs of the teacher's forward passes.
        rollout: FLOPs of the rollout's forwards.
        rollout_floor: Seconds that these take at least on its devices.
        response_tokens: That it decoded.
        tokens: Of the rows of the update.
        padding: Tokens among them that belong to no document.
        rollout_wait: Seconds that stages waited for others in the rollout.
        teacher_wait: The same of the teacher.
        student_wait: The same of forward and backward.
    """

    student: float = 0.0
    teacher: float = 0.0
    rollout: float = 0.0
    rollout_floor: float = 0.0
    response_tokens: float = 0.0
    tokens: float = 0.0
    padding: float = 0.0
    rollout_wait: float = 0.0
    teacher_wait: float = 0.0
    student_wait: float = 0.0


WAITS = 3
"""Fields at the end of `_Local` that differ between the stages of a replica."""


class ThroughputMeter:
    """Counts what an update and the phases before it had to do, and divides by their time.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._flops = ForwardFlops.of(run.inputs.architecture)
        own = run.inputs.teacher
        teacher = run.inputs.architecture if own is None else own.source.architecture
        self._teacher_flops = ForwardFlops.of(teacher)
        self._reads_early = chunks_of(run.student.model)[-1].reads_early
        self._teacher_reads_early = False
        if isinstance(run.teacher, FrozenTeacher) and run.groups.cp is None:
            self._teacher_reads_early = chunks_of(run.teacher.model)[-1].reads_early
        config = run.config
        self._gpus = torch.distributed.get_world_size()
        # Ranks that decode together count the same forwards.
        decoding = run.groups.for_decoding()
        self._together = run.groups.num_replicas // decoding.num_replicas
        self._of_replica = self._gpus // decoding.num_replicas
        # Of frozen weights no gradient is computed, only of what they were multiplied with.
        self._passes = 1 + (BACKWARD if config.lora.lora_rank is None else 1)
        dtype = torch.bfloat16 if config.model.bf16 else torch.float32
        self._machine = measured(dtype) if config.logging.measure_machine else None
        self._weight_bytes = sum(
            parameter.numel() * parameter.element_size()
            for parameter in run.student.model.parameters()
        )
        a = run.inputs.architecture
        self._key_bytes = 2 * a.num_layers * a.num_query_groups * a.kv_channels * dtype.itemsize
        self._local = _Local()

    def rolled_out(self, response_tokens: int) -> None:
        """Add a rollout, in which this replica decoded so many tokens of responses."""
        engine = self._run.source.engine
        if engine is None:
            return
        work, flops = engine.work.take(), self._flops
        local = self._local
        rollout = flops.forward(sum(work.tokens), sum(work.pairs), sum(work.logits), sum(work.read))
        local.rollout += rollout / self._together
        local.response_tokens += response_tokens
        local.rollout_floor += self._floor(work)
        local.rollout_wait += NEIGHBOURS.take()

    def _floor(self, work: RolloutWork) -> float:
        """Seconds that forwards take at least: products, or reading weights and keys."""
        if self._machine is None:
            return 0.0
        forwards = zip(work.tokens, work.pairs, work.logits, work.read, work.keys, strict=True)
        return sum(
            self._machine.floor(
                self._flops.forward(tokens, pairs, logits, read) / self._of_replica,
                self._weight_bytes + keys * self._key_bytes / self._of_replica,
            )
            for tokens, pairs, logits, read, keys in forwards
        )

    def annotated(self, trajectories: Sequence[Trajectory]) -> None:
        """Add the frozen teacher's forward passes over trajectories, as above."""
        if isinstance(self._run.teacher, FrozenTeacher):
            part = self._run.groups.part_of_shared(trajectories)
            lengths = [len(t.token_ids) - 1 for t in part]
            pairs = sum(causal_pairs(length) for length in lengths)
            read = sum(len(t.response_ids) for t in part) if self._teacher_reads_early else None
            self._local.teacher += self._teacher_flops.forward(sum(lengths), pairs, 0, read)
            self._local.teacher_wait += NEIGHBOURS.take()

    def counted(self, batches: Sequence[TrainingBatch]) -> list[float]:
        """What this replica had to do in an update of these micro-batches and before it, to add up.

        Of its last stage, as all that is measured of an update.
        """
        for batch in batches:
            self._add(batch)
        return list(vars(self._local).values())[:-WAITS]

    def update(self, sums: Sequence[float], times: PhaseTimes, stage_wait: float) -> Throughput:
        """The figures of an update and what came before it; all ranks call this.

        Args:
            sums: Of `counted`, over all replicas.
            times: Seconds of the phases.
            stage_wait: Seconds of the student's that this rank waited for other stages.
        """
        self._local.student_wait += stage_wait
        done, self._local = _Local(*sums, *self._waits()), _Local()
        seconds = times.rollout if done.rollout else 0.0
        gpus, machine = self._gpus, self._machine
        tflops = _rate(done.student, times.student * gpus * 1e12)
        assert tflops is not None
        return Throughput(
            student_tflops=tflops,
            teacher_tflops=_rate(done.teacher, times.teacher * gpus * 1e12),
            rollout_tflops=_rate(done.rollout, seconds * gpus * 1e12),
            mfu=None if machine is None else tflops * 1e12 / machine.flops,
            rollout_tokens_per_second=_rate(done.response_tokens, seconds),
            rollout_tokens_per_second_per_gpu=_rate(done.response_tokens, seconds * gpus),
            rollout_floor_share=None
            if machine is None
            else _rate(done.rollout_floor / self._run.groups.num_replicas, seconds),
            peak_memory_gb=peak_memory() / 1e9,
            padding_share=done.padding / done.tokens if done.tokens else 0.0,
            rollout_stage_idle=self._idle(done.rollout_wait, seconds),
            teacher_stage_idle=self._idle(done.teacher_wait, times.teacher if done.teacher else 0),
            student_stage_idle=self._idle(done.student_wait, times.student),
        )

    def _add(self, batch: TrainingBatch) -> None:
        layout, length = batch.row.attention, len(batch.row.token_ids)
        assert isinstance(layout, torch.Tensor)
        local, supervised = self._local, len(batch.supervised)
        padding = int((layout[Field.DOCUMENT, -length:] == PADDING_DOCUMENT).sum())
        pairs = visible_pairs(layout) if batch.pairs is None else batch.pairs
        local.tokens += length
        local.padding += padding
        read = supervised if self._reads_early else None
        forward = self._flops.forward(length - padding, pairs, supervised, read)
        local.student += self._passes * forward
        if isinstance(batch.targets, HiddenTargets):
            local.student += self._teacher_flops.forward(0, 0, supervised)

    def _idle(self, waited: float, seconds: float) -> float | None:
        """Share of a phase's time that its stages waited; None without stages or the phase."""
        groups = self._run.groups
        if groups.pp is None:
            return None
        return _rate(waited, seconds * groups.num_replicas * groups.pp.size())

    def _waits(self) -> list[float]:
        """The last fields of `_Local`, of all stages of all replicas."""
        groups = self._run.groups
        waits = list(vars(self._local).values())[-WAITS:]
        if groups.pp is None:  # there are no stages, and no figures of them
            return waits
        sums = torch.tensor(waits, dtype=torch.float64).to(platform.device())
        torch.distributed.all_reduce(sums, group=groups.pp)
        if groups.replicas is not None:
            torch.distributed.all_reduce(sums, group=groups.replicas)
        return [float(number) for number in platform.to_host(sums).tolist()]


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None


def peak_memory() -> int:
    """Bytes: of the device's tensors at their most, or of this process on a CPU."""
    if platform.is_cuda():
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
