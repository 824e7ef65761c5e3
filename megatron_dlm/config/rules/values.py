"""Rules across values that depend neither on the model nor on the number of processes."""

import importlib.util
import re
from pathlib import Path

from megatron_dlm.config.fields import flag_of, value_of
from megatron_dlm.config.rules import Refusals, divisors, fp8
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import bad_value
from megatron_dlm.extras import check_installed
from megatron_dlm.rollout.pages import PAGE_SIZE, pages_for
from megatron_dlm.rollout.strategies import STRATEGIES


def combinations(config: Config) -> Refusals:
    """Schedules, learning rates, packages and folders go together."""
    model, rollout, optimizer = config.model, config.rollout, config.optimizer
    option = STRATEGIES[rollout.remasking_strategy].option
    fits = STRATEGIES[rollout.remasking_strategy].fits_block
    if option is not None and not fits(value_of(config, option.name), model.block_size):
        problem = f"does not divide --block-size {model.block_size}"
        yield f"{option.name}: {problem}; choose {divisors(model.block_size)}"
    longest = config.data.max_prompt_length + config.longest_response
    longest = -(-longest // model.block_size) * model.block_size
    needed, room = pages_for(longest) * PAGE_SIZE, rollout.max_total_tokens
    if room is not None and room < needed:
        yield (
            f"max_total_tokens: has no room for the longest prompt and response, {longest} tokens; "
            f"choose {needed} or more, or lower --max-response-length or --max-prompt-length"
        )
    if rollout.response_length_schedule != "constant":
        start, end = rollout.min_response_length, rollout.max_response_length
        schedule = f"--response-length-schedule {rollout.response_length_schedule}"
        if start is None:
            yield f"min_response_length: {schedule} needs a start; choose 1 to {end}"
        elif start > end:
            problem = f"is above --max-response-length {end}"
            yield f"min_response_length: {problem}; choose {end} or less"
        if rollout.response_length_warmup_rollouts < 1:
            yield (
                f"response_length_warmup_rollouts: {schedule} needs a duration; "
                "choose 1 or more, or the schedule constant"
            )
    decays, peak = optimizer.lr_decay_style != "constant", optimizer.lr
    if decays and optimizer.min_lr > peak:
        remedy = f"choose 0 to {peak:g}, or --lr-decay-style constant"
        yield f"min_lr: is above --lr {peak:g}; {remedy}"
    if optimizer.param_group_preset is not None and optimizer.param_groups:
        problem = "stands for parameter groups, and --param-groups names others"
        yield f"param_group_preset: {problem}; leave one of the two out"
    patterns = [group.pattern for group in optimizer.param_groups]
    for i, group in enumerate(optimizer.param_groups):
        where = f"{flag_of('param_groups')}[{i}]"
        try:
            re.compile(group.pattern)
        except re.error as error:
            problem = f"is not a regular expression ({error})"
            remedy = "escape special characters with a backslash"
            yield bad_value(f"{where}.pattern", group.pattern, problem, remedy)
        if group.pattern in patterns[:i]:
            problem, remedy = "is given twice", "merge the two groups"
            yield bad_value(f"{where}.pattern", group.pattern, problem, remedy)
        lr = peak if group.lr is None else group.lr
        min_lr = optimizer.min_lr if group.min_lr is None else group.min_lr
        if decays and min_lr > lr:
            problem, remedy = f"is above the group's lr {lr:g}", f"choose 0 to {lr:g}"
            yield bad_value(f"{where}.min_lr", min_lr, problem, remedy)
    yield from sequence_parallel(config)
    # Only sharded updates are gathered, in the buckets in which gradients are reduced.
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if config.parallel.overlap_param_gather and not value_of(config, name):
            yield f"overlap_param_gather: needs {flag_of(name)}; add {flag_of(name)}"
    if model.attention_backend == "flex" and not _has_cuda(config.parallel.device):
        yield "attention_backend: cannot train on CPU; choose sdpa or auto, or use CUDA"
    if model.transformer_impl == "transformer_engine" and _is_missing("transformer_engine"):
        problem = "the package transformer_engine is not installed"
        yield f"transformer_impl: {problem}; install it (CUDA only) or choose local"
    if (lacking := fp8.refusal(config)) is not None:
        yield lacking
    if "layernorm" in model.recompute_modules and _is_missing("transformer_engine"):
        problem = "layernorm needs the package transformer_engine, which is not installed"
        yield f"recompute_modules: {problem}; install it (CUDA only) or leave layernorm out"
    if config.parallel.moe_token_dispatcher_type == "flex" and _is_missing("deep_ep"):
        problem = "the package deep_ep is not installed"
        yield f"moe_token_dispatcher_type: {problem}; install DeepEP (CUDA only) or choose alltoall"
    if config.logging.wandb_project is not None:
        check_installed("wandb", "--wandb-project", config.logging.wandb_project)
    folder = config.logging.save
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        yield "save: is a file; name a folder"
    on_divergence = config.training.on_divergence
    if on_divergence != "stop" and re.fullmatch(r"skip:[1-9]\d{0,8}", on_divergence) is None:
        yield "on_divergence: is neither stop nor skip:N; choose e.g. skip:3"


def sequence_parallel(config: Config) -> Refusals:
    """Sequence parallelism splits over the tensor-parallel processes, so there must be several."""
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        yield (
            "sequence_parallel: has nothing to split over with --tensor-model-parallel-size 1; "
            "write --no-sequence-parallel or choose a tensor-parallel size of 2 or more"
        )


def context_parallel(config: Config) -> Refusals:
    """Only rows of training are shared by ranks."""
    if config.parallel.context_parallel_size > 1:
        problem = "shares the rows of training, and this trains nothing"
        yield f"context_parallel_size: {problem}; leave it out: all replicas share the texts"


def _has_cuda(device: str) -> bool:
    """Whether the run is on CUDA; FlexAttention has no backward pass on CPU."""
    import torch

    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def length(config: Config) -> Refusals:
    """Schedules fit into the run; epochs of data that are not read yet give a length of 0."""
    rollout, rollouts, decay = config.rollout, config.num_rollouts, config.lr_decay_iters
    if rollout.dynamic_threshold_schedule != "constant":
        hold = rollout.dynamic_threshold_hold_rollouts
        if rollout.final_dynamic_threshold is None:
            schedule = f"--dynamic-threshold-schedule {rollout.dynamic_threshold_schedule}"
            yield f"final_dynamic_threshold: {schedule} needs an end; choose e.g. 0.7"
        if 0 < rollouts <= hold:
            problem = f"leaves none of the {rollouts} rollouts for the schedule"
            yield f"dynamic_threshold_hold_rollouts: {problem}; choose less than {rollouts}"
    warmup, by_fraction = config.optimizer.lr_warmup_iters, config.optimizer.lr_warmup_fraction
    if by_fraction is not None and warmup and decay:
        problem = f"--lr-warmup-iters {warmup} is given too"
        yield f"lr_warmup_fraction: {problem}; leave one of the two out"
    if config.lr_warmup_iters >= decay > 0:
        problem = f"is not below the end of the decay at step {decay}"
        if by_fraction is not None:
            yield f"lr_warmup_fraction: {problem}; choose less than 1"
        remedy = f"choose 0 to {decay - 1}, or a larger --lr-decay-iters"
        yield f"lr_warmup_iters: {problem}; {remedy}"
