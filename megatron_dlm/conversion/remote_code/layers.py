"""Layers of a decoder under any attention mask, for plain transformers.

B: sequences; S: tokens of a forward; K: tokens in the cache and S; d: head size; h: hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from megatron_dlm.models.rotary import attention_factor, scaled_frequencies


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(variance + self.variance_epsilon)).to(x.dtype)


def rotary_angles(position_ids: Tensor, config: PretrainedConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions [B, S], times the attention factor, [B, 1, S, d] float32."""
    # Not a buffer: loading through the meta device would leave it without values.
    frequencies = scaled_frequencies(config.rope_parameters, config.rope_theta, config.head_dim)
    angles = position_ids[:, None, :, None].float() * frequencies.to(position_ids.device)
    angles = torch.cat((angles, angles), dim=-1)
    factor = attention_factor(config.rope_parameters)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings to [B, heads, S, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; the config decides on biases and norms of queries and keys."""

    def __init__(self, config: PretrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = d = config.head_dim
        query_size = config.num_attention_heads * d
        key_size = config.num_key_value_heads * d
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, past_key_values: Cache | None
    ) -> Tensor:
        """Attend from x [B, S, h] under mask [B, 1, S, K], true where visible."""
        heads = (*x.shape[:2], -1, self.head_dim)
        query = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        key = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        value = self.v_proj(x).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        key = key.repeat_interleave(self.num_groups, dim=1)
        value = value.repeat_interleave(self.num_groups, dim=1)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(context.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, config: PretrainedConfig, intermediate_size: int | None = None) -> None:
        super().__init__()
        size = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and feed-forward layer, each normalised before and added to its input."""

    mlp_class: type[nn.Module] = MLP

    def __init__(self, config: PretrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = self.mlp_class(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, past_key_values: Cache | None
    ) -> Tensor:
        """[B, S, h] -> [B, S, h]."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cos, sin, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))
