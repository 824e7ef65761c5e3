"""Decoding by blocks under block-causal attention, for plain transformers.

B: sequences; P: tokens of a prompt.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .generation_inputs import check_generation_arguments, prompts_without_padding, special_tokens
from .token_draws import draw_tokens, padded_responses


class BlockCausalGeneration:
    """`generate` of a model with block-causal attention and logits that are not shifted."""

    config: Any
    model: Any
    lm_head: Any

    STRATEGIES = ("low_confidence_static", "low_confidence_dynamic")

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 256,
        block_size: int | None = None,
        denoising_steps: int | None = None,
        remasking_strategy: str = "low_confidence_dynamic",
        dynamic_threshold: float = 0.9,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        mask_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Decode block by block; one sequence of the batch after the other.

        Args:
            input_ids: [B, P], prompts.
            attention_mask: [B, P], zero for padding; None: no padding.
            max_new_tokens: Limit for the response.
            block_size: Default: the config's.
            denoising_steps: Steps of `low_confidence_static` for a block; default: one token each.
            remasking_strategy: `low_confidence_static` keeps the block_size / denoising_steps most
                confident tokens of a step, `low_confidence_dynamic` all above the threshold.
            dynamic_threshold: Confidence that a token must exceed.
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
        block_size = block_size or config.block_size
        denoising_steps = denoising_steps or block_size
        special = special_tokens(config, mask_token_id, eos_token_id, pad_token_id)
        check_generation_arguments(remasking_strategy, self.STRATEGIES, max_new_tokens)
        if block_size % denoising_steps:
            raise ValueError(
                f"denoising_steps {denoising_steps} must divide the block {block_size}"
            )

        responses = []
        for prompt in prompts_without_padding(input_ids, attention_mask):
            sequence, cache = prompt, DynamicCache()
            while True:
                block = self._denoise_block(
                    sequence,
                    cache,
                    block_size=block_size,
                    tokens_per_step=block_size // denoising_steps,
                    threshold=dynamic_threshold if "dynamic" in remasking_strategy else None,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    mask_token_id=special.mask,
                    generator=generator,
                )
                decoded = len(sequence)
                sequence = torch.cat((sequence, block[decoded % block_size :]))
                is_eos = torch.isin(sequence[decoded:], sequence.new_tensor(special.eos))
                if is_eos.any():
                    sequence = sequence[: decoded + int(is_eos.int().argmax()) + 1]
                if is_eos.any() or len(sequence) >= len(prompt) + max_new_tokens:
                    break
            responses.append(sequence[len(prompt) : len(prompt) + max_new_tokens])
        return padded_responses(input_ids, responses, special.fill)

    def _denoise_block(
        self,
        sequence: Tensor,
        cache: DynamicCache,
        *,
        block_size: int,
        tokens_per_step: int,
        threshold: float | None,
        temperature: float,
        top_k: int,
        top_p: float,
        mask_token_id: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The block [block_size] that holds the first token behind `sequence`.

        The tokens of `sequence` in it are observed. The first forward also computes the keys of the
        clean blocks before it that are not in the cache yet.
        """
        start = len(sequence) // block_size * block_size
        block = sequence.new_full((block_size,), mask_token_id)
        block[: len(sequence) - start] = sequence[start:]
        masked = torch.arange(block_size, device=block.device) >= len(sequence) - start
        while masked.any():
            pending = torch.cat((sequence[cache.get_seq_length() : start], block))
            hidden = self.model(
                pending[None], past_key_values=cache, block_size=block_size
            ).last_hidden_state
            cache.crop(-block_size)  # the block's own keys are final once it is clean
            logits = self.lm_head(hidden[0, -block_size:]).float()
            logits[:, mask_token_id] = -torch.inf
            tokens = draw_tokens(logits, temperature, top_k, top_p, generator)
            probabilities = logits.softmax(dim=-1)
            confidence = probabilities.gather(-1, tokens[:, None])[:, 0].masked_fill(~masked, -1.0)
            order = confidence.sort(descending=True, stable=True).indices
            if threshold is None:
                committed = order[: min(tokens_per_step, int(masked.sum()))]
            else:
                passing = int((confidence > threshold).sum())
                committed = order[: max(1, passing)]
            block[committed] = tokens[committed]
            masked[committed] = False
        return block
