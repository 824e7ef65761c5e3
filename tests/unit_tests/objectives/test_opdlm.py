"""The OPDLM loss against transformers in float64: one forward a block, dense masks, dense KL."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3ForCausalLM

from megatron_dlm.config import Config
from megatron_dlm.data.packing import pack
from megatron_dlm.distillation.teacher import Teacher
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.forward import forward_hidden
from megatron_dlm.models.model import head_weight
from megatron_dlm.models.model_provider import build_model, build_teacher
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.objectives.block_diffusion import block_diffusion_document
from megatron_dlm.rollout.trajectory import Trajectory
from megatron_dlm.training.model_source import open_model_source
from tests.tiny import save_random_model

pytestmark = pytest.mark.usefixtures("single_process")
MASK, EOS, VOCABULARY = 511, 510, 512


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
        teacher_model = build_teacher(read_architecture(teacher), config)
        open_model_source(teacher, "--teacher-load").load_into(teacher_model)
        self.teacher = Teacher(teacher_model, rows_of=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@st.composite
def trajectories(draw: st.DrawFn, block_size: int) -> Trajectory:
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
def cases(draw: st.DrawFn) -> tuple[int, list[Trajectory], dict[str, object]]:
    block_size = draw(st.integers(1, 5))
    options = dict(
        block_size=block_size,
        state_selection=draw(st.sampled_from(["per_block", "global", "all"])),
        supervise_eos=draw(st.booleans()),
        divergence=draw(st.sampled_from(["forward_kl", "reverse_kl"])),
        divergence_chunk_size=draw(st.sampled_from([3, 64])),
    )
    number = draw(st.integers(1, 3))
    return block_size, [draw(trajectories(block_size)) for _ in range(number)], options


def reference(models: Models, trajectory: Trajectory, block_size: int, kind: str, state) -> tuple:
    """Sum and count over supervised MASKs, one transformers forward for each block's state."""
    masked, supervised = state
    full = torch.cat((trajectory.prompt_ids, trajectory.response_ids, trajectory.tail_ids))
    with torch.no_grad():
        teacher = models.hf_teacher(full[None]).logits[0].log_softmax(-1)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, len(full), block_size):
        end = start + block_size
        wanted = [i for i in range(start, end) if masked[i] and supervised[i]]
        if not wanted:
            continue
        state_ids = full[:end].clone()
        state_ids[start:end][masked[start:end]] = MASK
        block = torch.arange(end) // block_size
        visible = block[None, :] <= block[:, None]
        bias = torch.zeros(end, end, dtype=torch.float64).masked_fill(~visible, -torch.inf)
        student = models.hf_student(state_ids[None], attention_mask=bias[None, None]).logits[0]
        q = student.log_softmax(-1)
        for i in wanted:
            p = teacher[i - 1]
            if kind == "forward_kl":
                total = total + (p.exp() * (p - q[i])).sum()
            else:
                total = total + (q[i].exp() * (q[i] - p)).sum()
            count += 1
    return total, count


@settings(max_examples=25)
@given(cases())
def test_loss_equals_one_dense_forward_per_block(models: Models, case) -> None:
    block_size, batch, options = case
    config = Config.from_dict({"device": "cpu", **options})
    objective = OBJECTIVES["opdlm"](config, MASK, VOCABULARY)
    for trajectory in batch:
        trajectory.teacher_hidden = None
    models.teacher.annotate(batch)
    documents, expected, count = [], torch.zeros((), dtype=torch.float64), 0
    for trajectory in batch:
        full = torch.cat((trajectory.prompt_ids, trajectory.response_ids, trajectory.tail_ids))
        document = objective.document(trajectory, torch.Generator().manual_seed(3))
        documents.append(document)
        # Read the chosen state back from the document, and judge it by the definition.
        prompt, response = len(trajectory.prompt_ids), len(trajectory.response_ids)
        supervised = torch.zeros(len(full), dtype=torch.bool)
        supervised[prompt : prompt + response] = True
        if trajectory.finish_reason == "eos" and not config.objective.supervise_eos:
            supervised[prompt + response - 1] = False
        for stream in range(1, max([0, *document.stream.tolist()]) + 1):
            masked = torch.zeros(len(full), dtype=torch.bool)
            noisy = document.stream == stream
            masked[document.position[noisy].long()] = document.token_ids[noisy] == MASK
            sums = reference(
                models, trajectory, block_size, options["divergence"], (masked, supervised)
            )
            expected, count = expected + sums[0], count + sums[1]
    packed = pack(documents, pad_multiple=4)
    assert packed.loss_count == count
    hidden = forward_hidden(models.student, [packed.row])[0]
    loss, _ = objective.loss(
        hidden[packed.supervised],
        head_weight(models.student),
        packed.labels,
        packed.weights,
        packed.teacher_hidden,
        models.teacher.head,
        None,
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


@given(st.data())
def test_left_out_blocks_change_no_value(models: Models, data: st.DataObject) -> None:
    """The whole clean stream and all noisy blocks give the hidden states of the short document."""
    block_size = data.draw(st.integers(1, 4))
    trajectory = data.draw(trajectories(block_size))
    config = Config.from_dict({"device": "cpu", "block_size": block_size})
    objective = OBJECTIVES["opdlm"](config, MASK, VOCABULARY)
    short = objective.document(trajectory, torch.Generator().manual_seed(1))
    full = torch.cat((trajectory.prompt_ids, trajectory.response_ids, trajectory.tail_ids))
    position = torch.arange(len(full))
    noisy_ids = full.clone()
    noisy = short.stream == 1
    noisy_ids[short.position[noisy].long()] = short.token_ids[noisy]
    block = position // block_size
    layout = torch.stack(
        (
            torch.zeros(2 * len(full)),
            torch.cat((block, block)),
            torch.arange(2 * len(full)) // len(full),
            torch.cat((position, position)),
        )
    ).int()
    whole = pack([short]).row
    whole = type(whole)(torch.cat((full, noisy_ids)), layout[3].long(), layout)
    hidden_whole = forward_hidden(models.student, [whole])[0]
    hidden_short = forward_hidden(models.student, [pack([short]).row])[0]
    where = len(full) + short.position[short.supervised].long()
    assert torch.allclose(hidden_short[short.supervised], hidden_whole[where], atol=1e-4)


def test_a_document_without_a_target_is_empty(models: Models) -> None:
    trajectory = Trajectory(
        0, torch.tensor([1, 2]), torch.tensor([EOS]), torch.tensor([1]), finish_reason="eos"
    )
    config = Config.from_dict({"device": "cpu", "block_size": 1, "supervise_eos": False})
    document = OBJECTIVES["opdlm"](config, MASK, VOCABULARY).document(trajectory, torch.Generator())
    assert len(document.token_ids) == len(document.supervised) == 0
    nothing = torch.zeros(3, dtype=torch.bool)
    again = block_diffusion_document(
        trajectory, [nothing], nothing, block_size=1, mask_token_id=MASK
    )
    assert len(again.token_ids) == 0
