"""Rollouts: diffusion decoding with continuous batching (OPDLM, section 3; RND1; LLaDA).

Every forward of the engine is a denoising step of every running sequence, or of every sequence of
a group where the stages of a pipeline work on several groups at once (see `DecodingBatch`). Under
block-causal attention there is a KV cache, and prefill and commits need no forwards of their
own: the complete blocks of a new prompt are prefilled in the forward of its first step, and a
finished block's clean keys are written in the forward of the next block's first step. Only a prompt
of more than `chunked_prefill_size` tokens takes further forwards, in which the others denoise.
Under full attention every forward holds the whole canvas of every sequence.

A step is planned on the host and computed on the device without a wait between forward and draw;
then the host reads one small tensor: what was committed, and who is finished. No token depends on
which sequences run together, in what order they start, or how much memory the cache has.

The engine works on token ids. It does not tokenise, score or select training states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from megatron.core.utils import unwrap_model

from megatron_dlm import platform
from megatron_dlm.activity import ACTIVITY
from megatron_dlm.errors import bad_value
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.batch import DecodingBatch
from megatron_dlm.rollout.block_grid import sequence_length
from megatron_dlm.rollout.captured_forwards import CapturedForwards, CudaGraphs
from megatron_dlm.rollout.context import rollout_contexts
from megatron_dlm.rollout.cutoff import Cutoff
from megatron_dlm.rollout.drawing import TokenDrawer
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.prompt_queue import PromptQueue, SharedPromptQueue
from megatron_dlm.rollout.recorded_forwards import FORWARDS_BEFORE, ForwardRecorder, obstacle
from megatron_dlm.rollout.replica_board import ReplicaBoard
from megatron_dlm.rollout.slot_group import SlotGroup
from megatron_dlm.rollout.slots import SlotTable
from megatron_dlm.rollout.traced_forwards import TracedForwards
from megatron_dlm.rollout.work import RolloutWork
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.stop_request import StopRequested
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Prompt, Trajectory


@contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of every module is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _drained(batch: DecodingBatch) -> Iterator[None]:
    """Leave with no message under way, at the end or where all ranks in step stop."""
    try:
        yield
    except StopRequested:
        batch.drain()
        raise
    batch.drain()


class RolloutEngine:
    """Decodes prompts with the weights that a model holds at the time of the call.

    Args:
        model: This rank's part of a `StageModel`, possibly wrapped for training.
        generation: Decoding settings.
        special_tokens: EOS ends a response, MASK stands for tokens not committed yet (it is never
            drawn, nor are ids from the vocabulary's size on, its padding), padding fills forwards
            of ranks without work.
        seed: Seed of the draws; together with a prompt's `sample_index` it determines them.
        groups: Process groups of the model; in decoding those of `ParallelGroups.for_decoding`.
        stop: Checked before every forward for a request to stop; None: never.
        keeps_confidence: Whether trajectories have `confidence`.

    Attributes:
        groups: As passed.
        work: Sizes of the forwards so far.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        generation: GenerationConfig,
        special_tokens: SpecialTokens,
        seed: int,
        groups: ParallelGroups,
        stop: StopAgreement | None = None,
        keeps_confidence: bool = False,
    ) -> None:
        self.generation = generation
        self.seed = seed
        self._model = unwrap_model(model)
        self._special_tokens = special_tokens
        self.groups = groups
        self._groups = groups.for_decoding()
        self._stop = stop
        self._keeps_confidence = keeps_confidence
        self.work = RolloutWork()
        self._traced: TracedForwards | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_response_length: int,
        on_finished: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Decode one response for each prompt.

        All ranks of a replica (`ParallelGroups.for_decoding`) call this with the same prompts;
        replicas have their own, possibly none. A response ends with its first EOS or after
        `max_response_length` tokens, but the block that holds its end is decoded completely
        (`Trajectory.tail_ids`); under full attention, up to the end of the canvas (prompt and
        `max_response_length` tokens).

        Args:
            prompts: What to decode.
            max_response_length: Tokens, at least 1; a prompt's own limit may be lower.
            on_finished: Called with each trajectory when it is complete, to report progress.

        Returns:
            Trajectories in the order of the prompts; all on the CPU, the same on all ranks of the
            replica.

        Raises:
            UserError: The longest prompt and response do not fit into the KV cache.
            ValueError: `max_response_length` is below 1, or a prompt is empty although each token
                is predicted from the one before.
            StopRequested: On all ranks in step. Decoded again, the responses are the same.
        """
        queue = PromptQueue(prompts, max_response_length)
        num_slots = min(self.generation.max_running_requests, len(prompts))
        return self._generate(prompts, max_response_length, queue, num_slots, on_finished)

    def generate_together(
        self,
        prompts: Sequence[Prompt],
        max_response_length: int,
        *,
        one_queue: bool,
        cutoff: Cutoff | None = None,
        on_finished: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Decode one response for each prompt, each on one of the replicas.

        All ranks call this, with the same prompts. Apart from that like `generate`. What
        context-parallel ranks have decoded together is shared out among them afterwards.

        Args:
            prompts: What to decode.
            max_response_length: Tokens.
            one_queue: Whether a replica takes the next prompt when it has room for it;
                else each has an equal share.
            cutoff: Says when sequences are left unfinished; None: never.
            on_finished: Called with each trajectory that is complete, on the rank that has it.

        Returns:
            Trajectories of the prompts that this rank has, in their order.
        """
        groups = self._groups
        if one_queue and groups.replicas is not None:
            board = ReplicaBoard(groups)
            queue: PromptQueue = SharedPromptQueue(prompts, max_response_length, board)
            # None takes more than its share before the others have begun.
            share = -(-len(prompts) // groups.num_replicas)
        else:
            prompts = prompts[groups.replica :: groups.num_replicas]
            queue = PromptQueue(prompts, max_response_length)
            share = len(prompts)
        num_slots = min(self.generation.max_running_requests, share)
        parts = 1 if groups.together is None else groups.cp_size
        return self._generate(
            prompts, max_response_length, queue, num_slots, on_finished, cutoff, parts=parts
        )

    def settled(self) -> AbstractContextManager[None]:
        """Around `generate`, called by all data-parallel ranks: if one of them leaves, all do."""
        return nullcontext() if self._stop is None else self._stop.settled()

    def _generate(
        self,
        prompts: Sequence[Prompt],
        max_response_length: int,
        queue: PromptQueue,
        num_slots: int,
        on_finished: Callable[[Trajectory], None] | None = None,
        cutoff: Cutoff | None = None,
        parts: int = 1,
    ) -> list[Trajectory]:
        """Trajectories of the prompts that the queue returns, in their order; of several parts own.

        What is wanted of a rank where several have decoded the same is every n-th of `parts`, by
        the number of the prompt.
        """
        if max_response_length < 1:
            raise ValueError(f"max_response_length = {max_response_length} is below 1")
        if self.generation.shifted or self.generation.verifies:
            for prompt in prompts:
                if len(prompt.token_ids) == 0:
                    raise ValueError(f"sample {prompt.sample_index} has no token to predict from")
        with self.evaluating():
            return self._decode(
                prompts, max_response_length, queue, num_slots, on_finished, cutoff, parts
            )

    def _decode(
        self,
        prompts: Sequence[Prompt],
        max_response_length: int,
        queue: PromptQueue,
        num_slots: int,
        on_finished: Callable[[Trajectory], None] | None,
        cutoff: Cutoff | None,
        parts: int,
    ) -> list[Trajectory]:
        own = range(self._groups.cp_rank % parts, len(prompts), parts)
        lengths = [sequence_length(p, self.generation, max_response_length) for p in prompts]
        num_groups = self.num_groups
        batch = self.open(num_slots, lengths, max_response_length, num_groups)
        staying = {
            request
            for request, prompt in enumerate(prompts)
            if cutoff is not None and cutoff.spares(prompt)
        }
        trajectories: list[Trajectory | None] = [None] * len(prompts)

        def admit() -> None:
            while batch.has_slot and (request := queue.first()) is not None:
                if not batch.admit(request, prompts[request]):
                    return
                queue.pop()

        admit()
        works = batch.any_works(more=queue.may_have_more)
        with (
            ACTIVITY.working("responses", self._share(prompts, queue)) as work,
            _drained(batch),
        ):
            while works:
                if self._stop is not None:
                    self._stop.check(in_flight=num_groups)
                finished, works = batch.step(more=queue.may_have_more)
                for request, trajectory in finished:
                    trajectories[request] = trajectory
                    work.done += 1
                    if cutoff is not None:
                        cutoff.finished(prompts[request], trajectory)
                    if on_finished is not None and request in own:
                        on_finished(trajectory)
                limit = None if cutoff is None else cutoff.limit()
                if limit is not None:
                    for request, trajectory in batch.leave(limit, staying):
                        trajectories[request] = trajectory
                        work.done += 1
                admit()
        return [found for request in own if (found := trajectories[request]) is not None]

    def _share(self, prompts: Sequence[Prompt], queue: PromptQueue) -> int:
        """Prompts that this rank is likely to decode."""
        ranks = self._groups.num_replicas if isinstance(queue, SharedPromptQueue) else 1
        return -(-len(prompts) // ranks)

    @property
    def num_groups(self) -> int:
        """Groups that the sequences in decoding are split into, the same on all ranks."""
        stages = 1 if self._groups.pp is None else self._groups.pp.size()
        wanted = self.generation.decoding_groups or stages
        return min(wanted, self.generation.max_running_requests)

    def open(
        self,
        num_slots: int,
        lengths: Sequence[int],
        max_response_length: int,
        num_groups: int = 1,
    ) -> DecodingBatch:
        """An empty batch, for callers that admit prompts as they come; see `evaluating`.

        Args:
            num_slots: Sequences decoded at once.
            lengths: Positions that each sequence to come may have, see `sequence_length`; as many
                as there may be at once are enough.
            max_response_length: Tokens, at least 1; a prompt's own limit may be lower.
            num_groups: Groups that these sequences are split into, as evenly as possible.

        Raises:
            UserError: The longest sequence does not fit into the KV cache.
        """
        sizes = [(num_slots + others) // num_groups for others in reversed(range(num_groups))]
        contexts = rollout_contexts(
            self._model,
            self.generation,
            groups=self._groups,
            num_slots=sizes,
            lengths=lengths,
        )
        # Its memory ends with the batch.
        drawer = TokenDrawer(self._model, special_tokens=self._special_tokens, groups=self._groups)
        slot_groups = [
            SlotGroup(
                self._model,
                drawer=drawer,
                slots=SlotTable(
                    num_slots=size,
                    max_length=max(lengths, default=0),
                    max_response_length=max_response_length,
                    config=self.generation,
                    special_tokens=self._special_tokens,
                    seed=self.seed,
                    keeps_confidence=self._keeps_confidence,
                ),
                context=context,
                special_tokens=self._special_tokens,
                groups=self._groups,
                block_size=self.generation.block_size,
            )
            for size, context in zip(sizes, contexts, strict=True)
        ]
        return DecodingBatch(
            self._model,
            generation=self.generation,
            slot_groups=slot_groups,
            special_tokens=self._special_tokens,
            groups=self._groups,
            work=self.work,
            recorder=self._recorder(),
        )

    def _recorder(self) -> ForwardRecorder | None:
        """What runs the forwards of a batch; None: nothing is recorded.

        Raises:
            UserError: Forwards of this model are not recorded, and the settings ask for it.
        """
        choice = self.generation.rollout_graphs
        reason = obstacle(self._model, self.generation, self._groups)
        if choice == "on" and reason is not None:
            raise bad_value("--rollout-graphs", choice, reason, "choose auto or off")
        if choice == "off" or reason is not None:
            return None
        if platform.device().type == "cuda":
            if choice == "auto":
                return None
            # Graphs hold the cache, which ends with the batch.
            return CapturedForwards(CudaGraphs(), self.generation.block_size or 1, after=0)
        if self._traced is None:
            after = 0 if choice == "on" else FORWARDS_BEFORE
            self._traced = TracedForwards(self._model, after)
        return self._traced

    def evaluating(self) -> AbstractContextManager[None]:
        """Around the steps of a batch that was opened: evaluation mode, without gradients."""
        return _evaluation(self._model)
