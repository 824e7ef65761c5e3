"""The student as it is trained: model, Megatron's DDP, optimizer and schedule."""

from dataclasses import dataclass

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from megatron_dlm.config.schema import Config
from megatron_dlm.models.model import StageModel, chunks_of
from megatron_dlm.training.optimizer import build_optimizer, build_scheduler


@dataclass
class Student:
    """What one optimizer update needs.

    Attributes:
        model: This rank's part, bare; rollouts run it.
        ddp: Its chunks, one without virtual stages, wrapped in Megatron's
            `DistributedDataParallel`; training runs them.
        optimizer: Megatron's optimizer of its parameters.
        scheduler: Megatron's learning-rate schedule.
    """

    model: StageModel
    ddp: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def gather_weights(self) -> None:
        """Make the weights whole on all ranks, before anything but the next update reads them.

        With `--overlap-param-gather` an update leaves each rank with its own shard of the new
        weights; the next forward in training gathers the rest. All ranks call this.
        """
        for chunk in self.ddp:
            if chunk.use_forward_hook:
                chunk.start_param_sync(force_sync=True)


def build_student(model: StageModel, config: Config) -> Student:
    """Wrap a model, whose weights are loaded, for training.

    Raises:
        UserError: A parameter group matches nothing (see `optimizer.check_groups`).
    """
    megatron_config = get_model_config(model)
    ddp = [
        DistributedDataParallel(
            config=megatron_config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=config.parallel.overlap_grad_reduce,
                overlap_param_gather=config.parallel.overlap_param_gather,
                use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            ),
            module=chunk,
        )
        for chunk in chunks_of(model)
    ]
    if torch.distributed.get_world_size() > 1:
        for chunk in ddp:
            chunk.broadcast_params()
    megatron_config.finalize_model_grads_func = finalize_model_grads
    megatron_config.no_sync_func = None
    if config.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in ddp]
        megatron_config.no_sync_func = no_sync if len(ddp) > 1 else no_sync[0]
    optimizer = build_optimizer(config, model, ddp)
    megatron_config.grad_scale_func = optimizer.scale_loss
    return Student(model, ddp, optimizer, build_scheduler(config, optimizer))
