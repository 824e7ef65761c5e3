"""Rollouts: block-diffusion decoding with a KV cache and continuous batching (OPDLM, section 3).

Every forward of the engine is a denoising step of every running sequence. What else has to be
computed rides along: the complete blocks of a new prompt are prefilled in the forward of its first
step, and a finished block's clean keys are written in the forward of the next block's first step. A
sequence therefore needs no forward that draws nothing, and `total_forwards` equals
`denoising_forwards`.

The engine knows token ids only. It does not tokenise, score or select training states.

S: tokens of a forward; n: draws of a forward; h: hidden size; Vp: padded vocabulary; tp:
tensor-parallel size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.models.forward import Row, forward_hidden
from megatron_dlm.models.model import head_weight
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.rollout.kv_cache import CacheView, KVCache
from megatron_dlm.rollout.process_groups import RolloutGroups
from megatron_dlm.rollout.sampling import SampledTokens, sample_tokens
from megatron_dlm.rollout.slots import ForwardPlan, PromptQueue, SlotTable
from megatron_dlm.rollout.trajectory import Prompt, Trajectory

# Prompt tokens admitted into one forward (one prompt always is): bounds its activation memory.
MAX_PREFILL_TOKENS = 8192

# Logits that exist at once while drawing, in elements: their noise takes several 64-bit copies.
MAX_LOGITS = 1 << 24


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
        eos_token_id: Ends a response.
        pad_token_id: Fills forwards of ranks without work.
        mask_token_id: Stands for tokens not committed yet; never drawn.
        vocab_size: Ids from here on are padding of the vocabulary; never drawn.
        seed: Seed of the draws; together with a prompt's `sample_index` it determines them.
        groups: Process groups; default: those of Megatron-Core's parallel state.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        generation: GenerationConfig,
        eos_token_id: int,
        pad_token_id: int,
        mask_token_id: int,
        vocab_size: int,
        seed: int,
        groups: RolloutGroups | None = None,
    ) -> None:
        self.generation = generation
        self.seed = seed
        self._model = unwrap_model(model)
        self._eos_token_id = eos_token_id
        self._pad_token_id = pad_token_id
        self._mask_token_id = mask_token_id
        self._vocab_size = vocab_size
        self._groups = groups or RolloutGroups.from_parallel_state()

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_response_length: int,
        on_finished: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Decode one response for each prompt.

        All model-parallel ranks call this with the same prompts; data-parallel ranks have their
        own, possibly none. A response ends with its first EOS or after `max_response_length`
        tokens, but the block that holds its end is decoded completely (`Trajectory.tail_ids`).

        Args:
            prompts: What to decode.
            max_response_length: Tokens, at least 1.
            on_finished: Called with each trajectory when it is complete, to report progress.

        Returns:
            Trajectories in the order of the prompts; all on the CPU, the same on all model-parallel
            ranks.

        Raises:
            ValueError: `max_response_length` is below 1, or a prompt is empty where tokens are
                predicted from the one before.
        """
        if max_response_length < 1:
            raise ValueError(f"max_response_length = {max_response_length} is below 1")
        if self.generation.mode == "autoregressive":
            for prompt in prompts:
                if len(prompt.token_ids) == 0:
                    raise ValueError(f"sample {prompt.sample_index} has no token to predict from")
        with _evaluation(self._model):
            return self._generate(prompts, max_response_length, on_finished)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        max_response_length: int,
        on_finished: Callable[[Trajectory], None] | None,
    ) -> list[Trajectory]:
        block_size = self.generation.block_size
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        max_length = -(-(longest + max_response_length) // block_size) * block_size
        num_slots = min(self.generation.max_running_requests, len(prompts))
        cache = self._allocate_cache(num_slots, max_length)
        slots = SlotTable(
            num_slots=num_slots,
            max_length=max_length,
            max_response_length=max_response_length,
            config=self.generation,
            eos_token_id=self._eos_token_id,
            mask_token_id=self._mask_token_id,
        )
        queue = PromptQueue(prompts, MAX_PREFILL_TOKENS)
        trajectories: list[Trajectory | None] = [None] * len(prompts)
        finished: list[int] = []
        while True:
            queue.begin_forward()
            # From the last slot down: what moves into a freed slot is never itself finished.
            for slot in reversed(finished):
                trajectory = slots.trajectory(slot)
                trajectories[slots.request(slot)] = trajectory
                if on_finished is not None:
                    on_finished(trajectory)
                request = queue.pop()
                if request is not None:
                    slots.place(slot, request, prompts[request])
                else:
                    moved = slots.remove(slot)
                    if moved is not None:
                        cache.move(moved, slot)
            while slots.num_active < num_slots:
                request = queue.pop()
                if request is None:
                    break
                slots.place(slots.num_active, request, prompts[request])
            works = slots.num_active > 0
            if not self._any_rank_works(works):
                break
            if works:
                finished = self._step(slots, cache)
            else:
                self._idle_forward(cache)
                finished = []
        return [trajectory for trajectory in trajectories if trajectory is not None]

    def _allocate_cache(self, num_slots: int, max_length: int) -> KVCache:
        """A cache for this call: empty, so that nothing in it is older than the weights."""
        config = self._model.config
        tp_size = self._groups.tp.size() if self._groups.tp is not None else 1
        layers = self._model.decoder.layers
        return KVCache(
            num_layers=len(layers),
            first_layer_number=layers[0].layer_number,
            num_slots=num_slots,
            max_length=max_length,
            num_attention_heads_per_partition=config.num_attention_heads // tp_size,
            num_query_groups_per_partition=config.num_query_groups // tp_size,
            head_size=config.kv_channels,
            dtype=config.params_dtype,
            device=platform.device(),
        )

    def _any_rank_works(self, works: bool) -> bool:
        """Whether any rank of the lockstep group has sequences to decode."""
        if self._groups.lockstep is None:
            return works
        flag = torch.tensor([int(works)], device=platform.device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._groups.lockstep)
        return bool(flag.item())

    def _idle_forward(self, cache: KVCache) -> None:
        """Take part in the others' collectives with a token that belongs to no sequence."""
        nothing = torch.empty(0, dtype=torch.int64)
        forward_hidden(
            self._model,
            [
                Row(
                    token_ids=torch.tensor([self._pad_token_id]),
                    position_ids=torch.zeros(1, dtype=torch.int64),
                    attention=CacheView(cache, nothing, nothing, self.generation.block_size),
                )
            ],
        )

    def _step(self, slots: SlotTable, cache: KVCache) -> list[int]:
        """One forward and one draw for all slots in use; returns the finished ones."""
        plan = slots.plan()
        view = CacheView(cache, plan.starts, plan.ends, self.generation.block_size)
        hidden = forward_hidden(self._model, [Row(plan.token_ids, plan.position_ids, view)])
        return slots.update(plan, self._draw(None if hidden is None else hidden[0], plan))

    def _draw(self, hidden: Tensor | None, plan: ForwardPlan) -> SampledTokens:
        """Sample on the last stage from hidden states [S, h]; the result on every stage's CPU."""
        if hidden is not None:
            packed = self._sample(hidden, plan)
        else:
            packed = torch.empty(
                3, len(plan.draw_rows), dtype=torch.float64, device=platform.device()
            )
        if self._groups.pp is not None:
            dist.broadcast(packed, src=self._groups.pp_last_rank, group=self._groups.pp)
        token_ids, confidence, entropy = packed.cpu()
        return SampledTokens(token_ids.long(), confidence.float(), entropy.float())

    def _sample(self, hidden: Tensor, plan: ForwardPlan) -> Tensor:
        """Token ids, confidences and entropies of the draws, [3, n] float64 (exact for ids)."""
        device = hidden.device
        weight = head_weight(self._model)  # [Vp/tp, h]
        hidden = hidden.index_select(0, plan.draw_rows.to(device))  # [n, h]
        counters = torch.stack((plan.sample_index, plan.position, plan.denoising_step)).to(device)
        tp_rank = self._groups.tp.rank() if self._groups.tp is not None else 0
        chunk = max(1, MAX_LOGITS // weight.shape[0])
        packed = []
        for part, (sample_index, position, step) in zip(
            hidden.split(chunk), counters.split(chunk, dim=1), strict=True
        ):
            sampled = sample_tokens(
                F.linear(part, weight),
                vocab_start=tp_rank * weight.shape[0],
                vocab_size=self._vocab_size,
                mask_token_id=self._mask_token_id,
                temperature=self.generation.temperature,
                top_k=self.generation.top_k,
                top_p=self.generation.top_p,
                seed=self.seed,
                sample_index=sample_index,
                position=position,
                denoising_step=step,
                tp_group=self._groups.tp,
            )
            packed.append(
                torch.stack(
                    (
                        sampled.token_ids.double(),
                        sampled.confidence.double(),
                        sampled.entropy.double(),
                    )
                )
            )
        return torch.cat(packed, dim=1)
