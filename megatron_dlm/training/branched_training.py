"""Branched training: runs from one checkpoint that differ in the batch size only.

RND1 section 3.3, after McCandlish et al. (2018) and Merrill et al. (2025): equal token budgets,
learning rates proportional to the square root of the batch size, warm-up and decay aligned in
tokens. The batch size from which on the final loss gets worse is the critical one.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.config import Config
from megatron_dlm.config.fields import plain_value
from megatron_dlm.config.rules.usage import is_used
from megatron_dlm.errors import bad_value
from megatron_dlm.training.model_source import open_model_source
from megatron_dlm.training.run_folder import latest_iteration

SMOOTHED_PART = 0.1
"""Last part of a branch, over which the training loss is averaged."""


@dataclass(frozen=True)
class Branch:
    """One run of a study.

    Attributes:
        batch_size: Windows per update.
        config: Initial configuration of the run.
    """

    batch_size: int
    config: Config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(str(self.config.logging.save))

    @property
    def is_finished(self) -> bool:
        """Whether its last checkpoint is there."""
        return latest_iteration(self.folder) == self.config.train_iters


def plan_branches(
    base: Config, *, load: str, save: str, batch_sizes: Sequence[int], token_budget: int
) -> list[Branch]:
    """The branches of a study, smallest batch first.

    Args:
        base: A run on a corpus; its rates belong to its own batch size.
        load: Checkpoint that all start from.
        save: Folder of the study.
        batch_sizes: Windows per update of each branch.
        token_budget: Tokens of each branch.

    Raises:
        UserError: There is no such checkpoint, or the budget or the held-out data cannot be divided
            into whole batches.
    """
    if base.response_source != "corpus":
        raise bad_value(
            "--training-config",
            base.objective.objective,
            "does not train on a corpus, so that batches have no fixed number of tokens",
            "give a run with --data-path",
        )
    if not batch_sizes or len(set(batch_sizes)) < len(batch_sizes) or min(batch_sizes) < 1:
        raise bad_value(
            "--batch-sizes", list(batch_sizes), "are not different sizes", "give e.g. 8,16,32"
        )
    sizes = sorted(batch_sizes)
    unit = math.lcm(*sizes) * base.data.seq_length
    if token_budget < unit or token_budget % unit:
        raise bad_value(
            "--token-budget",
            token_budget,
            f"is no whole number of batches of {', '.join(map(str, sizes))} windows of "
            f"{base.data.seq_length} tokens",
            f"choose a multiple of {unit}",
        )
    # Stated, as the branches do without the preset that it may follow from.
    converts = base.traits.diffusion_kind is not None
    converts = converts and open_model_source(load, "--load").is_autoregressive
    start = {
        "load": load,
        "finetune": True,
        "mask_embedding_init": base.mask_embedding_init if converts else None,
    }
    return [_branch(base, start, save, size, token_budget) for size in sizes]


def _branch(
    base: Config, start: dict[str, Any], save: str, batch_size: int, token_budget: int
) -> Branch:
    ratio = batch_size / base.training.global_batch_size
    optimizer, training = base.optimizer, base.training

    def rate(value: float | None) -> float | None:
        return None if value is None else value * base.lr_scale * math.sqrt(ratio)

    def steps(value: int) -> int:
        return max(1, round(value / ratio)) if value else 0

    groups = []
    for group in base.param_groups:
        scaled = plain_value(group) | {"lr": rate(group.lr), "min_lr": rate(group.min_lr)}
        groups.append({key: value for key, value in scaled.items() if value is not None})
    changes: dict[str, Any] = {
        **start,
        "save": str(Path(save) / f"batch_{batch_size}"),
        "global_batch_size": batch_size,
        "lr_batch_size": None,
        "num_epochs": None,
        "train_iters": token_budget // (batch_size * base.data.seq_length),
        # A rate that no group uses is left alone: setting it would be an error.
        **{
            name: rate(getattr(optimizer, name)) for name in ("lr", "min_lr") if is_used(base, name)
        },
        "param_groups": groups,
        "param_group_preset": None,
        "lr_warmup_iters": steps(optimizer.lr_warmup_iters),
        "lr_decay_iters": optimizer.lr_decay_iters and steps(optimizer.lr_decay_iters),
        "eval_interval": steps(base.held_out.eval_interval),
        "eval_prompts_interval": steps(base.held_out.eval_prompts_interval),
        "attention_annealing_iters": steps(base.objective.attention_annealing_iters),
    }
    if base.validation_option is not None:
        held_out = base.held_out.eval_iters * training.global_batch_size
        if held_out % batch_size:
            raise bad_value(
                "--batch-sizes",
                batch_size,
                f"does not divide the {held_out} held-out samples (--eval-iters "
                f"{base.held_out.eval_iters} of {training.global_batch_size})",
                "choose --eval-iters so that every size does",
            )
        changes["eval_iters"] = held_out // batch_size
    return Branch(batch_size, Config.from_dict(base.to_dict() | changes))


@dataclass(frozen=True)
class BranchResult:
    """Result of a finished branch.

    Attributes:
        batch_size: Windows per update.
        batch_tokens: Tokens per update.
        lr: Largest peak learning rate of its parameter groups.
        train_iters: Updates.
        tokens: Tokens trained on.
        train_loss: Mean over the last tenth of the updates.
        validation_loss: At the end; None without held-out data.
    """

    batch_size: int
    batch_tokens: int
    lr: float
    train_iters: int
    tokens: int
    train_loss: float
    validation_loss: float | None

    @property
    def loss(self) -> float:
        """The loss that branches are compared by: validation loss if there is one."""
        return self.train_loss if self.validation_loss is None else self.validation_loss


def read_metrics(branch: Branch) -> list[dict[str, Any]]:
    """The metrics of a branch, a dictionary an update."""
    lines = (branch.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_result(branch: Branch) -> BranchResult:
    """The result of a finished branch."""
    metrics, config = read_metrics(branch), branch.config
    last = metrics[-max(1, round(SMOOTHED_PART * len(metrics))) :]
    batch_tokens = branch.batch_size * config.data.seq_length
    rates = [config.optimizer.lr if group.lr is None else group.lr for group in config.param_groups]
    return BranchResult(
        batch_size=branch.batch_size,
        batch_tokens=batch_tokens,
        lr=max(rates, default=config.optimizer.lr),
        train_iters=config.train_iters,
        tokens=batch_tokens * config.train_iters,
        train_loss=sum(line["loss"] for line in last) / len(last),
        validation_loss=metrics[-1]["validation_loss"],
    )


def critical_batch_size(results: Sequence[BranchResult], tolerance: float) -> BranchResult:
    """The branch of the largest batch whose loss is at most (1 + tolerance) times the best one."""
    best = min(result.loss for result in results)
    good = [result for result in results if result.loss <= best * (1 + tolerance)]
    return max(good, key=lambda result: result.batch_size)
