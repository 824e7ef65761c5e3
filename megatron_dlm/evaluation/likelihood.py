"""Log-likelihoods of given continuations: exact from left to right, a lower bound by diffusion.

A diffusion model gives the distribution of each masked token of a state. Decoded one token at a
time in an order drawn uniformly, within each block, it writes x with a probability p(x) that is a
mean over orders. Jensen's inequality bounds its logarithm by the mean of the logarithms (the bound
of masked diffusion, algorithms.md section 2), and the orders that share a state can be summed:

    log p(x) >= sum over blocks, sum over sets S of n tokens of the block that are not empty, of
                1 / (|S| C(n, |S|)) * sum over i in S of log q(x_i | S is MASK)

where n counts the tokens of the continuation in the block. All sets of a block of few tokens are
computed, so the bound is exact; of larger ones, the sets of some random orders stand for all.
Nothing is read from logits of tokens that are shown: those are no distributions of a next token.

P, L: tokens of the context and of its continuation; F: both and the tail that fills the last block,
which is MASK in every state.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.data.packing import batch_to, pack
from megatron_dlm.distillation.vocab_parallel_cross_entropy import vocab_parallel_cross_entropy
from megatron_dlm.models.attention_layout import CLEAN
from megatron_dlm.models.forward import forward_hidden, most_rows, row_multiple
from megatron_dlm.models.model import StageModel, head_weight
from megatron_dlm.models.row_packing import texts_of_rows
from megatron_dlm.objectives.block_diffusion import (
    block_diffusion_document,
    fill_last_block,
    sequence_with_tail,
)
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.seeding import keyed_generator
from megatron_dlm.training.train_step import reduce_sums
from megatron_dlm.types.document import Document
from megatron_dlm.types.special_tokens import SpecialTokens
from megatron_dlm.types.trajectory import Trajectory

ALL_SETS = 16
"""A block with fewer sets than this has all of them computed: blocks of up to four tokens."""

TOKENS_OF_ROW = 8192
"""Budget of a forward; a longer text gets a row of its own."""


@dataclass(frozen=True)
class Likelihoods:
    """Computes log-likelihoods; process groups must exist.

    Attributes:
        model: This rank's part of the model, in evaluation mode.
        generation: How the model decodes: its attention, block size and shift.
        special_tokens: With MASK.
        groups: Process groups of the model.
        orders: Random orders that stand for all, in blocks of many tokens.
        seed: Of these orders.
    """

    model: StageModel
    generation: GenerationConfig
    special_tokens: SpecialTokens
    groups: ParallelGroups
    orders: int = 8
    seed: int = 0

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
        """Log-likelihoods of continuations given their contexts; all ranks call this.

        Args:
            pairs: Context [P] and continuation [L], int64, L at least 1; the same on all ranks,
                which share them.

        Returns:
            In nats, the same on all ranks: exact if the model decodes from left to right or all its
            blocks have few tokens (of the bound), else an estimate without bias.

        Raises:
            ValueError: A first token has nothing that it could be predicted from.
        """
        owners = range(len(pairs))[self.groups.replica :: self.groups.num_replicas]
        work = [
            (owner, document, weights)
            for owner in owners
            for document, weights in self._documents(owner, *pairs[owner])
        ]
        rows = texts_of_rows([len(document.token_ids) for _, document, _ in work], TOKENS_OF_ROW)
        found = torch.zeros(len(pairs), dtype=torch.float64, device=platform.device())
        for i in range(most_rows(len(rows))):
            part = work[rows[i]] if i < len(rows) else []
            self._add_row(found, part)
        return [float(value) for value in reduce_sums(found, self.groups)]

    def _add_row(self, found: Tensor, part: Sequence[tuple[int, Document, Tensor]]) -> None:
        """Run a row of documents, and add their weighted log-probabilities to those of the pairs.

        A row without documents only takes part in the other ranks' collectives.
        """
        multiple = row_multiple(self.model)
        documents = [document for _, document, _ in part] or [self._nothing()]
        batch = batch_to(pack(documents, pad_multiple=multiple), platform.device())
        hidden = forward_hidden(self.model, [batch.row])
        if hidden is None or not part:
            return
        counts = torch.tensor([len(weights) for _, _, weights in part])
        owners = torch.tensor([owner for owner, _, _ in part]).repeat_interleave(counts)
        weights = torch.cat([weights for _, _, weights in part])
        _, per_token = vocab_parallel_cross_entropy(
            hidden[0][batch.supervised],
            head_weight(self.model),
            batch.labels,
            batch.weights,
            self.special_tokens.vocab_size,
            self.groups.tp,
        )
        logs = -per_token.double() * weights.to(per_token.device)
        found.index_add_(0, owners.to(found.device), logs)

    def _nothing(self) -> Document:
        return _texts(torch.tensor([[self.special_tokens.pad_token_id]]), [], [])

    def _documents(
        self, index: int, context: Tensor, continuation: Tensor
    ) -> Iterator[tuple[Document, Tensor]]:
        """Documents of at most about `TOKENS_OF_ROW` tokens, and the weight of each logarithm."""
        if self.generation.shifted and not len(context):
            raise ValueError("the first token of a text has no token that it is predicted from")
        if self.generation.is_autoregressive or self.generation.verifies:
            tokens = torch.cat((context, continuation))
            predicted = torch.arange(len(context), len(tokens))
            document = _texts(tokens[None, :-1], [predicted - 1], [continuation], causal=True)
            yield document, torch.ones(len(continuation), dtype=torch.float64)
            return
        trajectory = Trajectory(
            sample_index=index,
            prompt_ids=context,
            response_ids=continuation,
            unmask_step=torch.zeros_like(continuation),
            finish_reason="length",
        )
        block_size, mask_token_id = self.generation.block_size, self.special_tokens.mask_token_id
        is_full = self.generation.attention_pattern == "full"
        if not is_full:
            assert block_size is not None
            trajectory = fill_last_block(trajectory, block_size, mask_token_id)
        tokens = sequence_with_tail(trajectory)
        position = torch.arange(len(tokens))
        end = len(context) + len(continuation)
        supervised = (position >= len(context)) & (position < end)
        block = position // (block_size or len(tokens))
        # By the context: the continuations that are compared have orders in common.
        generator = keyed_generator(self.seed, str(context.tolist()), "likelihood")
        states, weights = masked_sets(supervised, block, self.orders, generator)
        texts = len(block[supervised].unique()) if is_full else 1
        at_once = max(1, TOKENS_OF_ROW // (texts * len(tokens)))
        for start in range(0, len(states), at_once):
            chosen = states[start : start + at_once]
            if is_full:
                document = self._full_document(tokens, chosen, block)
            else:
                assert block_size is not None
                document = block_diffusion_document(
                    trajectory,
                    list(chosen | (position >= end)),
                    supervised,
                    block_size=block_size,
                    mask_token_id=mask_token_id,
                    context_attention=self.generation.context_attention,
                )
            yield document, weights[start : start + at_once][chosen]

    def _full_document(self, tokens: Tensor, states: Tensor, block: Tensor) -> Document:
        """A text for each state and block: earlier blocks are shown, later ones are MASK."""
        texts, predicted, labels = [], [], []
        for state in states:
            for number in block[state].unique():
                here = state & (block == number)
                masked = here | (block > number)
                texts.append(tokens.masked_fill(masked, self.special_tokens.mask_token_id))
                predicted.append(here.nonzero()[:, 0] - int(self.generation.shifted))
                labels.append(tokens[here])
        return _texts(torch.stack(texts), predicted, labels)


def masked_sets(
    supervised: Tensor, block: Tensor, orders: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The sets of masked tokens of each block, and what each token of a set counts.

    Blocks share states, as each of them sees only finished blocks besides itself.

    Args:
        supervised: [F] bool, tokens of the continuation.
        block: [F] block ids.
        orders: Random orders in place of all sets, in blocks with `ALL_SETS` sets or more.
        generator: Source of the orders.

    Returns:
        States, [m, F] bool, true in the set, and weights, [m, F] float64, 0 outside of it.
    """
    sets: dict[int, list[tuple[Tensor, float]]] = {}
    for number in block[supervised].unique().tolist():
        inside = (supervised & (block == number)).nonzero()[:, 0]
        n = len(inside)
        if 2**n - 1 < ALL_SETS:
            sets[number] = [
                (inside[list(chosen)], 1.0 / (k * math.comb(n, k)))
                for k in range(1, n + 1)
                for chosen in combinations(range(n), k)
            ]
        else:
            drawn = [inside[torch.randperm(n, generator=generator)] for _ in range(orders)]
            sets[number] = [
                (order[:k], 1.0 / (k * orders)) for order in drawn for k in range(1, n + 1)
            ]
    states = torch.zeros(max(map(len, sets.values())), len(block), dtype=torch.bool)
    weights = torch.zeros(states.shape, dtype=torch.float64)
    for of_block in sets.values():
        for state, (where, weight) in enumerate(of_block):
            states[state, where] = True
            weights[state, where] = weight
    return states, weights


def _texts(
    token_ids: Tensor,
    predicted: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    causal: bool = False,
) -> Document:
    """Texts of one length that do not see each other, as a document.

    Args:
        token_ids: [m, F].
        predicted: For each text, positions whose hidden states are read.
        labels: For each text, the tokens that these predict.
        causal: Whether a token sees the ones before it only, instead of all.
    """
    num_texts, length = token_ids.shape
    position = torch.arange(length).repeat(num_texts)
    supervised = [text * length + where for text, where in enumerate(predicted)]
    none = torch.empty(0, dtype=torch.int64)
    return Document(
        token_ids=token_ids.flatten(),
        block=position if causal else torch.zeros_like(position),
        stream=torch.full_like(position, CLEAN),
        position=position,
        supervised=torch.cat([none, *supervised]),
        labels=torch.cat([none, *labels]),
        weights=torch.ones(sum(map(len, labels))),
        document_ids=torch.arange(num_texts).repeat_interleave(length),
    )
