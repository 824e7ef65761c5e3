"""The OPDLM loss against transformers in float64: one forward a block, dense masks, dense KL."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.config import Config
from megatron_dlm.data.packing import pack
from megatron_dlm.models.forward import forward_hidden
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.objectives.block_diffusion import block_diffusion_document
from megatron_dlm.types.trajectory import Trajectory
from tests.unit_tests.objectives.dense_reference import (
    EOS,
    MASK,
    VOCABULARY,
    Models,
    dense_loss,
    forward_kl,
    full_sequence,
    masked_tokens,
    reverse_kl,
    supervised_tokens,
    trajectories,
)

pytestmark = pytest.mark.usefixtures("single_process")
DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}


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


@settings(max_examples=25)
@given(cases())
def test_loss_equals_one_dense_forward_per_block(models: Models, case) -> None:
    block_size, batch, options = case
    config = Config.from_dict({"device": "cpu", **options})
    objective = OBJECTIVES["opdlm"](config, MASK, VOCABULARY)
    for trajectory in batch:
        trajectory.targets = None
    models.teacher.annotate(batch)
    documents, expected, count = [], 0.0, 0
    for trajectory in batch:
        document = objective.document(trajectory, torch.Generator().manual_seed(3))
        documents.append(document)
        # Read the chosen state back from the document, and judge it by the definition.
        supervised = supervised_tokens(trajectory, config.objective.supervise_eos)
        for stream in range(1, max([0, *document.stream.tolist()]) + 1):
            masked = masked_tokens(trajectory, document, stream)
            token_loss = DIVERGENCES[options["divergence"]]
            with torch.no_grad():
                sums = dense_loss(models, trajectory, block_size, masked, supervised, token_loss)
            expected, count = expected + float(sums[0]), count + sums[1]
    packed = pack(documents, pad_multiple=4)
    assert packed.loss_count == count
    assert models.loss(objective, packed) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(st.data())
def test_left_out_blocks_change_no_value(models: Models, data: st.DataObject) -> None:
    """The whole clean stream and all noisy blocks give the hidden states of the short document.

    That has the noisy blocks with a supervised token, and the clean blocks before the last of them.
    """
    block_size = data.draw(st.integers(1, 4))
    trajectory = data.draw(trajectories(block_size))
    config = Config.from_dict({"device": "cpu", "block_size": block_size})
    objective = OBJECTIVES["opdlm"](config, MASK, VOCABULARY)
    short = objective.document(trajectory, torch.Generator().manual_seed(1))
    supervised_blocks = short.block[short.supervised].unique()
    assert torch.equal(short.block[short.stream == 1].unique(), supervised_blocks)
    clean_blocks = short.block[short.stream == 0].unique()
    assert torch.equal(clean_blocks, torch.arange(int(supervised_blocks.max())))
    full = full_sequence(trajectory)
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
