"""Draws by Triton's kernels, in its interpreter on the CPU, against those in PyTorch.

Run by `test_draw_kernels`: the interpreter has to be chosen before Triton is imported.
"""

import torch

from megatron_dlm.rollout.block_draws import TORCH_PASSES, draw_from_logits, forbid_tokens
from megatron_dlm.rollout.draw_kernels import TRITON_PASSES

N, COLUMNS, VOCAB_SIZE, MASK_TOKEN_ID = 3, 3 * 128, 360, 300
FILTERS = [
    (0.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.3, 20, 1.0),
    (1.0, 90, 0.8),
]


def main() -> None:
    """Compare all filters in two types; raises AssertionError where draws differ."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        logits = (3 * torch.randn(N, COLUMNS, generator=generator)).to(dtype)
        logits[0] = logits[0].round()  # ties
        logits[1] -= 20.0  # negative keys only
        forbid_tokens(logits, first_id=0, vocab_size=VOCAB_SIZE, mask_token_id=MASK_TOKEN_ID)
        uniforms = torch.rand(N, generator=generator, dtype=torch.float64)
        logits[2, 250] = torch.inf
        # Types differ in the search for the top-p threshold only.
        for temperature, top_k, top_p in FILTERS if dtype == torch.bfloat16 else FILTERS[-1:]:
            expected, found = (
                draw_from_logits(
                    logits,
                    uniforms,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    passes=passes,
                )
                for passes in (TORCH_PASSES, TRITON_PASSES)
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


if __name__ == "__main__":
    main()
