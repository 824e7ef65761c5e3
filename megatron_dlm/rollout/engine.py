"""Rollouts: diffusion decoding with continuous batching (OPDLM, section 3; RND1; LLaDA).

Every forward of the engine is a denoising step of every running sequence. Under block-causal
attention there is a KV cache, and prefill and commits need no forwards of their own: the complete
blocks of a new prompt are prefilled in the forward of its first step, and a finished block's clean
keys are written in the forward of the next block's first step. Only a prompt of more than
`chunked_prefill_size` tokens takes further forwards, in which the others denoise. Under full
attention every forward holds the whole canvas of every sequence.

A step is planned on the host and computed on the device without a wait between forward and draw;
then the host reads one small tensor: what was committed, and who is finished. No token depends on
which sequences run together, in what order they start, or how much memory the cache has.

The engine works on token ids. It does not tokenise, score or select training states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.models.forward import Row, forward_hidden
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.context import RolloutContext, rollout_context
from megatron_dlm.rollout.drawing import TokenDrawer
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.prompt_queue import PromptQueue
from megatron_dlm.rollout.sampling import SampledTokens
from megatron_dlm.rollout.slots import ForwardPlan, SlotTable
from megatron_dlm.rollout.work import RolloutWork
from megatron_dlm.stop_agreement import StopAgreement
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


class RolloutEngine:
    """Decodes prompts with the weights that a model holds at the time of the call.

    Args:
        model: This rank's part of a `DiffusionGPTModel`, possibly wrapped for training.
        generation: Decoding settings.
        special_tokens: EOS ends a response, MASK stands for tokens not committed yet (it is never
            drawn, nor are ids from the vocabulary's size on, its padding), padding fills forwards
            of ranks without work.
        seed: Seed of the draws; together with a prompt's `sample_index` it determines them.
        groups: Process groups.
        stop: Checked before every forward for a request to stop; None: never.

    Attributes:
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
    ) -> None:
        self.generation = generation
        self.seed = seed
        self._model = unwrap_model(model)
        self._special_tokens = special_tokens
        self._groups = groups
        self._stop = stop
        self.work = RolloutWork()
        self._drawer = TokenDrawer(
            self._model,
            generation=generation,
            special_tokens=special_tokens,
            groups=groups,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_response_length: int,
        on_finished: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Decode one response for each prompt.

        All model-parallel ranks call this with the same prompts; data-parallel ranks have their
        own, possibly none. A response ends with its first EOS or after `max_response_length`
        tokens, but the block that holds its end is decoded completely (`Trajectory.tail_ids`);
        under full attention, up to the end of the canvas (prompt and `max_response_length` tokens).

        Args:
            prompts: What to decode.
            max_response_length: Tokens, at least 1; a prompt's own limit may be lower.
            on_finished: Called with each trajectory when it is complete, to report progress.

        Returns:
            Trajectories in the order of the prompts; all on the CPU, the same on all model-parallel
            ranks.

        Raises:
            UserError: The longest prompt and response do not fit into the KV cache.
            ValueError: `max_response_length` is below 1, or a prompt is empty although each token
                is predicted from the one before.
            StopRequested: On all ranks in step. Decoded again, the responses are the same.
        """
        if max_response_length < 1:
            raise ValueError(f"max_response_length = {max_response_length} is below 1")
        if self.generation.shifted:
            for prompt in prompts:
                if len(prompt.token_ids) == 0:
                    raise ValueError(f"sample {prompt.sample_index} has no token to predict from")
        with _evaluation(self._model):
            return self._generate(prompts, max_response_length, on_finished)

    def settled(self) -> AbstractContextManager[None]:
        """Around `generate`, called by all data-parallel ranks: if one of them leaves, all do."""
        return nullcontext() if self._stop is None else self._stop.settled()

    def _generate(
        self,
        prompts: Sequence[Prompt],
        max_response_length: int,
        on_finished: Callable[[Trajectory], None] | None,
    ) -> list[Trajectory]:
        num_slots = min(self.generation.max_running_requests, len(prompts))
        slots = SlotTable(
            num_slots=num_slots,
            prompts=prompts,
            max_response_length=max_response_length,
            config=self.generation,
            special_tokens=self._special_tokens,
            seed=self.seed,
        )
        context = rollout_context(
            self._model,
            self.generation,
            groups=self._groups,
            num_slots=num_slots,
            lengths=[slots.length(prompt) for prompt in prompts],
        )
        queue = PromptQueue(prompts, max_response_length)
        trajectories: list[Trajectory | None] = [None] * len(prompts)

        def admit() -> None:
            while queue and slots.num_active < num_slots:
                prompt = prompts[queue.first()]
                if not context.admit(slots.num_active, prompt.token_ids, slots.length(prompt)):
                    break
                slots.place(queue.pop(), prompt)

        nothing = torch.empty(0, 0, dtype=torch.int32, device=platform.device())
        admit()
        _, works = self._read(nothing, works=slots.num_active > 0)
        while works:
            if self._stop is not None:
                self._stop.check()
            if slots.num_active == 0:
                self._idle_forward(context)
                _, works = self._read(nothing, works=False)
                continue
            plan = slots.plan(context)
            report, works = self._read(self._step(slots, context, plan), works=len(queue) > 0)
            # From the last slot down: a sequence that moves into a freed slot is never finished
            # itself.
            for slot in reversed(slots.settle(plan, report)):
                trajectory = slots.trajectory(slot)
                trajectories[slots.request(slot)] = trajectory
                if on_finished is not None:
                    on_finished(trajectory)
                context.release(slot)
                moved = slots.remove(slot)
                if moved is not None:
                    context.move(moved, slot)
            admit()
        return [trajectory for trajectory in trajectories if trajectory is not None]

    def _read(self, report: Tensor, works: bool) -> tuple[np.ndarray, bool]:
        """Wait for a forward: the only copy from the device in a step, and so the only wait.

        Args:
            report: What `SlotTable.commit` returned, [R, columns].
            works: Whether this rank has more to do whatever the report says.

        Returns:
            The report on the host, and whether any rank that shares collectives with this one still
            has something to do.
        """
        if self._groups.lockstep is None:
            host = platform.to_host(report).numpy()
            return host, works or not host[:, -1:].all()
        going = ((report[:, -1:] == 0).any() | works).int()[None]
        dist.all_reduce(going, op=dist.ReduceOp.MAX, group=self._groups.lockstep)
        host = platform.to_host(torch.cat((report.flatten(), going))).numpy()
        return host[:-1].reshape(report.shape), bool(host[-1])

    def _idle_forward(self, context: RolloutContext) -> None:
        """Take part in the others' collectives with a token that belongs to no sequence."""
        nothing = np.empty(0, dtype=np.int64)
        forward_hidden(
            self._model,
            [
                Row(
                    token_ids=torch.tensor([self._special_tokens.pad_token_id]),
                    position_ids=torch.zeros(1, dtype=torch.int64),
                    attention=context.attention(nothing, nothing),
                )
            ],
        )

    def _step(self, slots: SlotTable, context: RolloutContext, plan: ForwardPlan) -> Tensor:
        """One forward and one draw for all slots in use; what `SlotTable.commit` reports."""
        full = self.generation.attention_pattern == "full"
        self.work.add(plan, None if full else self.generation.block_size)
        attention = context.attention(plan.starts, plan.ends)
        row = Row(slots.tokens(plan), plan.position_ids, attention)
        hidden = forward_hidden(self._model, [row])
        if len(plan.draw_rows) == 0:  # pieces of prompts only
            nothing = plan.draw_rows.float()
            return slots.commit(plan, SampledTokens(plan.draw_rows, nothing, nothing))
        drawn = self._drawer.draw(None if hidden is None else hidden[0], plan)
        return slots.commit(plan, drawn)
