"""Log-likelihoods of continuations against transformers in float64, order by order."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_dlm.config import Config, ParallelConfig
from megatron_dlm.evaluation import likelihood
from megatron_dlm.evaluation.likelihood import Likelihoods, masked_sets
from megatron_dlm.models.model import DiffusionGPTModel
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.rollout.generation_config import GenerationConfig
from tests.unit_tests.rollout.tiny_models import (
    FULL_ATTENTION,
    GENERATION,
    MASK,
    SPECIAL_TOKENS,
    load_model,
    save_tiny_model,
)

SETTINGS = {
    "blocks": GENERATION,
    "blocks of 3": dataclasses.replace(GENERATION, block_size=3, denoising_steps_per_block=3),
    "full": FULL_ATTENTION,
    "full by blocks": dataclasses.replace(FULL_ATTENTION, block_size=4),
    "full shifted": dataclasses.replace(FULL_ATTENTION, shifted=True),
    "causal": GenerationConfig.autoregressive(
        temperature=1.0, top_k=0, top_p=1.0, max_running_requests=1
    ),
}
LENGTHS = [(5, 3), (4, 4), (1, 2), (7, 1), (3, 4)]
"""Of contexts and continuations; one of 4 tokens lies in one block of 4, others in two."""


class Models(NamedTuple):
    """The same weights twice."""

    ours: DiffusionGPTModel
    reference: torch.nn.Module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    folder: Path = tmp_path_factory.mktemp("qwen3")
    save_tiny_model(folder)
    reference = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float64
    )
    with initialized(Config(parallel=ParallelConfig(device="cpu"))):
        yield Models(load_model(folder).eval(), reference.eval())


def pairs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, MASK, (p + n,), generator=generator) for p, n in LENGTHS]
    return [(text[:p], text[p:]) for text, (p, _) in zip(texts, LENGTHS, strict=True)]


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, tokens: list[int], visible: Tensor) -> Tensor:
    """Of every position, [S, V], under a mask of what each position sees, [S, S] bool."""
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    logits = model(torch.tensor([tokens]), attention_mask=mask[None, None]).logits[0]
    return torch.as_tensor(logits.log_softmax(dim=-1))


def mean_over_orders(
    model: torch.nn.Module, generation: GenerationConfig, context: Tensor, continuation: Tensor
) -> float:
    """Mean, over all orders of each block, of the logarithm of writing the text one by one."""
    text = context.tolist() + continuation.tolist()
    size = generation.block_size or len(text)
    length = len(text) if generation.attention_pattern == "full" else -(-len(text) // size) * size
    total = 0.0
    for block in range(len(context) // size, (len(text) - 1) // size + 1):
        inside = [i for i in range(len(context), len(text)) if i // size == block]
        end = length if generation.attention_pattern == "full" else (block + 1) * size
        position = torch.arange(end)
        visible = torch.ones(end, end, dtype=torch.bool)
        if generation.attention_pattern == "block_causal":
            visible = position[:, None] // size >= position // size
        if generation.attention_pattern == "causal":
            visible = position[:, None] >= position
        sums = []
        for order in itertools.permutations(inside):
            canvas = [text[i] if i < min(inside) else MASK for i in range(end)]
            value = 0.0
            for i in order:
                rows = log_probabilities(model, canvas, visible)
                value += float(rows[i - int(generation.shifted), text[i]])
                canvas[i] = text[i]
            sums.append(value)
        total += sum(sums) / len(sums)
    return total


@pytest.mark.parametrize("name", SETTINGS)
def test_bound_is_the_mean_over_all_orders(models: Models, name: str) -> None:
    generation = SETTINGS[name]
    found = Likelihoods(
        models.ours, generation, SPECIAL_TOKENS, ParallelGroups.from_parallel_state()
    ).log_likelihoods(pairs())
    expected = [mean_over_orders(models.reference, generation, *pair) for pair in pairs()]
    assert found == pytest.approx(expected, rel=1e-4)


def test_rows_of_any_size_have_the_same_results(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    for tokens in (8192, 20):
        monkeypatch.setattr(likelihood, "TOKENS_OF_ROW", tokens)
        for name in ("blocks", "full"):
            likelihoods = Likelihoods(
                models.ours,
                SETTINGS[name],
                SPECIAL_TOKENS,
                ParallelGroups.from_parallel_state(),
            )
            computed.append(likelihoods.log_likelihoods(pairs()))
    assert computed[:2] == [pytest.approx(values, rel=1e-5) for values in computed[2:]]


def test_first_token_of_a_text_needs_one_before_it(models: Models) -> None:
    likelihoods = Likelihoods(
        models.ours, SETTINGS["causal"], SPECIAL_TOKENS, ParallelGroups.from_parallel_state()
    )
    with pytest.raises(ValueError, match="no token that it is predicted from"):
        likelihoods.log_likelihoods([(torch.empty(0, dtype=torch.int64), torch.tensor([3]))])


def test_orders_stand_for_all_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all orders of five tokens, their estimate is the sum over all sets."""
    n = 5
    table = torch.rand(2**n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def total(states: Tensor, weights: Tensor) -> float:
        sets = (states.long() * 2 ** torch.arange(n)).sum(1)
        return float((table[sets] * weights).sum())

    supervised, block = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64)
    orders = itertools.permutations(range(n))
    generator = torch.Generator()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, generator: torch.tensor(next(orders)))
        estimate = total(*masked_sets(supervised, block, math.factorial(n), generator))
    monkeypatch.setattr(likelihood, "ALL_SETS", 2**n)
    states, weights = masked_sets(supervised, block, 1, generator)
    assert len(states) == 2**n - 1
    assert estimate == pytest.approx(total(states, weights), rel=1e-12)
