"""Rules about adapters and about a model that is its own teacher."""

from __future__ import annotations

from megatron_dlm.config.rule_support import refuse, value_of
from megatron_dlm.config.schema import Config


def check_lora(config: Config) -> None:
    """Adapters are described by layers that can have them."""
    lora = config.lora
    if lora.lora_rank is None:
        return
    if not lora.lora_target_modules:
        raise refuse(config, "lora_target_modules", "names no layer", "name e.g. linear_qkv")
    if config.model.transformer_impl != "local":
        raise refuse(
            config,
            "lora_rank",
            "adapters need Megatron's local layers",
            "choose --transformer-impl local",
        )


def check_self_distillation(config: Config) -> None:
    """A frozen teacher exists."""
    if config.teaches_itself and config.lora.lora_rank is None:
        raise refuse(
            config,
            "teacher_load",
            "without adapters nothing keeps the weights that the student started from",
            "add --lora-rank, or name those weights for a frozen copy",
        )


def check_something_to_learn(config: Config) -> None:
    """Another try differs from the first, and some state has a later block to learn from."""
    rollout = config.rollout
    if config.traits.verifies and rollout.max_tries > 1:
        for name, value in (("temperature", 0), ("top_k", 1)):
            if value_of(config, name) == value:
                raise refuse(
                    config,
                    name,
                    f"all {rollout.max_tries} tries would be the same response",
                    "sample it, or choose --max-tries 1",
                )
    longest = config.data.max_prompt_length + rollout.max_response_length
    if config.traits.self_distillation and longest <= config.model.block_size:
        raise refuse(
            config,
            "block_size",
            f"holds the longest prompt and response ({longest} tokens), so that no state has a "
            "later block to learn from",
            f"choose less than {longest}, or a larger --max-response-length",
        )
