"""Process groups and seeds, from one plain process to a torchrun job."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import (  # type: ignore[attr-defined] # documented, not listed
    HashStore,
    PrefixStore,
    ProcessGroup,
    Store,
)
from torch.distributed.rendezvous import rendezvous

from megatron_dlm import object_exchange, platform
from megatron_dlm.config.schema import Config
from megatron_dlm.entry import collect_garbage_as_usual, rank, world_size
from megatron_dlm.errors import UserError
from megatron_dlm.idle import NEIGHBOURS
from megatron_dlm.launcher import attempt
from megatron_dlm.megatron_internals import exchange_apart, observe_neighbours
from megatron_dlm.rank_watch import RankWatch

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelGroups:
    """The process groups that a rank communicates in; None where it would be alone.

    Attributes:
        tp: Ranks that hold the other shards of the vocabulary.
        pp: Stages of this rank's pipeline.
        pp_last_rank: Global rank of the last of them.
        decisions: The same ranks once more, for what the last stage decides: where messages of a
            group go one after the other, it does not wait for hidden states of other rows.
        way_back: The same ranks once more, for hidden states that the last stage hands to the next
            model chunk of the first, and for gradients, likewise; None without virtual stages.
        is_last_stage: Whether this rank is on the last stage.
        model: All ranks that hold parts of the same replica of the model.
        replicas: Ranks that hold the same part in all replicas. In rollouts and evaluations each
            replica has texts of its own.
        replica: Index of this replica.
        num_replicas: Number of replicas.
        dp: Ranks that hold the same part and have other rows in an update.
        dp_rank: Index of this rank's rows.
        dp_size: Number of shares of an update's rows.
        cp: Ranks that share each row of an update, `cp_size` replicas in a row.
        cp_rank: Index of this rank among these.
        cp_size: Number of these.
        shared_model: All ranks of the `cp_size` replicas that decode the same sequences
            (`--rollout-context-parallel tokens`); None where each replica decodes its own.
        together: In rollouts, ranks that hold the same part and decode the same sequences, each
            with a share of their tokens, keys and values; see `for_decoding`.
        lockstep: Ranks that must run as many forwards as this one, because the forwards contain
            collectives of experts. A union of whole tensor-parallel groups, so that a reduction
            over it gives the same result on all ranks with the same prompts.
    """

    tp: ProcessGroup | None = None
    pp: ProcessGroup | None = None
    pp_last_rank: int = 0
    decisions: ProcessGroup | None = None
    way_back: ProcessGroup | None = None
    is_last_stage: bool = True
    model: ProcessGroup | None = None
    replicas: ProcessGroup | None = None
    replica: int = 0
    num_replicas: int = 1
    dp: ProcessGroup | None = None
    dp_rank: int = 0
    dp_size: int = 1
    cp: ProcessGroup | None = None
    cp_rank: int = 0
    cp_size: int = 1
    shared_model: ProcessGroup | None = None
    together: ProcessGroup | None = None
    lockstep: ProcessGroup | None = None

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this rank speaks for its replica of the model."""
        return self.model is None or self.model.rank() == 0

    def part_of_shared(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all ranks of its context-parallel group have."""
        return list(items[self.cp_rank :: self.cp_size])

    def for_decoding(self) -> "ParallelGroups":
        """The groups of a rollout: replicas are what decodes sequences of its own.

        Where context-parallel ranks decode the same sequences, these are one replica of all their
        ranks, and data-parallel ranks the replicas; else nothing changes.
        """
        if self.shared_model is None:
            return self
        return replace(
            self,
            model=self.shared_model,
            replicas=self.dp,
            replica=self.dp_rank,
            num_replicas=self.dp_size,
            together=self.cp,
        )

    @classmethod
    def from_parallel_state(cls) -> "ParallelGroups":
        """The groups that Megatron-Core was initialised with."""
        # Ranks of a stage with the same prompts.
        alike = parallel_state.get_tensor_model_parallel_world_size()
        if _shared_model is not None:
            alike *= parallel_state.get_context_parallel_world_size()
        lockstep = None
        if parallel_state.get_expert_model_parallel_world_size() > 1:
            lockstep = parallel_state.get_expert_tensor_and_model_parallel_group()
            tp_size = parallel_state.get_tensor_model_parallel_world_size()
            if lockstep.size() % tp_size or (lockstep.size() % alike and alike % lockstep.size()):
                # Expert groups that cross those of ranks with the same prompts connect neighbours,
                # and so all ranks of the stage.
                lockstep = parallel_state.get_tensor_and_data_parallel_group(
                    with_context_parallel=True
                )
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return cls(
            tp=_unless_alone(parallel_state.get_tensor_model_parallel_group()),
            pp=_unless_alone(parallel_state.get_pipeline_model_parallel_group()),
            pp_last_rank=parallel_state.get_pipeline_model_parallel_last_rank(),
            decisions=_decisions,
            way_back=_way_back,
            is_last_stage=parallel_state.is_pipeline_last_stage(),
            model=_unless_alone(parallel_state.get_model_parallel_group()),
            replicas=_unless_alone(replicas),
            replica=replicas.rank(),
            num_replicas=replicas.size(),
            dp=_unless_alone(parallel_state.get_data_parallel_group()),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            cp=_unless_alone(parallel_state.get_context_parallel_group()),
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=parallel_state.get_context_parallel_world_size(),
            shared_model=_shared_model,
            lockstep=lockstep,
        )


_decisions: ProcessGroup | None = None
_way_back: ProcessGroup | None = None
_shared_model: ProcessGroup | None = None
"""See `ParallelGroups`; made and forgotten with Megatron-Core's groups."""


def _make_pipeline_groups(chunks: int, timeout: timedelta) -> None:
    """Make further groups of each pipeline; all ranks call this.

    Args:
        chunks: Model chunks of a stage.
        timeout: Of their messages.
    """
    global _decisions, _way_back
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    _decisions = _way_back = None
    if stages == 1:
        return
    observe_neighbours(NEIGHBOURS.waiting)
    own = torch.distributed.get_process_group_ranks(
        parallel_state.get_pipeline_model_parallel_group()
    )
    everyone = torch.distributed.get_world_size()
    apart = everyone // stages  # stages are the outermost dimension of a layout
    pipelines = [list(range(first, everyone, apart)) for first in range(apart)]
    assert own in pipelines
    _decisions, _ = torch.distributed.new_subgroups_by_enumeration(pipelines, timeout=timeout)
    if chunks > 1:
        _way_back, _ = torch.distributed.new_subgroups_by_enumeration(pipelines, timeout=timeout)
    exchange_apart(_way_back)


def _make_shared_model(config: Config) -> None:
    """Make the groups that decode the same sequences, if there are any; all ranks call this."""
    global _shared_model
    _shared_model = None
    parallel = config.parallel
    if not config.shares_tokens_in_rollouts:
        return
    stages, everyone = parallel.pipeline_model_parallel_size, torch.distributed.get_world_size()
    of_stage = everyone // stages  # stages are the outermost dimension of a layout, data the next
    unit = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    shared = [
        [stage * of_stage + first + rank for stage in range(stages) for rank in range(unit)]
        for first in range(0, of_stage, unit)
    ]
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    _shared_model, _ = torch.distributed.new_subgroups_by_enumeration(shared, timeout=timeout)
    own = torch.distributed.get_process_group_ranks(_shared_model)
    for group in (
        parallel_state.get_context_parallel_group(),
        parallel_state.get_model_parallel_group(),
    ):
        assert set(torch.distributed.get_process_group_ranks(group)) <= set(own)


def _unless_alone(group: ProcessGroup) -> ProcessGroup | None:
    return group if group.size() > 1 else None


def initialize(config: Config) -> None:
    """Select the device, split the process group of all ranks by the layout, and set seeds."""
    platform.select(config.parallel.device)
    parallel = config.parallel
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        # Nothing here gathers over the host, and a second group for each takes long on many ranks.
        create_gloo_process_groups=False,
    )
    _make_pipeline_groups(chunks, timedelta(minutes=parallel.distributed_timeout_minutes))
    _make_shared_model(config)
    _set_seeds(config)


@dataclass(frozen=True)
class Side:
    """The processes of a job that form one process group: student's, or teacher's.

    Attributes:
        holds_teacher: Whether they are those of `--teacher-ranks`.
        rank: Of this process among them.
        size: Number of them.
    """

    holds_teacher: bool
    rank: int
    size: int

    @classmethod
    def of(cls, config: Config) -> "Side":
        """That of this process: the last ones of the job hold the teacher."""
        teachers = config.teacher.teacher_ranks
        students = world_size() - teachers
        if rank() >= students:
            return cls(True, rank() - students, teachers)
        return cls(False, rank(), students)


@contextmanager
def joined(config: Config) -> Iterator[Store]:
    """Join the process group on entry, before there is a layout, and leave it on exit.

    With `--teacher-ranks` a job has two groups, which share the store that is yielded.
    Works under torchrun or Slurm (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`,
    `LOCAL_RANK`), where the ranks watch each other (`RankWatch`), and in a plain process, which
    becomes a group of one.
    """
    device = platform.select(config.parallel.device)
    store: Store = HashStore()  # one process has nobody to find: it needs no address and no port
    watch: RankWatch | nullcontext[None] = nullcontext()
    if world_size() > 1:
        store, next_store = _stores(config)
        if config.parallel.watch_ranks:
            watch = _rank_watch(config, store, next_store)
    side = Side.of(config)
    own = store
    if config.teacher.teacher_ranks:
        own = PrefixStore("teacher" if side.holds_teacher else "student", store)
    with watch:
        torch.distributed.init_process_group(
            backend=platform.collective_backend(),
            store=own,
            rank=side.rank,
            world_size=side.size,
            timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
        try:
            yield store
        except BaseException as error:
            if isinstance(watch, RankWatch):
                watch.leave(error)  # first: to leave the group may take the others
            raise
        finally:
            torch.distributed.destroy_process_group()


def _stores(config: Config) -> tuple[Store, Store]:
    """Where the processes of this attempt find each other, and those of the next one.

    An agent of torchrun may keep one store through all restarts: without a name of its own, an
    attempt would find the addresses of the dead ranks of the one before. Where rank 0 keeps it,
    each attempt has a new one, and agents of several nodes may count their restarts differently.
    """
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    store, _, _ = next(rendezvous("env://", rank(), world_size(), timeout=timeout))
    store.set_timeout(timeout)
    number = attempt() if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
    return PrefixStore(f"attempt_{number}", store), PrefixStore(f"attempt_{number + 1}", store)


def _rank_watch(config: Config, store: Store, next_store: Store) -> RankWatch:
    parallel = config.parallel
    return RankWatch(
        store,
        next_store,
        rank=rank(),
        world_size=world_size(),
        address=os.environ["MASTER_ADDR"],
        stall_seconds=60.0 * parallel.stall_minutes,
        limit_seconds=60.0 * parallel.distributed_timeout_minutes,
    )


def _set_seeds(config: Config) -> None:
    torch.manual_seed(config.data.seed)
    model_parallel_cuda_manual_seed(config.data.seed)


def on_all_ranks(holds: bool) -> bool:
    """Whether something holds on all ranks; all call this."""
    flag = torch.tensor([int(holds)], device=platform.device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(platform.to_host(flag).item())


def on_rank_zero(own: list[T]) -> list[T]:
    """The lists of all ranks, joined, on rank 0, and nothing on the others; all call this."""
    world = torch.distributed.group.WORLD
    assert world is not None
    return [entry for part in object_exchange.gather(own, world) for entry in part]


def of_all_replicas(own: list[T], groups: ParallelGroups) -> list[T]:
    """The lists of all replicas of the model, joined, on all of them; all ranks call this."""
    if groups.replicas is None:
        return own
    return [entry for part in object_exchange.all_gather(own, groups.replicas) for entry in part]


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raise a `UserError` of any rank on all of them, so that no rank waits for one that ended.

    Collective; the body must not be.

    Raises:
        UserError: The error of the lowest rank with one.
    """
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    messages: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, None if own is None else str(own))
    for message in messages:
        if message is not None:
            raise UserError(message) from own


def highest_of_ranks(value: int) -> int:
    """The largest number that one of all ranks has; all call this."""
    values = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return max(values)


def from_rank_zero(decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on all ranks: what they find may differ, in a shared folder.

    Collective where there are several processes that have joined; `decide` must not be.

    Raises:
        UserError: That of rank 0, on all ranks.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return decide()
    decided: list[Any] = [None]
    with errors_on_all_ranks():
        if torch.distributed.get_rank() == 0:
            decided = [decide()]
    torch.distributed.broadcast_object_list(decided, src=0)
    return cast(T, decided[0])


@contextmanager
def initialized(config: Config) -> Iterator[None]:
    """`joined` and `initialize`; the layout ends on exit, so that another one can follow.

    A nested block uses the existing groups.
    """
    if world_size() == 1 and parallel_state.model_parallel_is_initialized():
        platform.select(config.parallel.device)
        _set_seeds(config)
        yield
        return
    with nullcontext() if torch.distributed.is_initialized() else joined(config):
        initialize(config)
        collect_garbage_as_usual()  # all that is large has been imported
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
