"""Decoding of exported models in batches, against brute force and against each prompt alone.

The reference decodes one prompt by forwards of whole sequences, with attention masks made here.
"""

import pytest
import torch

from tests.unit_tests.conversion.diffusion_models import (
    MASK,
    MODELS,
    batch_responses,
    padded,
    random_diffusion_model,
    random_prompt,
)

MAX_NEW_TOKENS = 11
PROMPTS = [random_prompt(length) for length in (5, 1, 12, 4, 7)]
# Many, so that some of the short responses of random models end early.
ENDS = range(7, MASK, 5)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return random_diffusion_model(request.param)


@torch.no_grad()
def brute_force(model, prompt, eos, *, strategy, block_size, threshold=0.9, steps=None):
    """The most likely tokens, by a forward of the whole sequence for every step."""
    full, shift = model.config.attention_pattern == "full", int(model.config.shifted)
    size = block_size or MAX_NEW_TOKENS
    end = len(prompt) + MAX_NEW_TOKENS
    sequence = prompt.tolist() + [MASK] * MAX_NEW_TOKENS
    start = len(prompt) // size * size if block_size else len(prompt)
    while start < end and not set(sequence[len(prompt) : start]) & set(eos):
        stop = start + size
        if not full:
            sequence = sequence[:start] + (sequence[start:stop] + [MASK] * size)[:size]
        todo = [i for i in range(start, min(stop, len(sequence))) if i >= len(prompt)]
        first_count, step = len(todo), 0
        while todo:
            step += 1
            block = torch.arange(len(sequence)) // size
            visible = torch.ones(len(sequence), len(sequence), dtype=torch.bool)
            if not full:
                visible = block[:, None] >= block
            logits = (
                model(torch.tensor([sequence]), attention_mask=visible[None]).logits[0].double()
            )
            logits[:, MASK] = -torch.inf
            probabilities = {i: logits[i - shift].softmax(-1) for i in todo}
            score = {i: float(probabilities[i].max()) for i in todo}
            if strategy == "low_confidence_dynamic":
                keep = [i for i in todo if score[i] > threshold] or [max(todo, key=score.get)]
            elif strategy == "low_confidence_static":
                keep = sorted(todo, key=score.get, reverse=True)[: size // steps]
            else:
                entropy = {i: -float(torch.special.entr(p).sum()) for i, p in probabilities.items()}
                count = len(todo) - first_count * max(steps - step, 0) // steps
                keep = sorted(todo, key=entropy.get, reverse=True)[: max(count, 1)]
            for i in keep:
                sequence[i] = int(probabilities[i].argmax())
            todo = [i for i in todo if i not in keep]
        start = stop
    response = sequence[len(prompt) : end]
    ends = [i + 1 for i, token in enumerate(response) if token in eos]
    return response[: ends[0]] if ends else response


@pytest.mark.parametrize(
    ("strategy", "block_size", "options"),
    [
        ("low_confidence_dynamic", 4, {"threshold": 0.2}),
        ("low_confidence_static", 4, {"steps": 2}),
        ("entropy", 8, {"steps": 3}),
        ("entropy", None, {"steps": 5}),
    ],
)
def test_padded_batches_decode_as_brute_force_does_each_prompt(
    model, strategy, block_size, options
):
    if block_size is None and model.config.attention_pattern != "full":
        block_size = 5
    expected = [
        brute_force(model, tokens, ENDS, strategy=strategy, block_size=block_size, **options)
        for tokens in PROMPTS
    ]
    assert len({len(response) for response in expected}) > 1
    settings = {
        "remasking_strategy": strategy,
        "block_size": block_size,
        "dynamic_threshold": options.get("threshold"),
        "denoising_steps": options.get("steps"),
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    assert batch_responses(model, PROMPTS, ENDS, **settings) == expected
    assert batch_responses(model, PROMPTS, ENDS, **settings, use_cache=False) == expected
    assert batch_responses(model, PROMPTS, ENDS, "right", **settings) == expected


def test_samples_do_not_depend_on_the_batch(model):
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": True, "temperature": 1.5, "top_k": 0}

    def sampled(prompts, seed, **more):
        torch.manual_seed(seed)
        return batch_responses(model, prompts, ENDS, **settings, **more)

    alone = [sampled([tokens], seed=3)[0] for tokens in PROMPTS]
    assert len({len(response) for response in alone}) > 1
    assert sampled(PROMPTS, seed=3) == alone
    assert sampled(PROMPTS[::-1], seed=3) == alone[::-1]
    assert sampled(PROMPTS, seed=4) != alone
    # A generator of the caller's own, and transformers' default filter.
    seeded = [torch.Generator().manual_seed(5) for _ in range(2)]
    filtered = [sampled(PROMPTS, seed, generator=g) for seed, g in enumerate(seeded)]
    assert filtered[0] == filtered[1]
    # Equal prompts draw anew, as the returned sequences of one do.
    copies = sampled([PROMPTS[2]], seed=3, num_return_sequences=4)
    assert len({tuple(response) for response in copies}) == 4
    assert copies[0] == alone[2]
    assert sampled([PROMPTS[2], PROMPTS[0], *[PROMPTS[2]] * 3], seed=3) == [
        copies[0],
        alone[0],
        *copies[1:],
    ]


def test_a_batch_costs_the_forwards_of_its_longest_row(model, monkeypatch):
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "dynamic_threshold": 0.2}
    rows, network = [], model.model.forward

    def counted(token_ids, **arguments):
        rows.append(len(token_ids))
        return network(token_ids, **arguments)

    monkeypatch.setattr(model.model, "forward", counted)
    forwards = []
    for tokens in PROMPTS:
        rows.clear()
        batch_responses(model, [tokens], ENDS, **settings)
        forwards.append(len(rows))
    rows.clear()
    batch_responses(model, PROMPTS, ENDS, **settings)
    assert len(rows) == max(forwards)
    # Rows that have ended are not computed any more.
    assert sum(rows) == sum(forwards)
    assert max(rows) == len(PROMPTS)


def test_keys_of_finished_blocks_are_not_computed_again(monkeypatch):
    model = random_diffusion_model("sdar")
    widths, network = [], model.model.forward

    def counted(token_ids, **arguments):
        widths.append(token_ids.shape[1])
        return network(token_ids, **arguments)

    monkeypatch.setattr(model.model, "forward", counted)
    rows, _ = padded([random_prompt(40)])
    model.generate(rows, max_new_tokens=12, remasking_strategy="low_confidence_static")
    # The prompt with the first block; then a block, with the one before it where it is clean.
    assert widths == [44, 4, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]
