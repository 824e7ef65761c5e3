"""Seconds of each phase, from FLOPs, bytes and the rates of a GPU.

An estimate: how long responses become, how many tokens a forward commits, and the shares of the
rates that are reached are assumptions or measured elsewhere.
"""

from dataclasses import dataclass

from megatron_dlm.accounting.flops import BACKWARD, ForwardFlops, causal_pairs
from megatron_dlm.config import Config
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.planning.gpus import Gpu
from megatron_dlm.planning.layouts import GPUS_PER_NODE, Layout
from megatron_dlm.planning.memory import FP32
from megatron_dlm.planning.parameters import Parameters, element_size
from megatron_dlm.planning.workload import Lengths, row_of

KERNELS_OF_LAYER = 27
KERNELS_OF_MOE_LAYER = 46
KERNELS_OF_STEP = 161
"""Launches of a step of a rollout: of a layer, of one with experts, and of the rest
(benchmarks/results/counts.json)."""


@dataclass(frozen=True)
class PhaseSeconds:
    """Seconds of one update, with its share of the rollout and the teacher before it.

    Attributes:
        rollout: The student's decoding.
        teacher: The teacher's forwards.
        update: Forward and backward passes and what they exchange.
        step: The optimizer's step, and what the distributed one exchanges.
        samples: Of the update.
    """

    rollout: float
    teacher: float
    update: float
    step: float
    samples: int

    @property
    def total(self) -> float:
        """Of the update and everything before it."""
        return self.rollout + self.teacher + self.update + self.step

    @property
    def per_sample(self) -> float:
        """Seconds of the run for each sample: what layouts are compared by."""
        return self.total / self.samples


class TimeModel:
    """Seconds of a run's phases.

    Args:
        student: Architecture of the student.
        teacher: Of the teacher; None without one.
        lengths: In the mean.
        longest: The longest response, which a rollout waits for.
        gpu: Rates.
    """

    def __init__(
        self,
        student: Architecture,
        teacher: Architecture | None,
        lengths: Lengths,
        longest: Lengths,
        gpu: Gpu,
    ) -> None:
        self._student, self._teacher = student, teacher
        self._flops = ForwardFlops.of(student)
        self._teacher_flops = ForwardFlops.of(teacher or student)
        self._lengths, self._longest, self._gpu = lengths, longest, gpu

    def of(self, config: Config, layout: Layout, own: Parameters, sequences: int) -> PhaseSeconds:
        """Seconds of an update.

        Args:
            config: Of the run, with the layout.
            layout: The layout.
            own: The student's parameters on a rank of the first stage.
            sequences: That the KV cache holds at once; 0 without a cache.
        """
        batch = config.training.global_batch_size
        updates = max(1, config.rollout_batch_size // batch * config.training.epochs_per_rollout)
        rollout = teacher = 0.0
        if config.decodes_itself:
            rollout = self._rollout(config, layout, own, sequences) / updates
        if config.traits.uses_teacher and not config.has_remote_teacher:  # that works meanwhile
            teacher = self._teaching(config, layout) / updates
        return PhaseSeconds(
            rollout=rollout,
            teacher=teacher,
            update=self._update(config, layout, own),
            step=self._step(config, layout, own),
            samples=batch,
        )

    def _rate(self, architecture: Architecture) -> float:
        return self._gpu.flops(is_moe=architecture.is_moe)

    def _rollout(self, config: Config, layout: Layout, own: Parameters, sequences: int) -> float:
        """A forward is the reading of weights and keys, or its products, or its launches."""
        a, gpu, width = self._student, self._gpu, element_size(config)
        samples = -(-config.rollout_batch_size // layout.decoders(config))
        at_once = min(samples, config.rollout.max_running_requests)
        full = sequences == 0
        at_once = at_once if full else min(at_once, sequences)
        # All sequences run until the longest has ended; others take the places of those that have.
        steps = self._longest.response / self._lengths.tokens_per_forward
        steps *= max(1.0, samples / at_once * self._lengths.response / self._longest.response)
        length = self._lengths.prompt + self._lengths.response / 2
        # A stage has one group's forward at a time; without as many groups as stages it is idle.
        groups = min(config.rollout.decoding_groups or layout.pipeline, at_once)
        turns, at_once = max(groups, layout.pipeline), -(-at_once // groups)
        tokens = at_once * (length if full else 2 * config.model.block_size)
        pairs = tokens * length
        flops = self._flops.forward(int(tokens), int(pairs), at_once * config.model.block_size)
        layers = a.num_layers // layout.pipeline
        keys = 2 * layers * a.num_query_groups / layout.tensor * a.kv_channels * width
        sharing = layout.sharing(config)  # of tokens, keys and values
        read = width * own.all + (0 if full else at_once * length * keys / sharing)
        kernels = KERNELS_OF_MOE_LAYER if a.is_moe else KERNELS_OF_LAYER
        stage = max(
            flops / (layout.tensor * layout.pipeline * sharing) / self._rate(a),
            read / gpu.bandwidth(gpu.memory_gb_s),
            (layers * kernels + KERNELS_OF_STEP / layout.pipeline) * gpu.launch_us * 1e-6,
        )
        exchanged = layers * self._exchange(layout, tokens / sharing, width, passes=1)
        if sharing > 1:  # two messages: queries, keys and values to all ranks, and results back
            heads = (2 * a.num_attention_heads + 2 * a.num_query_groups) / layout.tensor
            sent = tokens * heads * a.kv_channels * width * (sharing - 1) / sharing
            link = self._link(layout.tensor * layout.context)
            exchanged += layers * (sent / link + 2 * gpu.launch_us * 1e-6)
        return steps * turns * (stage + exchanged)

    def _teaching(self, config: Config, layout: Layout) -> float:
        teacher = self._teacher or self._student
        samples = -(-config.rollout_batch_size // layout.dense_copies)
        row, texts = row_of(config, self._lengths)
        length = self._lengths.prompt + self._lengths.response
        tokens, pairs = samples * length, samples * causal_pairs(length)
        if self._teacher is None and config.traits.self_distillation:
            tokens, pairs = int(samples / texts * row.tokens), int(samples / texts * row.pairs)
        flops = self._teacher_flops.forward(tokens, pairs, 0)
        ranks = layout.tensor * layout.pipeline * layout.context
        exchanged = (
            teacher.num_layers
            / layout.pipeline
            * self._exchange(layout, tokens / layout.context, element_size(config), passes=1)
        )
        return flops / ranks / self._rate(teacher) + exchanged

    def _update(self, config: Config, layout: Layout, own: Parameters) -> float:
        a = self._student
        row, texts = row_of(config, self._lengths)
        rows = max(1.0, config.training.global_batch_size / (layout.replicas * texts))
        passes = 1 + (BACKWARD if config.lora.lora_rank is None else 1)
        again = config.model.recompute_granularity == "full"
        flops = (passes + again) * self._flops.forward(row.tokens, row.pairs, 0)
        flops += passes * self._flops.forward(0, 0, row.supervised)
        if self._teacher is not None and config.traits.uses_teacher:
            flops += self._teacher_flops.forward(0, 0, row.supervised)
        ranks = layout.tensor * layout.pipeline * layout.context
        width = element_size(config)
        exchanged = (
            a.num_layers
            / layout.pipeline
            * self._exchange(layout, row.tokens / layout.context, width, passes=2 + again)
        )
        if layout.context > 1:  # keys and values of clean tokens, and their gradients
            share = 3 * row.clean * 2 * a.num_query_groups / layout.tensor * a.kv_channels * width
            exchanged += (
                a.num_layers / layout.pipeline * share / self._link(layout.tensor * layout.context)
            )
        one = flops / ranks / self._rate(a) + exchanged
        # Filling and draining the pipeline, which virtual stages make shorter.
        chunks = config.parallel.num_virtual_stages_per_pipeline_rank
        seconds = (rows + (layout.pipeline - 1) / chunks) * one
        reduced = 0.0
        for elements, copies in (
            (own.trained_dense, layout.dense_copies),
            (own.trained_experts, layout.expert_copies),
        ):
            if copies > 1:
                reduced += 2 * FP32 * elements * (copies - 1) / copies / self._link(layout.gpus)
        if config.parallel.overlap_grad_reduce:
            reduced = max(0.0, reduced - one * BACKWARD / 3)
        return seconds + reduced

    def _step(self, config: Config, layout: Layout, own: Parameters) -> float:
        """Reads and writes of the state, and the gathering of new weights."""
        gpu = self._gpu
        seconds = 0.0
        for elements, copies in (
            (own.trained_dense, layout.dense_copies),
            (own.trained_experts, layout.expert_copies),
        ):
            share = elements
            if config.parallel.use_distributed_optimizer and copies > 1:
                share = -(-elements // copies)
                seconds += element_size(config) * elements / self._link(layout.gpus)
            seconds += 10 * FP32 * share / gpu.bandwidth(gpu.memory_gb_s)
        return seconds

    def _exchange(self, layout: Layout, tokens: float, width: int, passes: int) -> float:
        """Seconds that a layer exchanges for a row: tensor parallelism, experts on other nodes.

        Experts within a node are in the rate of products.
        """
        h, seconds = self._student.hidden_size, 0.0
        if layout.tensor > 1:  # gathered and scattered twice a pass
            share = (layout.tensor - 1) / layout.tensor
            seconds += passes * 4 * tokens * h * width * share / self._link(layout.tensor)
        ranks = layout.expert * layout.expert_tensor
        if ranks > GPUS_PER_NODE:
            copies = tokens / layout.tensor * (self._student.moe_router_topk or 0)
            share = 1 - GPUS_PER_NODE / ranks
            seconds += passes * 2 * copies * h * width * share / self._link(ranks)
        return seconds

    def _link(self, ranks: int) -> float:
        """Bytes per second between ranks of a group of neighbours of so many."""
        gpu = self._gpu
        within = ranks <= GPUS_PER_NODE
        return gpu.bandwidth(gpu.node_gb_s if within else gpu.network_gb_s)
