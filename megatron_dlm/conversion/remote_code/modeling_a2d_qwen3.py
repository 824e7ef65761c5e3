"""A2D-Qwen3 for plain transformers: Qwen3 with bidirectional attention and diffusion decoding.

Every token sees every token. Logits at a position predict its own token or, where the config says
`shifted`, the next one; they are returned as the network has them.

B: sequences; S: tokens of a forward; P: tokens of a prompt; V: vocabulary.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from .configuration_a2d_qwen3 import A2DQwen3Config
from .configuration_diffusion_qwen3 import DiffusionQwen3Config
from .generation_inputs import (
    check_generation_arguments,
    prompts_without_padding,
    special_tokens,
)
from .qwen3_layers import DecoderLayer, RMSNorm, rotary_angles
from .remasking import REMASKING_STRATEGIES, committed_positions
from .token_draws import draw_tokens, padded_responses


class A2DQwen3PreTrainedModel(PreTrainedModel):
    """What transformers has to know to load and place the model."""

    config_class: type[DiffusionQwen3Config] = A2DQwen3Config
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["DecoderLayer"]
    _supports_sdpa = True


class A2DQwen3Model(A2DQwen3PreTrainedModel):
    """The network without its output layer."""

    layer_class: type[nn.Module] = DecoderLayer

    def __init__(self, config: DiffusionQwen3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [self.layer_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        """Hidden states.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], zero for padding, which may be on either side; None: no padding.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        is_token = attention_mask.bool()
        # Padding sees itself: attention over nothing is not a number.
        padding = torch.eye(input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
        mask = is_token[:, None, None, :] | padding
        cos, sin = rotary_angles((is_token.cumsum(dim=-1) - 1).clamp(min=0), self.config)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, mask, cos, sin, None)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class A2DQwen3LMHeadModel(A2DQwen3PreTrainedModel):
    """The network with its output layer, and diffusion decoding."""

    model_class: type[A2DQwen3Model] = A2DQwen3Model
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DiffusionQwen3Config) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> MaskedLMOutput:
        """Logits [B, S, V], not moved to the positions they predict. Arguments: the model's."""
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        return MaskedLMOutput(logits=self.lm_head(hidden))

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
