"""Rules about adapters and about a model that is its own teacher."""

from __future__ import annotations

from megatron_dlm.config.fields import option_fields
from megatron_dlm.config.objective_rules import DIVERGENCE_FIELDS
from megatron_dlm.config.rule_support import default_of, flag, refuse, value_of
from megatron_dlm.config.schema import Config, SelfDistillationConfig

VERIFICATION_FIELDS = ("reward", "max_tries")


def check_lora(config: Config) -> None:
    """Adapters are described only where there are some, and by layers that can have them."""
    lora = config.lora
    if lora.lora_rank is None:
        _refuse_changes(
            config, ("lora_alpha", "lora_target_modules"), "there are no adapters", "--lora-rank"
        )
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
    """A frozen teacher exists, and nothing is asked of another kind of distillation."""
    traits = config.traits
    objective = f"--objective {config.objective.objective}"
    if not traits.verifies:
        _refuse_changes(
            config, VERIFICATION_FIELDS, f"{objective} verifies nothing", "--objective d_opsd"
        )
    if not traits.self_distillation:
        fields = tuple(
            name for name, o in option_fields(Config).items() if o.group == "self_distillation"
        )
        assert len(fields) == len(SelfDistillationConfig.__dataclass_fields__)
        _refuse_changes(config, fields, f"{objective} has another teacher", "--objective d_opsd")
        return
    _refuse_changes(
        config,
        DIVERGENCE_FIELDS,
        f"{objective} has a divergence of its own",
        f"{flag('teacher_top_k')} or {flag('divergence_term_limit')}",
    )
    if config.uses_teacher_responses:
        raise refuse(
            config,
            "teacher_response_fraction",
            f"{objective} has no autoregressive teacher",
            "leave it out",
        )
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


def _refuse_changes(config: Config, names: tuple[str, ...], problem: str, use: str) -> None:
    """Refuse a value other than the default in any of these fields."""
    for name in names:
        if value_of(config, name) != default_of(name):
            raise refuse(config, name, problem, f"drop {flag(name)}, or use {use}")
