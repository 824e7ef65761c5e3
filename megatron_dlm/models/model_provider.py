"""Builds the student and the teacher from an architecture and the run's options."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megatron_dlm import platform
from megatron_dlm.config.schema import Config
from megatron_dlm.megatron_internals import has_fused_rotary, spec_submodules
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.models.attention import FLEX_TILE, DiffusionAttention
from megatron_dlm.models.fp8 import check_fp8_sizes
from megatron_dlm.models.layer import DiffusionLayer
from megatron_dlm.models.lora_layers import LoRAColumnParallelLinear, LoRARowParallelLinear
from megatron_dlm.models.model import DiffusionGPTModel, ModelChunks, StageModel
from megatron_dlm.models.moe_layer import GroupedMoELayer
from megatron_dlm.models.rms_norm import RMSNorm
from megatron_dlm.models.rotary import attention_factor, scaled_frequencies
from megatron_dlm.models.self_attention import RotatedSelfAttention
from megatron_dlm.models.swiglu import SwiGLU

# The padded vocabulary is a multiple of this, as in Megatron: checkpoints then keep their shape
# when the tensor-parallel size changes.
VOCABULARY_MULTIPLE = 128


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding table: a multiple of 128 and of the tensor-parallel size."""
    for multiple in (VOCABULARY_MULTIPLE, tensor_model_parallel_size):
        vocab_size = -(-vocab_size // multiple) * multiple
    return vocab_size


def virtual_stages(config: Config) -> int | None:
    """Model chunks of a rank as Megatron counts them; None: all of its layers are one."""
    chunks = config.parallel.num_virtual_stages_per_pipeline_rank
    return chunks if chunks > 1 else None


def transformer_config(architecture: Architecture, config: Config) -> TransformerConfig:
    """Megatron's view of an architecture under the run's parallelism and precision."""
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    moe: dict[str, Any] = {}
    if architecture.is_moe:
        moe = dict(
            num_moe_experts=architecture.num_moe_experts,
            moe_router_topk=architecture.moe_router_topk,
            moe_ffn_hidden_size=architecture.moe_ffn_hidden_size,
            # softmax over the chosen experts = softmax over all of them, renormalised
            moe_router_pre_softmax=not architecture.norm_topk_prob,
            moe_router_dtype="fp32",
            # no balancing loss in distillation: the router is trained by the divergence
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            # a dense model (a teacher beside a student with experts) has no expert parallelism
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            moe_flex_dispatcher_backend="deepep",
            # Transformer Engine's kernels; `GroupedMoELayer` has its own.
            moe_grouped_gemm=model.transformer_impl == "transformer_engine",
            moe_permute_fusion=model.transformer_impl == "transformer_engine",
        )
    recompute: dict[str, Any] = {}
    if model.recompute_granularity != "none":
        recompute["recompute_granularity"] = model.recompute_granularity
    if model.recompute_granularity == "selective":
        recompute["recompute_modules"] = list(model.recompute_modules)
    if model.recompute_granularity == "full":
        recompute["recompute_method"] = model.recompute_method
        recompute["recompute_num_layers"] = model.recompute_num_layers
    if model.fp8_format is not None:
        check_fp8_sizes(architecture, config)
    std = model.init_method_std or architecture.initializer_range
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        softmax_scale=_softmax_scale(architecture),
        qk_layernorm=architecture.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=std,
        embedding_init_method_std=std,
        use_cpu_initialization=not platform.is_cuda(),
        perform_initialization=platform.device().type != "meta",  # where there are no values
        bf16=model.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        fp8=model.fp8_format,
        fp8_recipe=model.fp8_recipe,
        # Fused kernels need Apex or Transformer Engine; those that Megatron-Core brings itself are
        # compiled at run time, which a CPU gains nothing from.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=platform.is_cuda(),
        # That of the layer spec, which is ours.
        use_te_activation_func=model.transformer_impl == "local" and not platform.is_cuda(),
        apply_rope_fusion=platform.is_cuda() and has_fused_rotary(),
        persist_layer_norm=False,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(config),
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1,  # rows differ in length
        # Batched, two messages between the same two virtual stages would be taken for each other.
        batch_p2p_comm=platform.is_cuda() and virtual_stages(config) is None,
        moe_token_dispatcher_type=parallel.moe_token_dispatcher_type,
        calculate_per_token_loss=True,
        **moe,
        **recompute,
    )


def _softmax_scale(architecture: Architecture) -> float | None:
    """Factor on attention scores; None: 1 / sqrt(size of a head).

    A scaled rotary embedding may multiply both queries and keys by a factor.
    """
    factor = attention_factor(architecture.rope_scaling)
    return None if factor == 1.0 else factor**2 / architecture.kv_channels**0.5


def _layer_spec(
    config: TransformerConfig, transformer_impl: str, attention_backend: str, chunk: int | None
) -> TransformerBlockSubmodules:
    if transformer_impl == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=True,
            qk_layernorm=config.qk_layernorm,
        )
        from megatron.core.extensions.transformer_engine import TENorm

        layer_norm = TENorm
    else:
        layer = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=False,
            qk_layernorm=config.qk_layernorm,
            normalization="RMSNorm",
        )
        layer_norm = RMSNorm
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
            layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
        _make_adaptable(layer.submodules.self_attention.submodules)
        if config.num_moe_experts is None:
            _make_adaptable(spec_submodules(layer.submodules.mlp))
            spec_submodules(layer.submodules.mlp).activation_func = SwiGLU
        else:
            layer.submodules.mlp = GroupedMoELayer
    layer.module = DiffusionLayer
    layer.submodules.self_attention.module = RotatedSelfAttention
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=DiffusionAttention, params={"backend": attention_backend}
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, chunk), layer_norm=layer_norm
    )


def _make_adaptable(submodules: Any) -> None:
    """Replace the linear layers of an attention or feed-forward spec by those with adapters."""
    replacement = {
        ColumnParallelLinear: LoRAColumnParallelLinear,
        RowParallelLinear: LoRARowParallelLinear,
    }
    for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
        if hasattr(submodules, name):
            setattr(submodules, name, replacement[getattr(submodules, name)])


def attention_backend(config: Config) -> str:
    """The attention backend: the chosen one, by default FlexAttention on CUDA, else SDPA."""
    if config.model.attention_backend != "auto":
        return config.model.attention_backend
    return "flex" if platform.is_cuda() else "sdpa"


def build_model(architecture: Architecture, config: Config) -> StageModel:
    """Build this rank's part of a model, with random weights, on the platform's device.

    Args:
        architecture: What to build.
        config: Parallelism, precision, kernels. Model-parallel groups must exist.
    """
    megatron_config = transformer_config(architecture, config)
    chunks = virtual_stages(config)
    if chunks is None:
        return _build_chunk(architecture, config, megatron_config, None)
    return ModelChunks(
        [_build_chunk(architecture, config, megatron_config, chunk) for chunk in range(chunks)]
    )


def _build_chunk(
    architecture: Architecture,
    config: Config,
    megatron_config: TransformerConfig,
    chunk: int | None,
) -> DiffusionGPTModel:
    """Build one model chunk of this rank; without virtual stages (None), all that it has."""
    stage: dict[str, Any] = dict(ignore_virtual=chunk is None, vp_stage=chunk)
    with platform.device():
        model = DiffusionGPTModel(
            config=megatron_config,
            transformer_layer_spec=_layer_spec(
                megatron_config, config.model.transformer_impl, attention_backend(config), chunk
            ),
            vocab_size=padded_vocab_size(
                architecture.vocab_size, config.parallel.tensor_model_parallel_size
            ),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rotary_base,
            vp_stage=chunk,
        )
    model.num_tokens = architecture.vocab_size
    model.attention_tile = FLEX_TILE if attention_backend(config) == "flex" else 1
    # Where ranks have parts of a row, equal parts of all rows, or whole tiles, they keep them.
    model.reads_early = not (
        megatron_config.sequence_parallel or architecture.is_moe or megatron_config.fp8
    )
    if architecture.rope_scaling is not None:
        model.rotary_pos_emb.inv_freq = scaled_frequencies(
            architecture.rope_scaling, architecture.rotary_base, architecture.kv_channels
        )
    return model


def build_frozen_model(architecture: Architecture, config: Config) -> StageModel:
    """Build a frozen model: evaluation mode, no gradients or FP8, outside DDP and the optimizer."""
    model = build_model(architecture, config.changed(fp8_format=None))
    model.requires_grad_(False)
    model.eval()
    return model
