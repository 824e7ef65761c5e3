"""Trajectories: what rollouts and data sets hand to objectives, as token ids.

Shapes: P prompt tokens, L response tokens, T tail tokens.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_dlm.types.teacher_targets import TeacherTargets


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt.

    Attributes:
        sample_index: Global index of the sample in the whole run; every random draw for it is keyed
            by this number, so results do not depend on the parallel layout.
        token_ids: [P] int64.
        record: The JSON object the prompt was read from, with all its fields.
        max_response_length: Tokens of the longest response to this prompt; None for no limit but
            that of the rollout.
        beginning: The whole blocks of its response that an earlier rollout decoded, with which this
            one goes on; None for a new response.
    """

    sample_index: int
    token_ids: Tensor
    record: dict[str, Any] = field(default_factory=dict)
    max_response_length: int | None = None
    beginning: "Trajectory | None" = None

    @property
    def known_ids(self) -> Tensor:
        """[P + n] int64: the prompt, and the n tokens of its response that are decoded already."""
        if self.beginning is None:
            return self.token_ids
        return torch.cat((self.token_ids, self.beginning.response_ids))

    def response_limit(self, max_response_length: int) -> int:
        """Tokens after which a response is cut, in a rollout of responses up to this length."""
        own = self.max_response_length
        limit = max_response_length if own is None else min(own, max_response_length)
        if self.beginning is None:
            return limit
        # Of a run that went on with a lower limit.
        return max(limit, len(self.beginning.response_ids) + 1)


@dataclass(frozen=True)
class VerificationRound:
    """Drafts of a response that one forward verified.

    Attributes:
        first: Place in the response of the first token that it settled.
        forward: Of those that drew tokens for the sequence, from 1.
        draft_ids: The drafts from there on; none where one token was left to draw.
        num_accepted: Those of them, the first ones, that the autoregressive mode accepted.
        next_id: The token that it drew after these, in place of a refused draft if there is one;
            None where the response's limit was reached before.
    """

    first: int
    forward: int
    draft_ids: tuple[int, ...]
    num_accepted: int
    next_id: int | None

    @property
    def num_settled(self) -> int:
        """Tokens that it settled, of which the response's end may cut off the last ones."""
        return self.num_accepted + (self.next_id is not None)


def _no_tokens() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class Trajectory:
    """A terminal sequence x_0 and the order in which its response was unmasked.

    Attributes:
        sample_index: As in `Prompt`.
        prompt_ids: [P] int64.
        response_ids: [L] int64, up to and including the first EOS.
        unmask_step: [L] int64, the denoising step of its block (from 1) at which each response
            token was committed; zeros for responses that were not rolled out by block diffusion.
        tail_ids: [T] int64, tokens of the final block after the end of the response (after EOS or
            the length limit). They are no part of x_0 and never supervised, but the student saw
            them when it denoised that block, so its visited states contain them. Empty for
            responses that were not rolled out (`objectives.block_diffusion` fills their last
            block).
        tail_unmask_step: [T] int64.
        finish_reason: "eos" or "length"; "unfinished" if a later rollout goes on with it: then it
            has whole blocks, and no tail.
        canvas_length: Positions that every forward of this sequence saw under full attention: the
            prompt and its longest response, MASK where a token was not committed yet, blocks
            after the last decoded one included. None where no forward saw later blocks.
        denoising_forwards: Forwards that drew tokens for this sequence.
        total_forwards: The same plus its prefill and commit forwards.
        drafted_tokens: Tokens that were drafted by diffusion and verified by the autoregressive
            mode of the same weights; 0 under other strategies.
        accepted_tokens: Those of them that it accepted.
        confidence: [L + T] float32, the probability of each token of response and tail when it was
            committed (`rollout.sampling.SampledTokens`), or, of a verified token, under the
            autoregressive mode; None where nobody asked for it.
        rounds: How drafts became the response, in order; where confidence is kept.
        targets: The teacher's targets: for each of the L response tokens, on the last pipeline
            stage; or, if the student teaches itself, for visited states (`StateTargets`), on all
            stages. None before the teacher phase and for trajectories that are not trained on.
        correct: Whether the run's reward rates the response right; None without a reward.
        tries: Responses generated for the prompt, this one included.
        rollouts: Rollouts from the one that began it to the one that it is trained on after, each
            with the weights of its time.
        weight_version: Optimizer updates that had made the weights that generated it, of a response
            by a server; else None.
        record: The prompt's JSON object.
        document_lengths: Tokens of each document of a corpus window, in order; they do not see each
            other. Empty where prompt and response are one document.
    """

    sample_index: int
    prompt_ids: Tensor
    response_ids: Tensor
    unmask_step: Tensor
    tail_ids: Tensor = field(default_factory=_no_tokens)
    tail_unmask_step: Tensor = field(default_factory=_no_tokens)
    finish_reason: Literal["eos", "length", "unfinished"] = "eos"
    canvas_length: int | None = None
    denoising_forwards: int = 0
    total_forwards: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    confidence: Tensor | None = None
    rounds: tuple[VerificationRound, ...] = ()
    targets: TeacherTargets | None = None
    correct: bool | None = None
    tries: int = 1
    rollouts: int = 1
    weight_version: int | None = None
    record: dict[str, Any] = field(default_factory=dict)
    document_lengths: tuple[int, ...] = ()

    @property
    def token_ids(self) -> Tensor:
        """x_0: prompt and response, [P + L] int64, without the tail."""
        return torch.cat((self.prompt_ids, self.response_ids))

    def documents(self) -> tuple[Tensor, Tensor]:
        """Document, from 0, and position in it of each token of x_0; each [P + L] int64."""
        tokens = len(self.prompt_ids) + len(self.response_ids)
        lengths = torch.tensor(self.document_lengths or (tokens,))
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        starts = lengths.cumsum(0) - lengths
        return document, torch.arange(tokens) - starts[document]

    @property
    def is_finished(self) -> bool:
        """Whether no later rollout goes on with it."""
        return self.finish_reason != "unfinished"

    @property
    def is_rollout(self) -> bool:
        """Whether block diffusion generated it, so that it has visited states."""
        return bool((self.unmask_step > 0).any())
