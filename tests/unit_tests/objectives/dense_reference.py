"""Losses by transformers in float64: one forward a block, dense masks, dense distributions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3ForCausalLM

from megatron_dlm.config import Config
from megatron_dlm.data.packing import TrainingBatch
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.forward import forward_hidden
from megatron_dlm.models.model import head_weight
from megatron_dlm.models.model_provider import build_frozen_model, build_model
from megatron_dlm.models.row_packing import RowPacking
from megatron_dlm.objectives.base import LossInputs, Objective
from megatron_dlm.teacher.frozen import FrozenTeacher
from megatron_dlm.training.model_source import open_model_source
from megatron_dlm.types.document import Document
from megatron_dlm.types.trajectory import Trajectory
from tests.tiny import save_random_model

MASK, EOS, VOCABULARY = 511, 510, 512

TokenLoss = Callable[[Tensor, Tensor, int, int], Tensor]


class Models:
    """A student and a larger teacher: as this framework runs them, and as transformers does."""

    def __init__(self, folder: Path) -> None:
        student = str(save_random_model(folder / "student", seed=1))
        teacher = str(save_random_model(folder / "teacher", seed=2, hidden_size=48))
        self.hf_student = Qwen3ForCausalLM.from_pretrained(student).double().eval()
        self.hf_teacher = Qwen3ForCausalLM.from_pretrained(teacher).double().eval()
        config = Config.from_dict({"device": "cpu"})
        self.student = build_model(read_architecture(student), config)
        open_model_source(student, "--load").load_into(self.student)
        self.student.eval()
        teacher_model = build_frozen_model(read_architecture(teacher), config)
        open_model_source(teacher, "--teacher-load").load_into(teacher_model)
        self.teacher = FrozenTeacher(teacher_model, RowPacking(2))

    def loss(self, objective: Objective, batch: TrainingBatch) -> float:
        """The loss sum of a batch as training computes it."""
        hidden = forward_hidden(self.student, [batch.row])[0]
        loss, _ = objective.loss(
            LossInputs(
                hidden[batch.supervised],
                head_weight(self.student),
                batch.labels,
                batch.weights,
                targets=batch.targets,
                teacher_head=self.teacher.head,
            )
        )
        return float(loss.detach())


@st.composite
def trajectories(draw: st.DrawFn, block_size: int) -> Trajectory:
    """Trajectories as of rollouts: whole blocks, with a step for every token after the prompt."""
    prompt = draw(st.integers(1, 3 * block_size))
    total = -(-(prompt + draw(st.integers(1, 3 * block_size))) // block_size) * block_size
    tail = draw(st.integers(0, min(block_size, total - prompt) - 1))
    ids = torch.tensor(draw(st.lists(st.integers(0, 500), min_size=total, max_size=total)))
    steps = torch.tensor(draw(st.lists(st.integers(1, block_size), min_size=total, max_size=total)))
    ended = draw(st.booleans())
    if ended:
        ids[total - tail - 1] = EOS
    return Trajectory(
        sample_index=draw(st.integers(0, 99)),
        prompt_ids=ids[:prompt],
        response_ids=ids[prompt : total - tail],
        unmask_step=steps[prompt : total - tail],
        tail_ids=ids[total - tail :],
        tail_unmask_step=steps[total - tail :],
        finish_reason="eos" if ended else "length",
    )


@st.composite
def given_responses(draw: st.DrawFn, block_size: int) -> Trajectory:
    """What a data set or the teacher gives: no steps, no tail, an end anywhere in a block."""
    trajectory = draw(trajectories(block_size))
    return Trajectory(
        sample_index=trajectory.sample_index,
        prompt_ids=trajectory.prompt_ids,
        response_ids=trajectory.response_ids,
        unmask_step=torch.zeros_like(trajectory.unmask_step),
        finish_reason=trajectory.finish_reason,
    )


def as_decoding_shows(trajectory: Trajectory, block_size: int) -> Trajectory:
    """Whole blocks: a response not rolled out goes on with EOS, or, where it was cut, MASK."""
    if trajectory.unmask_step.any():
        return trajectory
    filler = EOS if trajectory.finish_reason == "eos" else MASK
    tail: list[int] = []
    while (len(trajectory.prompt_ids) + len(trajectory.response_ids) + len(tail)) % block_size:
        tail.append(filler)
    tail_ids = torch.tensor(tail, dtype=torch.int64)
    return replace(trajectory, tail_ids=tail_ids, tail_unmask_step=torch.zeros_like(tail_ids))


def corpus_window(token_ids: Tensor, lengths: Sequence[int]) -> Trajectory:
    """A window of a corpus: documents of these lengths, which do not see each other; no prompt."""
    return Trajectory(
        sample_index=0,
        prompt_ids=token_ids[:0],
        response_ids=token_ids,
        unmask_step=torch.zeros_like(token_ids),
        finish_reason="length",
        document_lengths=tuple(lengths),
    )


def full_sequence(trajectory: Trajectory) -> Tensor:
    return torch.cat((trajectory.prompt_ids, trajectory.response_ids, trajectory.tail_ids))


def supervised_tokens(trajectory: Trajectory, supervise_eos: bool) -> Tensor:
    supervised = torch.zeros(len(full_sequence(trajectory)), dtype=torch.bool)
    prompt, response = len(trajectory.prompt_ids), len(trajectory.response_ids)
    supervised[prompt : prompt + response] = True
    if trajectory.finish_reason == "eos" and not supervise_eos:
        supervised[prompt + response - 1] = False
    return supervised


def masked_tokens(trajectory: Trajectory, document: Document, stream: int = 1) -> Tensor:
    """Read one state back from a document."""
    masked = torch.zeros(len(full_sequence(trajectory)), dtype=torch.bool)
    noisy = document.stream == stream
    masked[document.position[noisy].long()] = document.token_ids[noisy] == MASK
    return masked


def forward_kl(p: Tensor, q: Tensor, label: int, position: int) -> Tensor:
    return (p.exp() * (p - q)).sum()


def reverse_kl(p: Tensor, q: Tensor, label: int, position: int) -> Tensor:
    return (q.exp() * (q - p)).sum()


def dense_loss(
    models: Models,
    trajectory: Trajectory,
    block_size: int,
    masked: Tensor,
    supervised: Tensor,
    token_loss: TokenLoss,
    causal_context: bool = False,
) -> tuple[Tensor, int]:
    """Sum and number of token_loss(log p, log q, label, position) over supervised MASKs.

    The sum has a gradient for the student.
    """
    full = full_sequence(trajectory)
    total, count = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        teacher = models.hf_teacher(full[None]).logits[0].log_softmax(-1)
    for start in range(0, len(full), block_size):
        end = min(start + block_size, len(full))
        wanted = [i for i in range(start, end) if masked[i] and supervised[i]]
        if not wanted:
            continue
        state_ids = full[:end].clone()
        state_ids[start:end][masked[start:end]] = MASK
        block = torch.arange(end) // block_size
        visible = block[None, :] <= block[:, None]
        if causal_context:
            visible[:start, :start] = torch.ones(start, start).tril().bool()
        bias = torch.zeros(end, end, dtype=torch.float64).masked_fill(~visible, -torch.inf)
        student = models.hf_student(state_ids[None], attention_mask=bias[None, None]).logits[0]
        q = student.log_softmax(-1)
        for i in wanted:
            total = total + token_loss(teacher[i - 1], q[i], int(full[i]), i)
            count += 1
    return total, count


def dense_causal_loss(
    models: Models, trajectory: Trajectory, supervised: Tensor, token_loss: TokenLoss
) -> tuple[Tensor, int]:
    """The same of plain transformers' next-token predictions of x_0, over supervised tokens."""
    full = full_sequence(trajectory)
    with torch.no_grad():
        p = models.hf_teacher(full[None]).logits[0].log_softmax(-1)
    q = models.hf_student(full[None]).logits[0].log_softmax(-1)
    wanted = supervised.nonzero()[:, 0].tolist()
    losses = [token_loss(p[i - 1], q[i - 1], int(full[i]), i) for i in wanted if i > 0]
    return sum(losses, torch.zeros((), dtype=torch.float64)), len(losses)
