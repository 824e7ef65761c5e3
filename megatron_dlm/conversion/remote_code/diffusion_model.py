"""A decoder as a diffusion model, for plain transformers.

Under `block_causal` attention, tokens of a block see each other and all earlier blocks; blocks are
counted from the first token of the sequence, prompt included. With a causal context that holds for
blocks with a MASK only: tokens of other blocks see those before them, and their logits predict the
next token, as those of an autoregressive model. Under `full` attention every token sees every
token. Logits at a position predict its own token or, where the config says `shifted`,
the next one; they are returned as the network has them.

B: sequences; S: tokens of a forward; K: tokens in the cache and S; V: vocabulary.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_diffusion import DiffusionConfig
from .layers import DecoderLayer, RMSNorm, rotary_angles

# transformers 5.24 renamed this field of outputs and warns of the older name.
CACHE_FIELD = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)


class DiffusionPreTrainedModel(PreTrainedModel):
    """Attributes that transformers needs to load and place the model."""

    config_class: type[DiffusionConfig] = DiffusionConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["DecoderLayer", "MoeDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True


class DiffusionModel(DiffusionPreTrainedModel):
    """The network without its output layer."""

    layer_class: type[nn.Module] = DecoderLayer

    def __init__(self, config: DiffusionConfig) -> None:
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
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        attention_pattern: str | None = None,
        block_size: int | None = None,
        store_kv: bool = True,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the tokens that follow those in the cache.

        Args:
            input_ids: [B, S].
            attention_mask: [B, K], zero for padding, which may be on either side; None: no padding.
                Or, in place of an attention pattern, a mask for each token, [B, S, K] or [B, 1, S,
                K]: zero where not visible; or a float mask without positive values, which is added
                to the scores.
            position_ids: [B, S]; default: counted from the first token that is no padding.
            past_key_values: Keys and values of earlier tokens, whole blocks; extended in place.
                Not for full attention, where keys depend on later tokens.
            use_cache: Whether to make a cache if none is given.
            attention_pattern: `block_causal` or `full`; default: the config's.
            block_size: For block-causal attention; default: the config's.
            store_kv: Whether keys and values of this forward stay in `past_key_values`.
        """
        if attention_pattern not in (None, "block_causal", "full"):
            problem = f"attention_pattern (={attention_pattern!r}) is unknown"
            raise ValueError(f"{problem}; choose block_causal or full")
        is_full = (attention_pattern or self.config.attention_pattern) == "full"
        if is_full and past_key_values is not None:
            raise ValueError("past_key_values: full attention has no cache")
        if use_cache and past_key_values is None and not is_full:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None or attention_mask.ndim == 2:
            size = None if is_full else block_size or self.config.block_size
            is_causal = attention_pattern is None and self.config.context_attention == "causal"
            mask, positions = self._visibility(input_ids, attention_mask, past, size, is_causal)
        else:
            mask = attention_mask if attention_mask.ndim == 4 else attention_mask[:, None]
            is_added = mask.is_floating_point() and not (mask > 0).any()
            mask = mask.to(self.embed_tokens.weight.dtype) if is_added else mask.bool()
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + past

        x = self.embed_tokens(input_ids)
        cos, sin = rotary_angles(positions if position_ids is None else position_ids, self.config)
        for layer in self.layers:
            x = layer(x, mask, cos, sin, past_key_values)
        if past_key_values is not None and not store_kv:
            past_key_values.crop(-input_ids.shape[1])
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), **{CACHE_FIELD: past_key_values}
        )

    def _visibility(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        past: int,
        block_size: int | None,
        has_causal_context: bool,
    ) -> tuple[Tensor, Tensor]:
        """Mask [B, 1, S, K] and positions [B, S]; block_size None: everything but padding."""
        batch, length = input_ids.shape
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, past + length)
        is_token = attention_mask.bool()
        positions = (is_token.cumsum(dim=-1) - 1).clamp(min=0)  # [B, K]
        mask = is_token[:, None, :]  # [B, 1 or S, K]
        if block_size is not None:
            blocks = positions // block_size
            seen = blocks[:, past:, None] >= blocks[:, None, :]
            if has_causal_context:
                own = blocks[:, past:]
                is_mask = (input_ids == self.config.mask_token_id) & is_token[:, past:]
                masks = own.new_zeros(batch, int(blocks.max()) + 1)
                masks.scatter_add_(1, own, is_mask.long())
                is_noisy = masks.gather(1, own) > 0
                seen &= is_noisy[..., None] | (positions[:, past:, None] >= positions[:, None, :])
            mask = mask & seen
        # Padding sees itself: a softmax over no key would be NaN.
        mask = mask | torch.eye(past + length, dtype=torch.bool, device=mask.device)[past:]
        return mask[:, None], positions[:, past:]


class DiffusionLMHeadModel(DiffusionPreTrainedModel):
    """The network with its output layer."""

    model_class: type[DiffusionModel] = DiffusionModel
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output layer; transformers 4 ties the results of these two methods."""
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings."""
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        attention_pattern: str | None = None,
        block_size: int | None = None,
        store_kv: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V], not moved to the positions that they predict.

        They are predictions where input_ids hold MASK. Tools for autoregressive models pass a clean
        sequence and would compute a meaningless likelihood from its logits: such calls are refused,
        unless the context is causal and they are predictions of the next token.
        To get them anyway, for a prefill or a comparison, pass `attention_pattern`, `block_size` or
        a mask for each token.

        Args:
            labels: Must be None.
            input_ids: As in the model, like all others.
            attention_mask: Likewise.
            position_ids: Likewise.
            past_key_values: Likewise.
            use_cache: Likewise.
            attention_pattern: Likewise.
            block_size: Likewise.
            store_kv: Likewise.

        Raises:
            ValueError: Labels are given, or input_ids hold no MASK and no argument sets the
                visibility.
        """
        has_pattern = attention_pattern is not None or block_size is not None
        has_visibility = attention_mask is not None and attention_mask.ndim > 2
        mask_token_id = self.config.mask_token_id
        is_clean = mask_token_id is None or not (input_ids == mask_token_id).any()
        has_pattern |= self.config.context_attention == "causal"
        if labels is not None or (is_clean and not has_pattern and not has_visibility):
            raise ValueError(
                f"{type(self).__name__} is a diffusion model, which predicts tokens where the "
                f"input holds MASK (id {mask_token_id}): this call, "
                f"{'with `labels`' if labels is not None else 'without any MASK'}, "
                "would give a likelihood that means nothing. Evaluate what `generate` makes "
                "(lm-evaluation-harness: tasks of type generate_until, with a number as "
                "batch_size) and train with megatron-dlm. For the logits of a clean sequence say "
                f"attention_pattern='{self.config.attention_pattern}'."
            )
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            use_cache,
            attention_pattern,
            block_size,
            store_kv,
        )
        return CausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state),
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
        )
