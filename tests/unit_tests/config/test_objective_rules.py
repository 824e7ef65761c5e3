"""What an objective has no use for, or cannot do, is refused; what it uses is accepted."""

import pytest

from megatron_dlm.config import (
    Config,
    objective_rules,
    validate,
    validate_architecture,
)
from megatron_dlm.errors import UserError
from tests.refusal import refusal
from tests.unit_tests.config.configurations import (
    D_OPSD,
    NEXT_TOKEN,
    NEXT_TOKEN_ON_CORPUS,
    OFF_POLICY,
    OPDLM,
    OPDLM_OFF,
    SCP,
    SFT,
    SFT_ON_TEACHER,
    SHORT,
    STORED,
    architecture,
    config_with,
)

MIXED = {"teacher_response_fraction": 0.5, "save": "no_such_folder"}
FADING = {**MIXED, "teacher_response_fraction_schedule": "linear"}


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher_load": "teacher"},
        {"epochs_per_rollout": 2},
        {"offload_teacher": True},
        {"offload_optimizer": True},
    ],
)
def test_what_an_objective_has_no_use_for_is_refused(changes: dict[str, object]) -> None:
    options = {"objective": "next_token", "train_data": "x.jsonl", "train_iters": 5}
    accepted = config_with(OPDLM, **changes)
    assert refusal(objective_rules.check_nothing_is_ignored, accepted) is None
    config = Config.from_dict({**options, "load": "weights", **changes})
    with pytest.raises(UserError, match="has no use for it"):
        objective_rules.check_nothing_is_ignored(config)


ON_PROMPTS = {"prompts": "p.jsonl"}
ON_EXAMPLES = {"train_data": "t.jsonl"}


@pytest.mark.parametrize(
    ("bases", "changes"),
    [
        ((SCP, NEXT_TOKEN, NEXT_TOKEN_ON_CORPUS), ON_PROMPTS),
        ((SCP, OPDLM, OFF_POLICY, D_OPSD), ON_EXAMPLES),
        ((SCP, SFT, OFF_POLICY, NEXT_TOKEN), {"num_rollouts": 3}),
        ((OPDLM, OPDLM_OFF, D_OPSD), {"train_iters": 3}),
        ((OPDLM, SFT, NEXT_TOKEN, OFF_POLICY), {"seq_length": 64}),
        ((SCP, SFT, SFT_ON_TEACHER, NEXT_TOKEN), {"divergence": "jsd"}),
        ((SCP, SFT, SFT_ON_TEACHER, NEXT_TOKEN), {"jsd_beta": 0.1}),
        ((SCP, SFT, SFT_ON_TEACHER, NEXT_TOKEN), {"divergence_top_k": 16}),
        ((SCP, SFT, SFT_ON_TEACHER, NEXT_TOKEN), {"divergence_tail": "ignore"}),
        ((SCP, SFT, NEXT_TOKEN, OPDLM, D_OPSD), {"teacher_responses": "folder"}),
        ((SCP, SFT, NEXT_TOKEN, OPDLM), {"eval_iters": 3}),
        ((SCP, D_OPSD), {"supervise_eos": False}),
        ((OPDLM, OPDLM_OFF, OFF_POLICY, NEXT_TOKEN, D_OPSD), {"loss_weighting": "none"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nothing_is_ignored_without_a_word(
    bases: tuple[dict[str, object], ...], changes: dict[str, object]
) -> None:
    [name] = changes
    for base in bases:
        message = refusal(validate, config_with(base, **changes), 1) or ""
        assert message.startswith(f"--{name.replace('_', '-')} = "), (base, message)
        assert "has no use for it; drop" in message


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (SCP, {"seq_length": 64, "loss_weighting": "none"}),
        (NEXT_TOKEN_ON_CORPUS, {"seq_length": 64}),
        ({**SCP, "valid_data_path": "v"}, {"eval_iters": 3}),
        (SFT, {"loss_weighting": "none", "supervise_eos": False}),
        (SFT_ON_TEACHER, {"teacher_responses": "folder", "divergence": "forward_kl"}),
        (OFF_POLICY, {"teacher_responses": "folder", "divergence": "jsd", "jsd_beta": 0.1}),
        ({**OPDLM, "teacher_response_fraction": 0.5}, {"teacher_responses": "folder"}),
        (OFF_POLICY, {"offload_teacher": True, "offload_optimizer": True}),
    ],
)
def test_what_is_used_or_a_default_is_accepted(
    base: dict[str, object], changes: dict[str, object]
) -> None:
    assert refusal(validate, config_with(base, **changes), 1) is None


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (OPDLM, STORED, ["--teacher-top-k-cache = True", "new rollouts", "--objective off_policy"]),
        (OPDLM, {**MIXED, **STORED}, ["--teacher-top-k-cache = True", "new rollouts"]),
        (OFF_POLICY, {"teacher_top_k_cache": True}, ["--divergence-top-k = 0", "full vocabulary"]),
        (SFT_ON_TEACHER, STORED, ["--teacher-top-k-cache = True", "has no use for it"]),
        (OFF_POLICY, {**STORED, "offload_teacher": True}, ["--offload-teacher", "no teacher in"]),
        (SFT, {"offload_teacher": True}, ["--offload-teacher = True", "has no use for it"]),
        (OFF_POLICY, {**STORED, "offload_optimizer": True}, ["--offload-optimizer", "no teacher"]),
        (SFT_ON_TEACHER, {"offload_optimizer": True}, ["--offload-optimizer", "has no use for it"]),
    ],
)
def test_what_is_not_there_is_neither_stored_nor_moved(
    base: dict[str, object], changes: dict[str, object], named: list[str]
) -> None:
    message = refusal(validate, config_with(base, **changes), 1) or ""
    assert all(part in message for part in named), message


def test_the_whole_vocabulary_is_not_stored() -> None:
    vocabulary = architecture().vocab_size
    config = config_with(SHORT, divergence_top_k=vocabulary)
    assert refusal(validate_architecture, config, architecture()) is None
    stored = config_with(
        {**OFF_POLICY, "max_prompt_length": 8, "max_response_length": 8},
        **{**STORED, "divergence_top_k": vocabulary},
    )
    message = refusal(validate_architecture, stored, architecture()) or ""
    assert "is the whole vocabulary" in message


@pytest.mark.parametrize(
    ("base", "changes", "fragments"),
    [
        (SCP, {"data_path": None}, ["--data-path = None", "scp needs it"]),
        (SCP, {"train_iters": None}, ["--train-iters = None", "scp needs it"]),
        (SCP, {"load": None}, ["--load = None"]),
        (SCP, {"seq_length": 0}, ["--seq-length = 0", "1 or more"]),
        (SCP, {"state_selection": "global"}, ["--state-selection = 'global'", "choose random"]),
        (SCP, {"supervise_eos": False}, ["--supervise-eos = False", "no use"]),
        (SCP, {"teacher_load": "t"}, ["--teacher-load = 't'", "no use"]),
        (SCP, {"valid_data": "v"}, ["--valid-data = 'v'", "give --valid-data-path"]),
        (SCP, {"eval_interval": 5}, ["--eval-interval = 5", "no use"]),
        (SCP, {"eval_iters": 0}, ["--eval-iters = 0", "1 or more"]),
        (OPDLM, {"valid_data": "v"}, ["--valid-data = 'v'", "opdlm on --prompts", "evaluate.py"]),
        (OPDLM, {"data_path": "c"}, ["--data-path = 'c'", "opdlm has no use"]),
        (SFT, {"data_path": "c"}, ["--data-path = 'c'", "sft has no use"]),
        (NEXT_TOKEN, {"data_path": "c"}, ["--data-path = 'c'", "not on both"]),
        (NEXT_TOKEN, {"mask_embedding_init": "mean"}, ["--mask-embedding-init", "no use"]),
        (SCP, {"lr_warmup_fraction": 1.5}, ["--lr-warmup-fraction = 1.5", "[0, 1]"]),
        (SCP, {"lr_warmup_fraction": 1.0}, ["--lr-warmup-fraction = 1.0", "less than 1"]),
        (
            SCP,
            {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3},
            ["--lr-warmup-fraction = 0.1", "--lr-warmup-iters 3"],
        ),
        (
            SCP,
            {"param_group_preset": "rnd1", "param_groups": [{"pattern": "mlp"}]},
            ["--param-group-preset = 'rnd1'", "--param-groups"],
        ),
    ],
)
def test_corpora_held_out_data_and_presets(
    base: dict[str, object], changes: dict[str, object], fragments: list[str]
) -> None:
    message = refusal(validate, config_with(base, **changes), 1) or ""
    assert all(fragment in message for fragment in fragments), message


def test_a_window_has_to_have_positions() -> None:
    limit = architecture().max_position_embeddings
    fits, too_long = (config_with(SCP, seq_length=length) for length in (limit, limit + 1))
    assert refusal(validate_architecture, fits, architecture()) is None
    message = refusal(validate_architecture, too_long, architecture()) or ""
    assert f"--seq-length = {limit + 1}: exceeds" in message
