"""Rules about adapters and about a model that is its own teacher."""

from __future__ import annotations

from megatron_dlm.config.fields import option_fields
from megatron_dlm.config.rule_support import flag, refuse, value_of
from megatron_dlm.config.schema import Config, SelfDistillationConfig

VERIFICATION_FIELDS = ("reward", "max_tries")
DIVERGENCE_FIELDS = ("divergence", "jsd_beta", "divergence_top_k", "divergence_tail")


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


def _refuse_changes(config: Config, names: tuple[str, ...], problem: str, use: str) -> None:
    """Refuse a value other than the default in any of these fields."""
    table = option_fields(Config)
    for name in names:
        if value_of(config, name) != table[name].default:
            raise refuse(config, name, problem, f"drop {flag(name)}, or use {use}")
