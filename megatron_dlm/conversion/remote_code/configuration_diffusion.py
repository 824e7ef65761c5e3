"""Configuration of a diffusion model that has the layers of a dense decoder."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

# Defaults of model types that are decoded by blocks, and of those with a causal context.
BY_BLOCKS = {"block_size": 4, "attention_pattern": "block_causal"}
TWO_MODES = {**BY_BLOCKS, "context_attention": "causal"}


class DiffusionConfig(PretrainedConfig):
    """Fields of the network, and those of diffusion.

    Args:
        block_size: Tokens that are denoised together; blocks are counted from the first token.
            None: a response is denoised as a whole.
        mask_token_id: Id that stands for a token not decoded yet; needed to generate.
        qk_norm: Whether queries and keys are normalised before they are rotated.
        qkv_bias: Whether the projections to queries, keys and values have biases.
        rope_theta: Base of the rotary embeddings, if `rope_parameters` has none.
        rope_parameters: Base and scaling, as in transformers 5; `rope_type` is `default`, `llama3`
            or `yarn`.
        rope_scaling: The same under its older name; used if it is not empty.
        attention_pattern: `full`: every token sees every token; `block_causal`: it sees its own
            block and those before.
        shifted: Whether logits at position i predict token i + 1 instead of token i.
        context_attention: Under `block_causal`, what tokens of finished blocks see of each other:
            all of their block (`block_causal`), or only earlier tokens (`causal`). With a causal
            context, logits at a token of a finished block are those of the next one, and the model
            decodes token by token too.
        num_diffusion_steps: Default denoising steps of `generate`; None: one for each token.
    """

    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    # transformers 4 copies the code of classes with this attribute when it saves them.
    _auto_class = "AutoConfig"

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 22016,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 32,
        head_dim: int = 128,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        qk_norm: bool = True,
        qkv_bias: bool = False,
        rope_theta: float = 1000000.0,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        block_size: int | None = None,
        mask_token_id: int | None = None,
        attention_pattern: str = "full",
        shifted: bool = False,
        context_attention: str = "block_causal",
        num_diffusion_steps: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        # Under all names, since readers use different ones.
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
        self.rope_parameters |= rope_scaling or rope_parameters or {}
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in ("default", "llama3", "yarn"):
            raise ValueError(f"rope_type {rope_type} is not supported")
        self.rope_theta = self.rope_parameters["rope_theta"]
        if not hasattr(PretrainedConfig, "rope_scaling"):  # transformers 5 has it as a property
            self.rope_scaling = None if rope_type == "default" else dict(self.rope_parameters)
        self.use_cache = use_cache
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.attention_pattern = attention_pattern
        self.shifted = shifted
        self.context_attention = context_attention
        self.num_diffusion_steps = num_diffusion_steps
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )
        # transformers 5 does not set these in its own class.
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
