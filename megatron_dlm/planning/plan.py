"""The layouts of a run on so many GPUs, with memory and time, the best first."""

from dataclasses import dataclass

from megatron_dlm.config import Config
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.planning.gpus import Gpu
from megatron_dlm.planning.layouts import Layout, accepted, larger_batches
from megatron_dlm.planning.memory import MemoryModel, RankMemory
from megatron_dlm.planning.times import PhaseSeconds, TimeModel
from megatron_dlm.planning.workload import Lengths


@dataclass(frozen=True)
class Plan:
    """A layout and what it costs.

    Attributes:
        layout: Sizes of the groups.
        config: Of the run, with the layout.
        memory: Of the rank that needs most.
        seconds: Of an update.
        room: Bytes of a GPU that are left; below zero where the run does not fit.
    """

    layout: Layout
    config: Config
    memory: RankMemory
    seconds: PhaseSeconds
    room: float

    @property
    def fits(self) -> bool:
        """Whether every phase has the memory that it needs."""
        return self.room >= 0


@dataclass(frozen=True)
class Planner:
    """What layouts are judged by.

    Attributes:
        config: Of the run.
        student: Its architecture.
        teacher: That of a teacher with weights of its own; None without one.
        gpu: Each of the run's.
        mean: Lengths in the mean, for times.
    """

    config: Config
    student: Architecture
    teacher: Architecture | None
    gpu: Gpu
    mean: Lengths

    def _models(self) -> tuple[MemoryModel, TimeModel]:
        longest = Lengths.longest(self.config, self.mean.tokens_per_forward)
        beside = None if self.config.has_remote_teacher else self.teacher
        return (
            MemoryModel(self.config, self.student, self.teacher, longest),
            TimeModel(self.student, beside, self.mean, longest, self.gpu),
        )

    def _plan(self, memory: MemoryModel, times: TimeModel, layout: Layout, config: Config) -> Plan:
        needed = memory.of(config, layout, self.gpu)
        seconds = times.of(config, layout, memory.parameters(layout, 0), needed.sequences)
        return Plan(layout, config, needed, seconds, self.gpu.memory - needed.most)

    def all(self, gpus: int, *, larger_batch: bool = False) -> list[Plan]:
        """Plans of all layouts that training accepts: those that fit by time, then by what lacks.

        Args:
            gpus: Of the student.
            larger_batch: Whether a layout with more replicas than the batch has samples may have a
                larger batch.

        Raises:
            UserError: Training accepts no layout.
        """
        found = list[tuple[Layout, Config]]()
        refusal: UserError | None = None
        try:
            found = accepted(self.config, gpus, self.student, self.teacher)
        except UserError as error:
            refusal = error
        if larger_batch:
            found += larger_batches(self.config, gpus, self.student, self.teacher)
        if not found:
            assert refusal is not None
            raise refusal
        memory, times = self._models()
        plans = [self._plan(memory, times, *each) for each in found]
        return sorted(
            plans, key=lambda p: (not p.fits, p.seconds.per_sample if p.fits else -p.room)
        )

    def stated(self, gpus: int) -> Plan:
        """The plan of the layout that the configuration states."""
        return self._plan(*self._models(), Layout.of(self.config, gpus), self.config)


def remedies(plan: Plan) -> list[str]:
    """What would lower the memory of the fullest phase, as options that are not chosen yet."""
    config, found = plan.config, list[str]()
    phase = plan.memory.fullest
    if config.traits.uses_teacher and not config.optimizer.offload_optimizer and phase == "rollout":
        found.append("--offload-optimizer")
    teacher = plan.memory.phases[phase].get("teacher")
    if teacher and not config.distillation.offload_teacher and phase != "teacher":
        found.append("--offload-teacher")
    if not config.parallel.use_distributed_optimizer and plan.layout.dense_copies > 1:
        found.append("--use-distributed-optimizer")
    if config.model.recompute_granularity != "full" and phase == "update":
        found.append("--recompute-granularity full")
    return [*found, "more GPUs"]
