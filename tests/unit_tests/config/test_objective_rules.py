"""Options that an objective does not support are refused."""

import pytest

from megatron_dlm.config import (
    validate,
    validate_architecture,
)
from tests.refusal import refusal
from tests.unit_tests.config.configurations import (
    NEXT_TOKEN,
    OFF_POLICY,
    OPDLM,
    SCP,
    SFT,
    SFT_ON_TEACHER,
    SHORT,
    STORED,
    architecture,
    config_with,
)

MIXED = {"teacher_response_fraction": 0.5, "save": "no_such_folder"}


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (
            OPDLM,
            STORED,
            ["--cache-teacher-targets = True", "new rollout", "--objective off_policy"],
        ),
        (OPDLM, {**MIXED, **STORED}, ["--cache-teacher-targets = True", "new rollout"]),
        (
            OFF_POLICY,
            {"cache_teacher_targets": True},
            ["--divergence-top-k = 0", "full vocabulary"],
        ),
        (SFT_ON_TEACHER, STORED, ["--cache-teacher-targets = True", "has no use for it"]),
        (OFF_POLICY, {**STORED, "offload_teacher": True}, ["--offload-teacher", "no teacher in"]),
        (SFT, {"offload_teacher": True}, ["--offload-teacher = True", "has no use for it"]),
        (OFF_POLICY, {**STORED, "offload_optimizer": True}, ["--offload-optimizer", "no teacher"]),
        (SFT, {"empty_mask": "mask_one"}, ["--empty-mask = 'mask_one'", "--loss-weighting none"]),
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
    assert "is the whole vocabulary, too much to store; choose" in message


@pytest.mark.parametrize(
    ("base", "changes", "fragments"),
    [
        (SCP, {"data_path": None}, ["--data-path = None", "scp needs it"]),
        (SCP, {"train_iters": None}, ["--train-iters = None", "scp needs it"]),
        (SCP, {"load": None}, ["--load = None"]),
        (SCP, {"state_selection": "global"}, ["--state-selection = 'global'", "choose random"]),
        (SCP, {"supervise_eos": False}, ["--supervise-eos = False", "no use"]),
        (SCP, {"teacher_load": "t"}, ["--teacher-load = 't'", "no use"]),
        (SCP, {"valid_data": "v"}, ["--valid-data = 'v'", "add --valid-data-path"]),
        (SCP, {"eval_interval": 5}, ["--eval-interval = 5", "no use"]),
        (OPDLM, {"valid_data": "v"}, ["--valid-data = 'v'", "opdlm on --prompts", "--eval-pr"]),
        (OPDLM, {"data_path": "c"}, ["--data-path = 'c'", "opdlm on --prompts has no use"]),
        (SFT, {"data_path": "c"}, ["--data-path = 'c'", "sft on --train-data has no use"]),
        (NEXT_TOKEN, {"data_path": "c"}, ["--train-data", "next_token on --data-path has no use"]),
        (NEXT_TOKEN, {"mask_embedding_init": "mean"}, ["--mask-embedding-init", "no use"]),
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
