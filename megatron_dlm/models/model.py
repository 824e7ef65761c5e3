"""Student and teacher: Megatron-Core's `GPTModel` over packed rows, ending in hidden states.

S: tokens of a packed row; h: hidden size; V: padded vocabulary; tp: tensor-parallel size.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.models.attention import CachedAttention
from megatron_dlm.models.self_attention import rotation


class DiffusionGPTModel(GPTModel):
    """A `GPTModel` that takes one packed row and returns its final hidden states.

    It differs from its parent in two ways. Rotary angles come from each token's own position,
    since a row holds many documents and, in block diffusion, two streams that share positions. The
    output layer is not applied: logits over the whole row would never fit, so the loss and the
    sampler multiply only the hidden states they need with `head_weight`.

    Attributes:
        num_tokens: Tokens of the vocabulary, without the rows that the embedding is padded with.
        attention_tile: Tokens that the attention kernel works on at a time; 1 where it has none.
        reads_early: Whether the last layer's feed-forward part leaves out tokens that are not read.
    """

    num_tokens: int
    attention_tile: int
    reads_early: bool

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | CachedAttention,
        read: Tensor | None = None,
    ) -> Tensor:
        """Run the layers of this pipeline stage.

        Args:
            input_ids: [1, S] int64, below `num_tokens`; used on the first stage only.
            position_ids: [1, S] int64.
            attention_mask: Layout tensor of a row or of a share of one (`attention_layout`,
                `context_parallel`), or a `CachedAttention`.
            read: [n] int64, the tokens whose final hidden states are wanted; None: all.

        Returns:
            [S, 1, h], normalised on the last stage, or there, where it `leaves_out` tokens,
            [n, 1, h] of those that are read; [S / tp, 1, h] under sequence parallelism.

        Raises:
            RuntimeError: An id is outside the vocabulary; on CUDA raised asynchronously.
        """
        ACTIVITY.step()
        embedded = None
        if self.pre_process:
            # Otherwise the embedding would silently be a padding row, or zero if no rank has the
            # id.
            known = (input_ids >= 0) & (input_ids < self.num_tokens)
            torch._assert_async(known.all(), "token ids outside the vocabulary")
            embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
        return self.decoder(
            hidden_states=embedded,
            attention_mask=attention_mask,
            context_mask=read if self.leaves_out(read) else None,  # see `DiffusionLayer`
            rotary_pos_emb=self._rotation(position_ids[0]),
        )

    def leaves_out(self, read: Tensor | None) -> bool:
        """Whether the last stage returns the tokens that are read alone.

        Kernels are never given no token at all.
        """
        return self.reads_early and self.post_process and read is not None and read.shape[0] > 0

    def _rotation(self, positions: Tensor) -> Tensor:
        """The `rotation` of positions [S]."""
        rotary = self.rotary_pos_emb
        rotary.inv_freq = rotary.inv_freq.to(positions.device)
        angles = torch.outer(positions.to(rotary.inv_freq.dtype), rotary.inv_freq)
        return rotation(angles, self.config.params_dtype)


class ModelChunks(torch.nn.Module):
    """The model chunks of a rank under virtual pipeline stages, as one module.

    Chunk i of stage s has the layers of the i-th round through the pipeline: a row goes through the
    first chunks of all stages, then through the second ones, and so on.

    Args:
        chunks: In the order of their layers, at least one.
    """

    def __init__(self, chunks: Sequence[DiffusionGPTModel]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)

    def sharded_state_dict(self, prefix: str = "", **options: Any) -> dict[str, Any]:
        """Megatron's sharded state of all chunks, whose names in a checkpoint know no chunks.

        Args:
            prefix: Before this rank's names.
            options: For Megatron.
        """
        return {
            f"{prefix}chunks.{number}.{name}": value
            for number, chunk in enumerate(chunks_of(self))
            for name, value in chunk.sharded_state_dict(**options).items()
        }

    @property
    def config(self) -> TransformerConfig:
        """Of all chunks."""
        config: TransformerConfig = chunks_of(self)[0].config
        return config

    @property
    def num_tokens(self) -> int:
        """Tokens of the vocabulary, see `DiffusionGPTModel`."""
        return chunks_of(self)[0].num_tokens

    @property
    def pre_process(self) -> bool:
        """Whether the input embedding is here."""
        return bool(chunks_of(self)[0].pre_process)

    @property
    def post_process(self) -> bool:
        """Whether the output layer is here."""
        return bool(chunks_of(self)[-1].post_process)


StageModel: TypeAlias = DiffusionGPTModel | ModelChunks
"""A rank's part of a model."""


def chunks_of(model: torch.nn.Module) -> list[DiffusionGPTModel]:
    """The model chunks of a rank, in the order of their layers; one without virtual stages.

    Args:
        model: A `StageModel`, or a chunk that is wrapped for training.
    """
    bare = unwrap_model(model)
    chunks = list(bare.chunks) if isinstance(bare, ModelChunks) else [bare]
    return cast(list[DiffusionGPTModel], chunks)


def local_layers(model: torch.nn.Module) -> list[Any]:
    """Megatron's layers of a rank, in their order."""
    return [layer for chunk in chunks_of(model) for layer in chunk.decoder.layers]


def head_weight(model: torch.nn.Module) -> Tensor:
    """This rank's vocabulary shard of the output layer, [V / tp, h]; on the last stage only."""
    bare = chunks_of(model)[-1]
    if bare.share_embeddings_and_output_weights:
        return bare.shared_embedding_or_output_weight()
    weight: Tensor = bare.output_layer.weight
    return weight


def read_hidden_states(model: torch.nn.Module, output: Tensor, read: Tensor) -> Tensor:
    """Hidden states of the tokens that are read, on every tensor-parallel rank, for the head.

    The head is split over the vocabulary, so each rank has a part of the gradient of the hidden
    states: the backward pass sums these parts over the tensor-parallel group.

    Args:
        model: The `DiffusionGPTModel` of the last stage, possibly wrapped for training.
        output: What its `forward` returned, with the same `read`.
        read: [n] int64, tokens of the row.

    Returns:
        [n, h].
    """
    (chunk,) = chunks_of(model)
    if chunk.config.sequence_parallel:
        output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=True)
        return output[read, 0]
    hidden = output[:, 0] if chunk.leaves_out(read) else output[read, 0]
    return copy_to_tensor_model_parallel_region(hidden)
