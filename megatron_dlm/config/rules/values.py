"""Rules across values that depend neither on the model nor on the number of processes."""

import importlib.util
import re
from pathlib import Path

from megatron_dlm.config.fields import flag_of, value_of
from megatron_dlm.config.rules import Refusals, divisors, rule
from megatron_dlm.config.schema import Config
from megatron_dlm.errors import bad_value
from megatron_dlm.extras import check_installed
from megatron_dlm.rollout.pages import PAGE_SIZE, pages_for
from megatron_dlm.rollout.strategies import STRATEGIES


@rule("options")
def combinations(config: Config) -> Refusals:
    """Schedules, learning rates, packages and folders go together."""
    model, rollout, parallel = config.model, config.rollout, config.parallel
    strategy, block_size = STRATEGIES[rollout.remasking_strategy], model.block_size
    option = strategy.option
    if option and not strategy.fits_block(value_of(config, option.name), block_size):
        problem = f"does not divide --block-size {block_size}"
        yield f"{option.name}: {problem}; choose {divisors(block_size)}"
    longest = config.data.max_prompt_length + config.longest_response
    longest = -(-longest // block_size) * block_size
    # Each of the ranks that share a sequence has an equal part of its pages.
    ranks = parallel.context_parallel_size if config.shares_tokens_in_rollouts else 1
    needed, room = pages_for(longest, PAGE_SIZE * ranks) * PAGE_SIZE, rollout.max_total_tokens
    if room is not None and room < needed:
        problem = f"has no room for the longest prompt and response, {longest} tokens"
        remedy = f"choose {needed} or more, or lower --max-response-length or --max-prompt-length"
        if parallel.context_parallel_size > ranks:
            remedy += ", or add --rollout-context-parallel tokens"
        yield f"max_total_tokens: {problem}; {remedy}"
    if rollout.response_length_schedule != "constant":
        schedule = f"--response-length-schedule {rollout.response_length_schedule}"
        start, end = rollout.min_response_length, rollout.max_response_length
        if start is None:
            yield f"min_response_length: {schedule} needs a start; choose 1 to {end}"
        elif start > end:
            yield f"min_response_length: is above --max-response-length {end}; choose {end} or less"
        if rollout.response_length_warmup_rollouts < 1:
            yield f"response_length_warmup_rollouts: {schedule} needs some; choose 1 or more"
    yield from learning_rates(config)
    yield from sequence_parallel(config)
    # Only sharded updates are gathered, in the buckets in which gradients are reduced.
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if parallel.overlap_param_gather and not value_of(config, name):
            yield f"overlap_param_gather: needs {flag_of(name)}; add {flag_of(name)}"
    if model.attention_backend == "flex" and not _has_cuda(parallel.device):
        yield "attention_backend: cannot train on CPU; choose sdpa or auto, or use CUDA"
    if model.fp8_format is not None:
        yield from _fp8(config)
    sharing = parallel.expert_model_parallel_size * config.expert_tensor_parallel_size
    if parallel.moe_token_dispatcher_type == "flex" and sharing == 1:
        problem = "flex exchanges tokens between processes that share experts, and there are none"
        remedy = "add --expert-model-parallel-size, or choose alltoall"
        yield f"moe_token_dispatcher_type: {problem}; {remedy}"
    for name, value, package, remedy in (
        ("transformer_impl", "transformer_engine", "transformer_engine", "choose local"),
        ("recompute_modules", "layernorm", "transformer_engine", "leave layernorm out"),
        ("moe_token_dispatcher_type", "flex", "deep_ep", "choose alltoall"),
    ):
        if value in value_of(config, name) and _is_missing(package):
            problem = f"the package {package} is not installed"
            yield f"{name}: {problem}; install it (CUDA only) or {remedy}"
    if config.logging.wandb_project is not None:
        check_installed("wandb", "--wandb-project", config.logging.wandb_project)
    folder = config.logging.save
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        yield "save: is a file; name a folder"
    if not re.fullmatch(r"stop|skip:[1-9]\d{0,8}", config.training.on_divergence):
        yield "on_divergence: is neither stop nor skip:N; choose e.g. skip:3"


def learning_rates(config: Config) -> Refusals:
    """Rates do not rise in a decay, and parameter groups are different ones."""
    optimizer, decays = config.optimizer, config.optimizer.lr_decay_style != "constant"
    if decays and optimizer.min_lr > optimizer.lr:
        remedy = f"choose 0 to {optimizer.lr:g}, or --lr-decay-style constant"
        yield f"min_lr: is above --lr {optimizer.lr:g}; {remedy}"
    if optimizer.param_group_preset is not None and optimizer.param_groups:
        problem = "stands for parameter groups, and --param-groups names others"
        yield f"param_group_preset: {problem}; leave one of the two out"
    patterns = [group.pattern for group in optimizer.param_groups]
    for i, group in enumerate(optimizer.param_groups):
        where, pattern = f"--param-groups[{i}]", group.pattern
        try:
            re.compile(pattern)
        except re.error as error:
            problem = f"is not a regular expression ({error})"
            yield bad_value(f"{where}.pattern", pattern, problem, "escape special characters")
        if pattern in patterns[:i]:
            yield bad_value(f"{where}.pattern", pattern, "is given twice", "merge the two groups")
        lr = optimizer.lr if group.lr is None else group.lr
        min_lr = optimizer.min_lr if group.min_lr is None else group.min_lr
        if decays and min_lr > lr:
            above = f"is above the group's lr {lr:g}"
            yield bad_value(f"{where}.min_lr", min_lr, above, f"choose 0 to {lr:g}")


def _fp8(config: Config) -> Refusals:
    """What multiplies in 8-bit floats is there, and can."""
    model, without = config.model, "or leave --fp8-format out"
    if _is_missing("transformer_engine"):
        problem = "needs the package transformer_engine, which is not installed"
        yield f"fp8_format: {problem}; install it (CUDA only), {without}"
    if model.transformer_impl != "transformer_engine":
        problem = "only layers of Transformer Engine multiply in FP8"
        yield f"fp8_format: {problem}; add --transformer-impl transformer_engine, {without}"
    if not model.bf16:
        yield f"fp8_format: what it leaves out has to be in bfloat16; add --bf16, {without}"
    if model.fp8_recipe == "delayed" and "layernorm" in model.recompute_modules:
        problem = "names layernorm, and --fp8-recipe delayed would count its inputs twice"
        yield f"recompute_modules: {problem}; leave it out, or choose another recipe"
    from megatron_dlm.platform.fp8 import NEEDED, missing, parts_here  # loads PyTorch

    if (here := parts_here(config.parallel.device)) is None:
        yield f"fp8_format: needs a GPU, and this run has none; run it on CUDA, {without}"
    elif lacking := missing(model.fp8_recipe, here):
        others = [name for name in NEEDED if missing(name, here) is None]
        remedy = f"choose {' or '.join(others)}, {without}" if others else "leave --fp8-format out"
        yield f"fp8_recipe: {lacking}; {remedy}"


@rule("inference options")
def sequence_parallel(config: Config) -> Refusals:
    """Sequence parallelism splits over the tensor-parallel processes, so there must be several."""
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        problem = "has nothing to split over with --tensor-model-parallel-size 1"
        yield f"sequence_parallel: {problem}; choose 2 or more, or --no-sequence-parallel"


@rule("inference use")
def context_parallel(config: Config, decodes: bool) -> Refusals:
    """Without training, ranks share nothing but sequences in decoding."""
    if config.parallel.context_parallel_size > 1 and not config.shares_tokens_in_rollouts:
        problem = "shares the rows of training, and this trains nothing"
        remedy = "leave it out: all replicas share the texts"
        if decodes:
            remedy += ", or add --rollout-context-parallel tokens for texts too long for one"
        yield f"context_parallel_size: {problem}; {remedy}"
    is_one = config.parallel.context_parallel_size == 1
    if is_one and config.rollout.rollout_context_parallel == "tokens":
        problem = "needs several processes that share a sequence"
        yield f"rollout_context_parallel: {problem}; add --context-parallel-size 2, or drop it"


def _has_cuda(device: str) -> bool:
    """Whether the run is on CUDA; FlexAttention has no backward pass on CPU."""
    import torch

    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


@rule("length")
def length(config: Config) -> Refusals:
    """Schedules fit into the run; epochs of data that are not read yet give a length of 0."""
    rollout, rollouts, decay = config.rollout, config.num_rollouts, config.lr_decay_iters
    if 0 < (updates := config.train_iters) < config.objective.attention_annealing_iters:
        problem = f"the run ends after {updates} updates, before attention is full"
        yield f"attention_annealing_iters: {problem}; choose {updates} or fewer"
    if rollout.dynamic_threshold_schedule != "constant":
        if rollout.final_dynamic_threshold is None:
            schedule = f"--dynamic-threshold-schedule {rollout.dynamic_threshold_schedule}"
            yield f"final_dynamic_threshold: {schedule} needs an end; choose e.g. 0.7"
        if 0 < rollouts <= rollout.dynamic_threshold_hold_rollouts:
            problem = f"leaves none of the {rollouts} rollouts for the schedule"
            yield f"dynamic_threshold_hold_rollouts: {problem}; choose less than {rollouts}"
    warmup, fraction = config.optimizer.lr_warmup_iters, config.optimizer.lr_warmup_fraction
    if fraction is not None and warmup and decay:
        problem = f"--lr-warmup-iters {warmup} is given too"
        yield f"lr_warmup_fraction: {problem}; leave one of the two out"
    if config.lr_warmup_iters >= decay > 0:
        problem = f"is not below the end of the decay at step {decay}"
        if fraction is not None:
            yield f"lr_warmup_fraction: {problem}; choose less than 1"
        yield f"lr_warmup_iters: {problem}; choose 0 to {decay - 1}, or a larger --lr-decay-iters"
