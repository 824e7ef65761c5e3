"""Activations of a rank: what a layer keeps for its backward pass, and what passes through it.

Counted from the tensors that the layers of this package keep (`models`), with FlexAttention and
PyTorch's norms, as on CUDA; tests compare the sums with tensors that the real code keeps.

Sizes are those of a rank under sequence parallelism: a hidden state is split over its
tensor-parallel group, and so are heads and feed-forward units.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_dlm.config import Config
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.planning.layouts import Layout
from megatron_dlm.planning.parameters import element_size


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of a layer for each token of a row.

    Attributes:
        inputs: Of its input, all that full recomputation keeps.
        kept: Of everything that its backward pass needs.
        passing: At most at once on top of what is kept, in the backward pass.
        forward: At most at once in a forward pass without gradients.
    """

    inputs: float
    kept: float
    passing: float
    forward: float


def layer_bytes(
    architecture: Architecture,
    layout: Layout,
    width: int,
    *,
    recomputed: Collection[str] = (),
    on_cpu: bool = False,
) -> LayerBytes:
    """Activations of a layer.

    Args:
        architecture: Of the model.
        layout: Sizes of the groups; under tensor parallelism with sequence parallelism.
        width: Bytes of an element.
        recomputed: Parts that are computed again instead of kept, by Megatron's names: core_attn,
            layernorm, mlp, moe, and moe_act, which this package does not have.
        on_cpu: Whether the CPU computes: its attention copies documents out of a row and back, and
            nothing is fused.
    """
    a, tensor = architecture, layout.tensor
    hidden = a.hidden_size / tensor
    head = a.kv_channels
    queries, keys = a.num_attention_heads * head / tensor, a.num_query_groups * head / tensor
    norm = 0 if "layernorm" in recomputed else hidden
    # Input, its norm, the fused projection; with norms of queries and keys, their input and output.
    attention = hidden + norm + queries + 2 * keys
    attention += 2 * queries + keys if a.qk_norm else queries + keys
    # The context as the kernel returned it, and laid out for the projection.
    attention += queries if "core_attn" in recomputed else 2 * queries
    if on_cpu and "core_attn" not in recomputed:
        attention += 2 * queries + 2 * keys
    attention_passing = 3 * queries + 4 * keys + 2 * hidden
    if a.is_moe:
        assert a.moe_router_topk is not None
        assert a.moe_ffn_hidden_size is not None
        assert a.num_moe_experts is not None
        copies = a.moe_router_topk / tensor * layout.expert_tensor
        inner = a.moe_ffn_hidden_size / layout.expert_tensor
        # The router works in float32.
        router = (hidden * 4 + 4 * a.num_moe_experts / tensor * 4) / width
        feed_forward = hidden + norm
        if "moe" not in recomputed:
            acted = 0 if "moe_act" in recomputed else inner
            acted += inner if on_cpu else 0
            feed_forward += router + copies * (a.hidden_size + 2 * inner + acted)
        passing = copies * (3 * a.hidden_size + 2 * inner) + 2 * hidden
        forward = copies * (4 * a.hidden_size + 3 * inner) + 3 * hidden
    else:
        inner = a.ffn_hidden_size / tensor
        feed_forward = hidden + norm
        if "mlp" not in recomputed:
            feed_forward += (3 + on_cpu) * inner
        passing = 3 * inner + 2 * hidden + a.hidden_size * (tensor > 1)
        forward = 3 * inner + 3 * hidden + a.hidden_size * (tensor > 1)
    return LayerBytes(
        inputs=hidden * width,
        kept=(attention + feed_forward) * width,
        passing=max(passing, attention_passing) * width,
        forward=max(forward, 4 * queries + 4 * keys + 3 * hidden) * width,
    )


def recomputed_parts(config: Config) -> tuple[str, ...]:
    """Parts of a layer that selective recomputation computes again."""
    model = config.model
    return model.recompute_modules if model.recompute_granularity == "selective" else ()


def kept_in_update(
    config: Config, architecture: Architecture, layout: Layout, tokens: float
) -> tuple[float, float]:
    """Bytes that a stage's layers keep of a row, and on top while one of them goes backward.

    Args:
        config: Of the run.
        architecture: Of the student.
        layout: Sizes of the groups.
        tokens: Of a row, on a rank of its context-parallel group.
    """
    layers = architecture.num_layers // layout.pipeline
    one = layer_bytes(
        architecture,
        layout,
        element_size(config),
        recomputed=recomputed_parts(config),
        on_cpu=config.parallel.device == "cpu",
    )
    model = config.model
    if model.recompute_granularity != "full":
        return tokens * layers * one.kept, tokens * one.passing
    again = model.recompute_num_layers
    if model.recompute_method == "uniform":
        chunks = -(-layers // again)
        return tokens * chunks * one.inputs, tokens * (again * one.kept + one.passing)
    kept = again * one.inputs + (layers - again) * one.kept
    return tokens * kept, tokens * ((again > 0) * one.kept + one.passing)
