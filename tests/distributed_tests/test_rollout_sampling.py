import pytest
import torch
import torch.distributed as dist

from megatron_dlm.rollout.sampling import SampledTokens, sample_tokens
from megatron_dlm.rollout.uniforms import counter_uniforms
from tests.distributed_tests.spawn import run_distributed

# Shards of one and more blocks, and, on four ranks, of one and a quarter.
VOCAB_SIZE, PADDED, MASK_TOKEN_ID, N = 630, 640, 470, 200
SETTINGS = [
    {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.7, "top_k": 5, "top_p": 1.0},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.6},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8},
]


def sample_shard(rank: int, world_size: int) -> list[tuple[torch.Tensor, ...]]:
    logits = 3 * torch.randn(N, PADDED, generator=torch.Generator().manual_seed(3))
    logits[:20] = logits[:20].round()  # ties within and across shards
    shard = torch.eye(PADDED).chunk(world_size)[rank]  # of the head: the hidden states are logits
    group = dist.group.WORLD if world_size > 1 else None
    rows = torch.arange(N)
    results = []
    for settings in SETTINGS:
        packed = sample_tokens(
            logits,
            shard,
            counter_uniforms(1, rows, rows % 7, rows % 3),
            vocab_start=rank * len(shard),
            vocab_size=VOCAB_SIZE,
            mask_token_id=MASK_TOKEN_ID,
            tp_group=group,
            **settings,
        )
        sampled = SampledTokens.unpack(packed)
        results.append((sampled.token_ids, sampled.confidence, sampled.entropy))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_draws_do_not_depend_on_the_vocabulary_shards(world_size: int) -> None:
    whole = sample_shard(0, 1)
    per_rank = run_distributed(sample_shard, world_size, world_size)
    for setting, expected in enumerate(whole):
        for results in per_rank:
            tokens, confidence, entropy = results[setting]
            assert torch.equal(tokens, expected[0])
            torch.testing.assert_close(confidence, expected[1], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(entropy, expected[2], rtol=1e-5, atol=1e-6)
        for results in per_rank[1:]:  # ranks must decide alike: equal to the bit
            assert all(
                torch.equal(a, b)
                for a, b in zip(results[setting], per_rank[0][setting], strict=True)
            )
