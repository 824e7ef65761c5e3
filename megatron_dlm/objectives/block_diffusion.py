"""Training documents of block diffusion: a clean stream x_0 and noisy streams x_t.

Noisy block b sees clean blocks < b and itself (`models.attention_layout`), so one forward computes
every block's denoising loss given its clean prefix (BD3-LM, Arriola et al. 2025).

With a causal context the clean stream is causal, and its logits are those of an autoregressive
model: in the same forward the loss has a second part, at the clean tokens that predict a response
token (`--causal-loss-weight`).

Decoding always shows the model whole blocks, so training does too. A rolled-out trajectory has a
tail: what the student decoded in the last block after the end of the response. Other responses get
a tail from `fill_last_block`; without it, a shorter last block would tell the model where the
response ends. Only response tokens are supervised.

P, L: prompt and response tokens; F: all tokens of the trajectory, tail included; B: block size.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dlm.models.attention_layout import CLEAN, block_diffusion_block_ids
from megatron_dlm.objectives.base import Objective
from megatron_dlm.objectives.state_selection import random_state
from megatron_dlm.types.diffusion_kind import ContextAttention, DiffusionKind
from megatron_dlm.types.document import Document
from megatron_dlm.types.teacher_targets import TeacherTargets
from megatron_dlm.types.trajectory import Trajectory


def fill_last_block(trajectory: Trajectory, block_size: int, mask_token_id: int) -> Trajectory:
    """Add to a response that was not rolled out the tail that decoding would have shown.

    The tail of a response that ended repeats its EOS up to the end of the block; it is masked and
    shown like the response. The continuation of a response that was cut is not known, so its tail
    is MASK in every state.

    Args:
        trajectory: Returned unchanged if it is from a rollout: it has a tail.
        block_size: B.
        mask_token_id: Id of MASK.
    """
    if trajectory.is_rollout:
        return trajectory
    missing = -len(trajectory.token_ids) % block_size
    ended = trajectory.finish_reason == "eos"
    tail = trajectory.response_ids.new_full(
        (missing,), int(trajectory.response_ids[-1]) if ended else mask_token_id
    )
    return replace(trajectory, tail_ids=tail, tail_unmask_step=torch.zeros_like(tail))


def sequence_with_tail(trajectory: Trajectory) -> Tensor:
    """Prompt, response and the tail that fills the last block; [F] int64."""
    return torch.cat((trajectory.prompt_ids, trajectory.response_ids, trajectory.tail_ids))


def supervised_positions(trajectory: Trajectory, supervise_eos: bool) -> Tensor:
    """Tokens that may be supervised, [F] bool: the response up to and including the first EOS."""
    prompt, response = len(trajectory.prompt_ids), len(trajectory.response_ids)
    end = prompt + response
    if trajectory.finish_reason == "eos" and not supervise_eos:
        end -= 1
    positions = torch.arange(prompt + response + len(trajectory.tail_ids))
    return (positions >= prompt) & (positions < end)


def block_diffusion_document(
    trajectory: Trajectory,
    states: Sequence[Tensor],
    supervised: Tensor,
    *,
    block_size: int,
    mask_token_id: int,
    weights: Tensor | None = None,
    context_attention: ContextAttention = DiffusionKind.context_attention,
) -> Document:
    """Lay out states of a trajectory: one clean stream, and a noisy stream for each state.

    A noisy stream holds only blocks with a supervised MASK, and the clean stream only the blocks
    that these see. The loss is the same as with all blocks.

    Args:
        trajectory: The terminal sequence.
        states: For each state, [F] bool, where x_t holds MASK.
        supervised: [F] bool, tokens that may be supervised, or [states, F] bool for each state.
        block_size: B.
        mask_token_id: Id of MASK.
        weights: [F] loss weights, default 1. A weighted loss is divided by the number of supervised
            tokens, masked or not; an unweighted one by the number of supervised MASKs.
        context_attention: What clean tokens see of each other.
    """
    tokens = sequence_with_tail(trajectory)
    position = torch.arange(len(tokens))
    block = position // block_size
    num_blocks = int(block[-1]) + 1
    masked = torch.stack(list(states))
    target = masked & supervised
    trained = torch.zeros(len(states), num_blocks, dtype=torch.bool)
    state_of_target, where = target.nonzero(as_tuple=True)
    trained[state_of_target, block[where]] = True
    state, noisy = trained[:, block].nonzero(as_tuple=True)  # state by state, in order of position
    clean_length = int(block[noisy].max()) * block_size if len(noisy) else 0
    noisy_masked = masked[state, noisy]
    noisy_target = target[state, noisy].nonzero()[:, 0]
    target_position = noisy[noisy_target]
    targets = trajectory.targets
    rows = target_position - len(trajectory.prompt_ids)
    positions = torch.cat((position[:clean_length], noisy))
    stream = torch.cat((torch.full((clean_length,), CLEAN), state + CLEAN + 1))
    return Document(
        token_ids=torch.cat(
            (tokens[:clean_length], tokens[noisy].masked_fill(noisy_masked, mask_token_id))
        ),
        block=block_diffusion_block_ids(positions, stream, block_size, context_attention),
        stream=stream,
        position=positions,
        supervised=clean_length + noisy_target,
        labels=tokens[target_position],
        weights=torch.ones(len(target_position)) if weights is None else weights[target_position],
        targets=None if targets is None else targets[rows],
        loss_count=None if weights is None else int(supervised.sum()),
    )


def with_causal_predictions(
    document: Document, trajectory: Trajectory, supervised: Tensor, weight: float
) -> Document:
    """Add the predictions of a causal clean stream: position i - 1 predicts token i.

    Their losses have one weight, such that their mean over the trajectory, times `weight`, counts
    as much as the mean of the other losses. The count that the loss is divided by stays that of the
    other losses.

    Args:
        document: Of one trajectory, with a causal context and a loss.
        trajectory: The terminal sequence.
        supervised: [F] bool, tokens that may be supervised.
        weight: Above 0.
    """
    predicted = supervised.nonzero()[:, 0]
    predicted = predicted[predicted > 0]
    count = len(document.labels) if document.loss_count is None else document.loss_count
    had = int((document.stream == CLEAN).sum())
    # The last prediction may be of a token of the last block, whose clean tokens no MASK sees.
    more = torch.arange(had, max(int(predicted[-1]) if len(predicted) else 0, had))
    tokens = sequence_with_tail(trajectory)

    def extended(values: Tensor, added: Tensor) -> Tensor:
        return torch.cat((values[:had], added.to(values.dtype), values[had:]))

    targets = trajectory.targets
    if document.targets is not None and targets is not None:
        added = targets[predicted - len(trajectory.prompt_ids)]
        targets = TeacherTargets.cat([document.targets, added])
    weights = torch.full((len(predicted),), weight * count / max(len(predicted), 1))
    return replace(
        document,
        token_ids=extended(document.token_ids, tokens[more]),
        block=extended(document.block, more),
        stream=extended(document.stream, torch.full_like(more, CLEAN)),
        position=extended(document.position, more),
        supervised=torch.cat((document.supervised + len(more), predicted - 1)),
        labels=torch.cat((document.labels, tokens[predicted])),
        weights=torch.cat((document.weights, weights)),
        targets=targets,
        loss_count=count,
    )


class BlockDiffusionObjective(Objective):
    """Base of block-diffusion objectives; subclasses define the states and the loss."""

    def document(self, trajectory: Trajectory, generator: torch.Generator) -> Document:
        """Lay out the states that `states` chooses; see `Objective.document`."""
        trajectory = fill_last_block(trajectory, self.config.model.block_size, self.mask_token_id)
        supervised = supervised_positions(trajectory, self.config.objective.supervise_eos)
        states, weights = [torch.zeros_like(supervised)], None
        if supervised.any():  # else a response of nothing but an unsupervised EOS
            states, weights = self.states(trajectory, supervised, generator)
        document = block_diffusion_document(
            trajectory,
            states,
            supervised,
            block_size=self.config.model.block_size,
            mask_token_id=self.mask_token_id,
            weights=weights,
            context_attention=self.diffusion_kind.context_attention,
        )
        weight = self.config.objective.causal_loss_weight
        if not self.diffusion_kind.has_causal_context or weight == 0 or not len(document.labels):
            return document
        return with_causal_predictions(document, trajectory, supervised, weight)

    @abstractmethod
    def states(
        self, trajectory: Trajectory, supervised: Tensor, generator: torch.Generator
    ) -> tuple[list[Tensor], Tensor | None]:
        """States to train on, each [F] bool, and loss weights [F] (None: 1).

        Args:
            trajectory: With at least one supervised token.
            supervised: [F] bool, tokens that may be supervised.
            generator: Source of every draw.
        """

    def random_state(
        self, trajectory: Trajectory, supervised: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A random state [F] and its t [F]; see `state_selection.random_state`.

        The tail is masked like the response: decoding shows the last block whole.
        """
        position = torch.arange(len(supervised))
        maskable = position >= len(trajectory.prompt_ids)
        block = position // self.config.model.block_size
        empty_mask = self.config.objective.empty_mask
        return random_state(maskable, supervised, block, generator, empty_mask)
