"""The autoregressive loss against transformers in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.config import Config
from megatron_dlm.data.packing import pack
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.types.trajectory import Trajectory
from tests.unit_tests.objectives.dense_reference import (
    MASK,
    VOCABULARY,
    Models,
    corpus_window,
    full_sequence,
    given_responses,
    supervised_tokens,
)

pytestmark = pytest.mark.usefixtures("single_process")


@st.composite
def windows(draw: st.DrawFn) -> Trajectory:
    """A window of a corpus: documents that do not see each other, and no prompt."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    ids = draw(st.lists(st.integers(0, 500), min_size=sum(lengths), max_size=sum(lengths)))
    return corpus_window(torch.tensor(ids), lengths)


@settings(max_examples=40)
@given(
    batch=st.lists(st.one_of(windows(), given_responses(3)), min_size=1, max_size=3),
    supervise_eos=st.booleans(),
)
def test_loss_equals_one_causal_forward_per_document(
    models: Models, batch: list[Trajectory], supervise_eos: bool
) -> None:
    config = Config.from_dict(
        {"device": "cpu", "objective": "next_token", "supervise_eos": supervise_eos}
    )
    next_token = OBJECTIVES["next_token"](config, MASK, VOCABULARY)
    documents, expected, count = [], 0.0, 0
    for trajectory in batch:
        documents.append(next_token.document(trajectory, torch.Generator()))
        tokens = full_sequence(trajectory)
        supervised = supervised_tokens(trajectory, supervise_eos)
        lengths = trajectory.document_lengths or (len(tokens),)
        for ids, predicted in zip(tokens.split(lengths), supervised.split(lengths), strict=True):
            with torch.no_grad():
                log_p = models.hf_student(ids[None]).logits[0].log_softmax(-1)
            for i in range(1, len(ids)):
                if predicted[i]:
                    expected -= float(log_p[i - 1, ids[i]])
                    count += 1
    packed = pack(documents, pad_multiple=4)
    assert packed.loss_count == count
    assert models.loss(next_token, packed) == pytest.approx(expected, rel=1e-4, abs=1e-5)
