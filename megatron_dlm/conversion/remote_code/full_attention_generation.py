"""Denoising of a canvas under full attention, for plain transformers.

B: sequences; P: tokens of a prompt.
"""

from typing import Any

import torch
from torch import Tensor

from .generation_inputs import check_generation_arguments, prompts_without_padding, special_tokens
from .remasking import REMASKING_STRATEGIES, committed_positions
from .token_draws import draw_tokens, padded_responses


class FullAttentionGeneration:
    """`generate` of a model with full attention."""

    config: Any
    __call__: Any

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 256,
        block_size: int | None = None,
        denoising_steps: int | None = None,
        remasking_strategy: str = "entropy",
        dynamic_threshold: float = 0.9,
        entropy_bound: float = 0.1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        mask_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Denoise a canvas of prompt and MASK; one sequence of the batch after the other.

        Args:
            input_ids: [B, P], prompts.
            attention_mask: [B, P], zero for padding; None: no padding.
            max_new_tokens: MASK tokens behind a prompt: the limit for the response.
            block_size: Denoise block by block, on the grid from token 0, and stop after a block
                with an EOS. Default: the config's; None denoises the response as a whole.
            denoising_steps: Steps of `low_confidence_static` and `entropy` for a block, or for the
                whole response; default: `num_diffusion_steps` of the config, else one token each.
            remasking_strategy: `low_confidence_static` keeps an equal share of the tokens at every
                step, the most confident ones; `low_confidence_dynamic` all above the threshold;
                `entropy` all but a shrinking number of the highest entropy; `entropy_bounded` the
                most confident ones as long as their entropies but the largest sum up to the bound.
            dynamic_threshold: Confidence that a token must exceed.
            entropy_bound: In nats.
            temperature: 0 takes the most likely token.
            top_k: Draw among the k most likely tokens; 0 is off.
            top_p: Draw among the most likely tokens that together hold this probability; 1 is off.
            eos_token_id: Ends a response; default: the config's.
            pad_token_id: Fills up shorter responses; default: the config's, else the EOS.
            mask_token_id: Default: the config's.
            generator: Of the draws.

        Returns:
            [B, P + longest response], prompts as they were given and responses up to and including
            their first EOS.
        """
        config = self.config
        block_size = config.block_size if block_size is None else block_size
        special = special_tokens(config, mask_token_id, eos_token_id, pad_token_id)
        check_generation_arguments(remasking_strategy, REMASKING_STRATEGIES, max_new_tokens)
        if config.shifted and input_ids.shape[1] == 0:
            raise ValueError("a prompt needs a token to predict the first one from")

        size = block_size or max_new_tokens
        steps = denoising_steps or config.num_diffusion_steps or size
        responses = []
        for prompt in prompts_without_padding(input_ids, attention_mask):
            start = len(prompt)
            canvas = torch.cat((prompt, prompt.new_full((max_new_tokens,), special.mask)))
            first_block = start if block_size is None else start // size * size
            for block_start in range(first_block, len(canvas), size):
                block = slice(max(start, block_start), min(block_start + size, len(canvas)))
                masked = torch.arange(block.start, block.stop, device=canvas.device)
                masked_at_start = len(masked)
                step = 1
                while len(masked):
                    logits = self(canvas[None]).logits[0, masked - int(config.shifted)].float()
                    logits[:, special.mask] = -torch.inf
                    tokens = draw_tokens(logits, temperature, top_k, top_p, generator)
                    probabilities = logits.softmax(dim=-1)
                    committed = committed_positions(
                        remasking_strategy,
                        probabilities.gather(-1, tokens[:, None])[:, 0],
                        torch.special.entr(probabilities).sum(dim=-1),
                        step=step,
                        num_steps=steps,
                        block_size=size,
                        masked_at_start=masked_at_start,
                        dynamic_threshold=dynamic_threshold,
                        entropy_bound=entropy_bound,
                    )
                    canvas[masked[committed]] = tokens[committed]
                    stays = torch.ones_like(masked, dtype=torch.bool)
                    stays[committed] = False
                    masked = masked[stays]
                    step += 1
                is_eos = torch.isin(canvas[start : block.stop], canvas.new_tensor(special.eos))
                if is_eos.any():
                    break
            end = int(is_eos.int().argmax()) + 1 if is_eos.any() else max_new_tokens
            responses.append(canvas[start : start + end])
        return padded_responses(input_ids, responses, special.fill)
