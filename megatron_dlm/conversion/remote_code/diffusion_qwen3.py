"""Qwen3 as a diffusion model, for plain transformers.

Under `block_causal` attention, tokens of a block see each other and all earlier blocks; blocks are
counted from the first token of the sequence, prompt included. Under `full` attention every token
sees every token. Logits at a position predict its own token or, where the config says `shifted`,
the next one; they are returned as the network has them.

B: sequences; S: tokens of a forward; K: tokens in the cache and S; V: vocabulary.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_diffusion_qwen3 import DiffusionQwen3Config
from .qwen3_layers import DecoderLayer, RMSNorm, rotary_angles


class DiffusionQwen3PreTrainedModel(PreTrainedModel):
    """What transformers has to know to load and place the model."""

    config_class: type[DiffusionQwen3Config] = DiffusionQwen3Config
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["DecoderLayer", "MoeDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True


class DiffusionQwen3Model(DiffusionQwen3PreTrainedModel):
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        block_size: int | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the tokens behind those in the cache.

        Args:
            input_ids: [B, S].
            attention_mask: [B, K], zero for padding, which may be on either side; None: no padding.
            past_key_values: Keys and values of earlier tokens, whole blocks; extended in place.
                Full attention has none: keys of a token depend on all tokens behind it.
            use_cache: Whether to make a cache if none is given.
            block_size: Of block-causal attention; default: the config's.
        """
        is_full = self.config.attention_pattern == "full"
        if is_full and past_key_values is not None:
            raise ValueError("past_key_values: full attention has no cache")
        if use_cache and past_key_values is None and not is_full:
            past_key_values = DynamicCache()
        batch, length = input_ids.shape
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, past + length)
        is_token = attention_mask.bool()
        positions = (is_token.cumsum(dim=-1) - 1).clamp(min=0)  # [B, K]
        mask = is_token[:, None, :]  # [B, 1 or S, K]
        if not is_full:
            blocks = positions // (block_size or self.config.block_size)
            mask = mask & (blocks[:, past:, None] >= blocks[:, None, :])
        # Padding sees itself: attention over nothing is not a number.
        mask = mask | torch.eye(past + length, dtype=torch.bool, device=mask.device)[past:]

        x = self.embed_tokens(input_ids)
        cos, sin = rotary_angles(positions[:, past:], self.config)
        for layer in self.layers:
            x = layer(x, mask[:, None], cos, sin, past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values
        )


class DiffusionQwen3LMHeadModel(DiffusionQwen3PreTrainedModel):
    """The network with its output layer."""

    model_class: type[DiffusionQwen3Model] = DiffusionQwen3Model
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DiffusionQwen3Config) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output layer: transformers 4 ties what these two methods return."""
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings."""
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        block_size: int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V], not moved to the positions they predict. Arguments: the model's."""
        outputs = self.model(input_ids, attention_mask, past_key_values, use_cache, block_size)
        return CausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state), past_key_values=outputs.past_key_values
        )
