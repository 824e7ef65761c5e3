"""Memory of a rank by phase and part, in bytes.

A run goes through rollout, teacher, update, optimizer step and save; weights, gradients and
optimizer state stay throughout unless they are offloaded. A phase's peak is what stays and the most
that it adds at once.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_dlm.config import Config
from megatron_dlm.distillation.vocab_parallel_head import (
    CHUNK_BYTES,
    PRODUCT_ELEMENTS,
    whole_tiles,
)
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.models.model_provider import padded_vocab_size
from megatron_dlm.models.token_dispatch import can_gather
from megatron_dlm.planning.activations import kept_in_update, layer_bytes
from megatron_dlm.planning.gpus import Gpu
from megatron_dlm.planning.layouts import Layout
from megatron_dlm.planning.parameters import ModelParts, Parameters, Parts, element_size
from megatron_dlm.planning.workload import Lengths, row_of
from megatron_dlm.rollout.context import MAX_MEMORY_SHARE
from megatron_dlm.rollout.curriculum import responses_in_decoding
from megatron_dlm.rollout.pages import PAGE_SIZE, pages_for
from megatron_dlm.rollout.sampling import MAX_LOGITS

PhaseName = Literal["rollout", "teacher", "update", "optimizer step", "save"]
FP32 = 4


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank, that of its replica with the most.

    Attributes:
        phases: Bytes by phase and part.
        sequences: That its KV cache has room for at once, of the longest; 0 without a cache.
        host: Bytes of the host's memory for copies of a save and for what is offloaded.
        moments: Bytes of Adam's moments among those of the optimizer: the first step makes them.
    """

    phases: dict[PhaseName, dict[str, float]]
    sequences: int
    host: float
    moments: float

    def peak(self, phase: PhaseName) -> float:
        """Bytes of a phase."""
        return sum(self.phases[phase].values())

    def first_peak(self, phase: PhaseName) -> float:
        """Bytes of a phase the first time that a run comes to it."""
        has_moments = phase in ("optimizer step", "save") or not self.phases[phase]["optimizer"]
        return self.peak(phase) - (0.0 if has_moments else self.moments)

    @property
    def fullest(self) -> PhaseName:
        """The phase with the most."""
        return max(self.phases, key=self.peak)

    @property
    def most(self) -> float:
        """Bytes of that phase."""
        return self.peak(self.fullest)


class MemoryModel:
    """Memory of a run's ranks under any layout.

    Args:
        config: Of the run; layouts come with their own.
        student: Its architecture.
        teacher: That of a teacher with weights of its own; None without one.
        lengths: The longest of the run.
    """

    def __init__(
        self, config: Config, student: Architecture, teacher: Architecture | None, lengths: Lengths
    ) -> None:
        self._remote = teacher if config.has_remote_teacher else None
        if config.has_remote_teacher:  # on other GPUs than the student
            teacher = None
        self._student, self._teacher = student, teacher
        self._lengths = lengths
        self._parts = ModelParts(student, config)
        self._teacher_parts = (
            None if teacher is None else ModelParts(teacher, config, is_frozen=True)
        )

    def parameters(self, layout: Layout, stage: int) -> Parameters:
        """The student's parameters on a rank of a pipeline stage."""
        return self._parts.of(layout).stage(stage, layout.pipeline, self._student.num_layers)

    def of(self, config: Config, layout: Layout, gpu: Gpu) -> RankMemory:
        """Memory of the rank that needs most.

        Args:
            config: Of the run, with the layout.
            layout: The layout.
            gpu: Its memory limits the KV cache.
        """
        stages = {0, layout.pipeline // 2, layout.pipeline - 1}
        return max(
            (self.of_stage(config, layout, gpu, stage) for stage in stages), key=lambda m: m.most
        )

    def of_stage(self, config: Config, layout: Layout, gpu: Gpu, stage: int) -> RankMemory:
        """Memory of a rank of a pipeline stage; arguments as of `of`."""
        own, width = self.parameters(layout, stage), element_size(config)
        weights = width * own.all
        gradients = FP32 * own.trained
        optimizer = _optimizer(config, own, layout)
        teacher, head = self._teacher_bytes(config, layout, stage)
        moved = config.distillation.offload_teacher
        idle = 0.0 if config.optimizer.offload_optimizer else gradients + optimizer
        reserve = gpu.reserve_gb * 1e9
        targets = self._targets(config, layout, stage)
        phases: dict[PhaseName, dict[str, float]] = {}
        sequences = 0
        if config.decodes_itself:
            resident = weights + (0 if moved else teacher) + idle + reserve
            passing = self._decoding(config, layout, stage, width)
            cache, sequences = self._cache(config, layout, width, gpu.memory - resident)
            phases["rollout"] = {
                "weights": weights,
                "teacher": 0 if moved else teacher,
                "gradients": gradients if idle else 0,
                "optimizer": optimizer if idle else 0,
                "KV cache": cache,
                "activations": passing,
                "reserve": reserve,
            }
        if config.traits.uses_teacher and not config.has_remote_teacher:
            phases["teacher"] = {
                "weights": weights,
                "teacher": teacher,
                "gradients": gradients if idle else 0,
                "optimizer": optimizer if idle else 0,
                "targets": targets,
                "activations": self._teaching(config, layout, width),
                "reserve": reserve,
            }
        kept, passing, loss = self._update(config, layout, stage, width)
        resident_parts = {
            "weights": weights,
            "teacher": (head if stage == layout.pipeline - 1 else 0) if moved else teacher,
            "gradients": gradients,
            "optimizer": optimizer,
            "targets": targets,
        }
        phases["update"] = {
            **resident_parts,
            "activations": kept + max(0.0, passing - loss),
            "loss": loss,
            "reserve": reserve,
        }
        # Clipping and AdamW write in place.
        phases["optimizer step"] = {**resident_parts, "reserve": reserve}
        host = 0.0
        if config.logging.save is not None:
            phases["save"] = {**resident_parts, "reserve": reserve}
            if config.logging.async_save:
                host += optimizer + weights / layout.dense_copies
        if config.optimizer.offload_optimizer:
            host += optimizer
        moments = optimizer * 8 / _bytes_of_state(config)
        return RankMemory(phases, sequences, host + (teacher if moved else 0.0), moments)

    def _teacher_bytes(self, config: Config, layout: Layout, stage: int) -> tuple[float, float]:
        """Of the teacher's weights, and of its output layer among them."""
        if self._teacher is None or self._teacher_parts is None:
            head = self._remote_head(config, layout, stage)
            return head, head
        parts = self._teacher_parts.of(layout)
        head = (parts.head.all or parts.embedding.all) * element_size(config.of_teacher())
        return frozen_bytes(config, self._teacher, parts, layout, stage), float(head)

    def _remote_head(self, config: Config, layout: Layout, stage: int) -> float:
        """Bytes of the output layer of a teacher elsewhere, whose hidden states it goes with."""
        is_last = stage == layout.pipeline - 1
        if self._remote is None or config.distillation.divergence_top_k or not is_last:
            return 0.0
        vocabulary = padded_vocab_size(self._remote.vocab_size, layout.tensor) / layout.tensor
        return vocabulary * self._remote.hidden_size * element_size(config.of_teacher())

    def _targets(self, config: Config, layout: Layout, stage: int) -> float:
        """The teacher's hidden states at a rollout batch's responses, on the last stage."""
        if self._teacher is None or stage != layout.pipeline - 1:
            return 0.0
        if not config.traits.uses_teacher or config.traits.self_distillation:
            return 0.0
        samples = -(-config.rollout_batch_size // layout.dense_copies)
        width = element_size(config.of_teacher())
        return float(samples * self._lengths.response * self._teacher.hidden_size * width)

    def _cache(self, config: Config, layout: Layout, width: int, free: float) -> tuple[float, int]:
        """Bytes of the KV cache, and the longest sequences that it holds (`rollout.context`)."""
        a, rollout, lengths = self._student, config.rollout, self._lengths
        if config.diffusion_kind is not None and config.diffusion_kind.attention_pattern == "full":
            return 0.0, 0
        block = config.model.block_size
        longest = -(-(lengths.prompt + lengths.response) // block) * block
        # Of this rank: one of each page of the ranks that share sequences.
        pages = pages_for(longest, PAGE_SIZE * layout.sharing(config))
        layers = a.num_layers // layout.pipeline
        token = layers * 2 * a.num_query_groups // layout.tensor * a.kv_channels * width
        samples = -(-responses_in_decoding(config) // layout.decoders(config))
        wanted = pages * min(rollout.max_running_requests, samples)
        if rollout.max_total_tokens is not None:
            wanted = min(wanted, rollout.max_total_tokens // PAGE_SIZE)
        in_memory = int(max(free, 0.0) * MAX_MEMORY_SHARE / (token * PAGE_SIZE))
        # The least that a rollout can run with: one sequence.
        given = max(min(wanted, in_memory), pages)
        return float(given * PAGE_SIZE * token), given // pages

    def _decoding(self, config: Config, layout: Layout, stage: int, width: int) -> float:
        """What passes through a forward of a rollout."""
        rollout, a, block = config.rollout, self._student, config.model.block_size
        samples = -(-responses_in_decoding(config) // layout.decoders(config))
        samples = min(rollout.max_running_requests, samples)
        prompts = min(rollout.chunked_prefill_size, samples * self._lengths.prompt)
        tokens = samples * 2 * block + prompts
        if config.diffusion_kind is not None and config.diffusion_kind.attention_pattern == "full":
            tokens = samples * (self._lengths.prompt + self._lengths.response)
        sharing, together = layout.sharing(config), 0.0
        if sharing > 1:
            # All tokens' queries, keys and values; their contexts twice, for the exchange.
            heads = 3 * a.num_attention_heads + 2 * a.num_query_groups
            together = tokens * heads // layout.tensor * a.kv_channels * width
            tokens = -(-tokens // sharing)
            samples = -(-samples // sharing)  # each rank draws for as many
        layer = tokens * layer_bytes(a, layout, width).forward
        ranks = layout.expert * layout.expert_tensor
        if a.moe_router_topk is not None and can_gather(tokens, ranks, a.moe_router_topk):
            assert a.moe_ffn_hidden_size is not None
            inner = a.moe_ffn_hidden_size // layout.expert_tensor
            copies = tokens * ranks * a.moe_router_topk
            layer = max(layer, copies * (2 * a.hidden_size + 3 * inner) * width)
        logits = 0
        if stage == layout.pipeline - 1:
            drawn = samples * block * padded_vocab_size(a.vocab_size, layout.tensor)
            logits = min(drawn // layout.tensor, MAX_LOGITS) * (FP32 + width)
        hidden = tokens * (3 + sharing - 1) * a.hidden_size * width  # those of all, in the end
        return layer + together + hidden + logits

    def _teaching(self, config: Config, layout: Layout, width: int) -> float:
        """What passes through a forward of the teacher over a row."""
        teacher = self._teacher or self._student
        row, _ = row_of(config, self._lengths)
        tokens = (row.clean if self._teacher is not None else row.tokens) / layout.context
        forward = layer_bytes(teacher, layout, width).forward
        return tokens * (forward + teacher.hidden_size * width)

    def _update(
        self, config: Config, layout: Layout, stage: int, width: int
    ) -> tuple[float, float, float]:
        """What layers keep, what one adds while it goes backward, and the loss's own."""
        a = self._student
        row, texts = row_of(config, self._lengths)
        tokens = row.tokens / layout.context
        kept, passing = kept_in_update(config, a, layout, tokens)
        if layout.context > 1:  # keys and values of all clean tokens, of one layer at a time
            passing += row.clean * 4 * a.num_query_groups // layout.tensor * a.kv_channels * width
        if stage == 0 and config.lora.lora_rank is None:
            # The gradient of the embedding, before it is added to the main one: made last, when
            # nothing that layers kept of this row is left.
            vocabulary = padded_vocab_size(a.vocab_size, layout.tensor) / layout.tensor
            passing = max(passing, (vocabulary + tokens) * a.hidden_size * width - kept)
        rows = -(-config.training.global_batch_size / (layout.replicas * texts) // 1)
        in_flight = min(float(layout.pipeline - stage), max(rows, 1))
        chunks = config.parallel.num_virtual_stages_per_pipeline_rank
        if chunks > 1:  # a share of the layers each: see Megatron's interleaved schedule
            begun = 2 * (layout.pipeline - stage - 1) + (chunks - 1) * layout.pipeline + 1
            in_flight = min(begun / chunks, max(rows, layout.pipeline))
        if stage != layout.pipeline - 1:
            return kept * in_flight, passing, 0.0
        return kept * in_flight, passing, self._loss(config, layout, row.supervised, tokens, width)

    def _loss(
        self, config: Config, layout: Layout, supervised: int, tokens: float, width: int
    ) -> float:
        """Of `distillation.vocab_parallel_head`: gradients of hidden states and head, a chunk."""
        a, n = self._student, supervised / layout.context
        vocabulary = padded_vocab_size(a.vocab_size, layout.tensor) / layout.tensor
        trains_head = config.lora.lora_rank is None
        # The row's hidden states before and after they are gathered, those with a loss, and their
        # gradient.
        hidden = (tokens + tokens + 2 * n) * a.hidden_size * width
        head = FP32 * vocabulary * a.hidden_size if trains_head else 0.0
        short = width if width < FP32 else 0
        chunk = config.distillation.divergence_chunk_size
        if chunk is None:
            chunk = whole_tiles(int(CHUNK_BYTES / (vocabulary * (2 * FP32 + 2 * short))))
        # Logits of the student and of a teacher with a head, while one of them is cast; then the
        # derivative with its cast, and a part of the head's gradient.
        by_head = self._remote is not None and not config.distillation.divergence_top_k
        has_other = self._teacher is not None or by_head
        logits = min(n, chunk) * vocabulary * (FP32 * (1 + has_other) + short)
        product = PRODUCT_ELEMENTS * short if trains_head else 0
        # In the end the head's gradient in its own type.
        last = short * vocabulary * a.hidden_size if trains_head else 0.0
        return hidden + head + max(logits + product, last)


def frozen_bytes(
    config: Config, teacher: Architecture, parts: Parts, layout: Layout, stage: int
) -> float:
    """Bytes of the weights of a teacher with weights of its own, in its precision."""
    whole = parts.stage(stage, layout.pipeline, teacher.num_layers)
    total = float(element_size(config.of_teacher()) * whole.all)
    if config.teacher_precision == "fp8":  # a byte instead of two, and a scale for each output
        total -= parts.layer.all * (teacher.num_layers // layout.pipeline)
    return total


def teacher_rank_bytes(config: Config, teacher: Architecture, lengths: Lengths) -> dict[str, float]:
    """Memory of a rank of `--teacher-ranks` by part, of that with the most.

    Args:
        config: Of the run.
        teacher: Architecture of the teacher.
        lengths: The longest of the run.
    """
    own = config.of_teacher()
    layout, width = Layout.of(own, config.teacher.teacher_ranks), element_size(own)
    parts = ModelParts(teacher, own, is_frozen=True).of(layout)
    stages = {0, layout.pipeline - 1}
    row, _ = row_of(config, lengths)
    vocabulary = padded_vocab_size(teacher.vocab_size, layout.tensor) / layout.tensor
    logits = min(float(CHUNK_BYTES), lengths.response * vocabulary * FP32)
    # Before the logits come, the last hidden states are there in two forms.
    activations = forward_bytes(own, teacher, layout, row.clean, row.clean)
    return {
        "weights": max(frozen_bytes(config, teacher, parts, layout, stage) for stage in stages),
        "activations": activations + row.clean * teacher.hidden_size * width + logits,
    }


def forward_bytes(
    config: Config, model: Architecture, layout: Layout, longest: int, tokens: int
) -> float:
    """Memory of a forward without gradients over rows with a layout, until their hidden states.

    Args:
        config: Of the model.
        model: Its architecture.
        layout: Sizes of the groups.
        longest: Tokens of the longest row.
        tokens: Of all rows whose hidden states are there in the end.
    """
    width, hidden = element_size(config), model.hidden_size
    layer = layer_bytes(model, layout, width).forward
    if not config.parallel.sequence_parallel:  # input, norm and output are not split
        layer += 3 * (hidden - hidden / layout.tensor) * width
    return longest * layer + tokens * hidden * width


def _optimizer(config: Config, own: Parameters, layout: Layout) -> float:
    """Bytes of a rank's optimizer state.

    Adam has two moments and, for bf16, main weights. Distributed, a rank has a share of them:
    dense parameters are shared by all copies of the model, experts by those that hold the same.
    """
    parts = [own.trained_dense, own.trained_experts]
    if config.parallel.use_distributed_optimizer:
        copies = (layout.dense_copies, layout.expert_copies)
        parts = [-(-part // number) for part, number in zip(parts, copies, strict=True)]
    return float(_bytes_of_state(config) * sum(parts))


def _bytes_of_state(config: Config) -> int:
    return 12 if config.model.bf16 else 8
