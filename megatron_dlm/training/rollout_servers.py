"""Puts together what a run needs to have its rollouts decoded by servers."""

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_dlm.config import Config
from megatron_dlm.config.objective_traits import VISITED
from megatron_dlm.conversion.formats import default_format
from megatron_dlm.conversion.weight_transfer import FolderTransfer, GroupTransfer
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.engine import RolloutEngine
from megatron_dlm.rollout.external.client import RolloutServer
from megatron_dlm.rollout.external.engine import (
    ServerLimits,
    ServerRolloutEngine,
    WeightSender,
)
from megatron_dlm.rollout.external.replay import Replay
from megatron_dlm.rollout.external.settings import described
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.training.inputs import RunInputs
from megatron_dlm.training.student import Student

WEIGHTS_FOLDER = "rollout_weights"
"""Of a run folder: where weights are on their way to servers that read them from a disk."""


def build_server_engine(
    config: Config,
    inputs: RunInputs,
    student: Student,
    generation: GenerationConfig,
    groups: ParallelGroups,
    stop: StopAgreement,
    iteration: Callable[[], int],
) -> ServerRolloutEngine:
    """The engine of `--rollout-engine sglang`, with every server's settings compared; all ranks.

    Args:
        config: Of the run.
        inputs: Of the run.
        student: Whose weights are sent.
        generation: Decoding settings.
        groups: Process groups of the student.
        stop: Agrees with other ranks on an early end.
        iteration: Optimizer updates done.

    Raises:
        UserError: On all ranks: a server is not there, or decodes otherwise than the run.
    """
    options, block_size = config.engine, config.model.block_size
    servers = [
        RolloutServer(
            url.rstrip("/"), options.rollout_engine_timeout_s, options.rollout_engine_retries
        )
        for url in options.rollout_engine_urls
    ]
    longest = config.data.max_prompt_length + config.longest_response
    engine = ServerRolloutEngine(
        servers,
        _weight_sender(config, inputs, student, iteration),
        description=described(
            inputs.architecture,
            generation,
            inputs.special_tokens,
            next(student.model.parameters()).dtype,
        ),
        generation=generation,
        special_tokens=inputs.special_tokens,
        seed=config.data.seed,
        groups=groups,
        limits=ServerLimits(
            concurrency=options.rollout_engine_concurrency,
            longest=-(-longest // block_size) * block_size,
            needs_steps=config.state_selection in VISITED,
            is_on_policy=options.max_rollout_staleness == 0,
        ),
        replay=Replay(
            RolloutEngine(
                student.model,
                generation=replace(generation, temperature=0.0),
                special_tokens=inputs.special_tokens,
                seed=config.data.seed,
                groups=groups,
                stop=stop,
            )
        ),
        stop=stop,
    )
    engine.check()
    return engine


def _weight_sender(
    config: Config, inputs: RunInputs, student: Student, iteration: Callable[[], int]
) -> WeightSender:
    architecture = replace(inputs.architecture, hf_config=inputs.hf_config(config))
    format = default_format(architecture)
    if config.engine.rollout_engine_weights == "distributed":
        return GroupTransfer(student.model, architecture, format, iteration)
    path = config.engine.rollout_engine_weights_path
    if path is None:
        folder = Path(str(config.logging.save)) / WEIGHTS_FOLDER
    else:
        # A folder of this start: what else lies there stays, and other runs may use the place too.
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name)
        folder = Path(path) / f"{WEIGHTS_FOLDER}_{name[0]}"
    return FolderTransfer(
        student.model,
        architecture,
        folder,
        iteration,
        format=format,
        tokenizer_folder=inputs.tokenizer_folder,
        block_size=config.model.block_size,
        mask_token_id=inputs.special_tokens.mask_token_id,
        dynamic_threshold=config.rollout.dynamic_threshold,
    )
