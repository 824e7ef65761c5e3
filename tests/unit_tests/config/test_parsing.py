"""Flags and YAML: precedence, types, and errors that name what to write instead."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.config import Config, ParameterGroup, parse_config
from megatron_dlm.config.coercion import coerce
from megatron_dlm.config.fields import INVOCATION_FIELDS, flag_of, option_fields, option_helps
from megatron_dlm.errors import UserError


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return str(file)


def error_of(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_arguments_every_field_has_its_default() -> None:
    assert parse_config([]) == Config()


def test_flags_win_over_yaml_which_wins_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "lr: 3e-4\nmin-lr: 0\ntop_k: 7\nload: weights\nbf16: true\n")
    config = parse_config(["--top-k", "5", "--config", file, "--no-bf16", "--load", "none"])
    assert config.rollout.top_k == 5
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.min_lr == 0.0
    assert config.optimizer.weight_decay == Config().optimizer.weight_decay
    assert config.model.bf16 is False
    assert config.model.load is None
    assert config.config == file


def test_flag_forms() -> None:
    config = parse_config(["--lr=1e-3", "--top_k", "3", "--sequence-parallel", "--dry-run"])
    assert config.optimizer.lr == 1e-3
    assert config.rollout.top_k == 3
    assert config.parallel.sequence_parallel is True
    assert config.dry_run is True


def test_structured_values_mean_the_same_as_flag_and_in_yaml(tmp_path: Path) -> None:
    groups = '[{"pattern": "attention", "lr": 3e-4}, {"pattern": "mlp", "weight_decay": 0.1}]'
    expected = (
        ParameterGroup("attention", lr=3e-4),
        ParameterGroup("mlp", weight_decay=0.1),
    )
    kwargs = '{"enable_thinking": false}'
    flags = parse_config(["--param-groups", groups, "--chat-template-kwargs", kwargs])
    text = (
        "param_groups:\n- {pattern: attention, lr: 3e-4}\n- {pattern: mlp, weight_decay: 0.1}\n"
        "chat_template_kwargs:\n  enable_thinking: false\n"
    )
    from_yaml = parse_config(["--config", write(tmp_path, text)])
    assert flags.optimizer.param_groups == from_yaml.optimizer.param_groups == expected
    assert flags.template.chat_template_kwargs == from_yaml.template.chat_template_kwargs
    assert flags.template.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--tensor-model-paralel-size", "2"], ["did you mean --tensor-model-parallel-size?"]),
        (["--no-sequence-paralel"], ["did you mean --no-sequence-parallel?"]),
        (["--qqqqqqqqq", "2"], ["--qqqqqqqqq", "--help"]),
        (["--lr", "fast"], ["--lr", "fast", "a number"]),
        (["--lr", "nan"], ["--lr", "nan", "a number"]),
        (["--lr", "0"], ["--lr = 0.0: is not positive", "above 0"]),
        (["--max-response-length-by-domain", '{"math": 0}'], ["-domain.math = 0", "1 or more"]),
        (["--param-groups", '[{"pattern": "a", "lr": -1}]'], ["groups[0].lr = -1", "negative"]),
        (["--top-k", "1.5"], ["--top-k", "1.5", "a whole number"]),
        (["--device", "gpu"], ["--device", "gpu", "auto or cpu or cuda"]),
        (["--lr"], ["--lr", "has no value"]),
        (["--lr", "--save", "x"], ["--lr", "has no value"]),
        (["--sequence-parallel", "yes"], ["yes", "--no-sequence-parallel"]),
        (["--sequence-parallel=yes"], ["yes", "--no-sequence-parallel"]),
        (["--bf16", "--no-bf16=off"], ["off", "takes no value"]),
        (["train"], ["train", "belongs to no flag"]),
        (["train", "--no-bf16"], ["train", "belongs to no flag"]),
        (["--save", ""], ["--save", "is empty"]),
        (["--param-groups", "attention"], ["--param-groups[0] = 'attention'", "write {pattern"]),
        (["--param-groups", '[{"lr": 1}]'], ["--param-groups[0]", "lacks pattern"]),
        (["--param-groups", '[{"pattern": "a", "rate": 1}]'], ["rate", "weight_decay"]),
        (["--save", "a\0b"], ["--save", "holds a NUL character", "leave it out"]),
        (["-lr", "1"], ["-lr", "did you mean --lr?"]),
        (["-hx"], ["-hx", "--help"]),
        (["-1"], ["-1", "belongs to no flag"]),
        (["--config", "no/such.yaml"], ["--config", "no/such.yaml", "No such file"]),
    ],
)
def test_bad_command_line_is_one_line_with_a_remedy(
    argv: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(argv)
    for words in named:
        assert words in message
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("lr: 1\nlr_decay_stile: cosine\n", 2, "did you mean lr_decay_style?"),
        ("top_k: 1\n\nlr: [1]\n", 3, "a number"),
        ("top_k: true\n", 1, "a whole number"),
        ("top_k: 1\nlr: -1\n", 2, "is not positive"),
        ("bf16: 1\n", 1, "true or false"),
        ("tokenizer: 12\n", 1, "quote it"),
        ("block_size:\n", 1, "has no value"),
        ("lr: 1\nlr: 2\n", 2, "given twice"),
        ("top-k: 1\ntop_k: 2\n", 2, "given twice"),
        ("lr: 1\ntop_k: [1\nseed: 2\n", 3, "is not YAML"),
        ("dry_run: true\n", 1, "is not a known key"),
    ],
)
def test_bad_yaml_names_file_and_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    file = write(tmp_path, text)
    message = error_of(["--config", file])
    assert f"{file}:{line}" in message
    assert words in message


def test_a_tag_that_does_not_fit_its_value_is_an_error(tmp_path: Path) -> None:
    assert "is not YAML" in error_of(["--config", write(tmp_path, "lr: !!timestamp x\n")])


def test_yaml_that_is_no_mapping(tmp_path: Path) -> None:
    assert "is not a mapping" in error_of(["--config", write(tmp_path, "- lr\n")])


def test_empty_yaml_changes_nothing(tmp_path: Path) -> None:
    assert (
        parse_config(["--config", write(tmp_path, "# nothing\n")]).to_dict() == Config().to_dict()
    )


BASE = "lr: 1e-4\nmin-lr: 1e-5\ntop_k: 7\nload: weights\nchat_template_kwargs: {a: 1, b: 2}\n"


def test_a_file_changes_its_base_and_flags_win_over_both(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "base.yaml").write_text(BASE)
    text = "base: recipes/base.yaml\nmin_lr: 2e-5\nseed: 3\nload: null\n"
    file = write(tmp_path, text + "chat_template_kwargs: {c: 3}\n")
    config = parse_config(["--config", file, "--seed", "5"])
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-4, 2e-5)
    assert (config.rollout.top_k, config.data.seed, config.model.load) == (7, 5, None)
    assert config.template.chat_template_kwargs == {"c": 3}


@pytest.mark.parametrize(
    ("base", "text", "place", "words"),
    [
        (BASE, "lr: 1\nbase: missing.yaml\n", "run.yaml:2: base", "cannot be read"),
        (BASE, "base: 3\n", "run.yaml:1: base = 3", "path of a YAML file"),
        (BASE + "base: other.yaml\n", "base: base.yaml\n", "run.yaml:1: base", "of its own"),
        ("lr: 1\nlearning: 2\n", "base: base.yaml\n", "base.yaml:2", "is not a known key"),
        ("lr: fast\n", "base: base.yaml\nlr: 1\n", "base.yaml:1: lr", "wrong type"),
        (BASE, "base: base.yaml\n\nlr: fast\n", "run.yaml:3: lr", "wrong type"),
        ("- lr\n", "base: base.yaml\n", "run.yaml:1: base", "is not a mapping"),
    ],
)
def test_what_is_wrong_in_a_file_or_its_base_is_said_of_its_line(
    tmp_path: Path, base: str, text: str, place: str, words: str
) -> None:
    (tmp_path / "base.yaml").write_text(base)
    message = error_of(["--config", write(tmp_path, text)])
    assert place in message
    assert words in message


def test_help_names_every_flag_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in option_fields(Config):
        assert flag_of(name) in text
    assert "model options" in text
    assert "Tokens denoised together" in text
    assert "(default: 4; 1 or more)" in text


def test_help_shows_the_values_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--config", write(tmp_path, "block_size: 32\n"), "--help"])
    assert "(default: 32; 1 or more)" in capsys.readouterr().out


def test_help_is_printed_by_rank_0_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == ""


def test_every_field_is_documented() -> None:
    assert option_helps(Config).keys() >= option_fields(Config).keys()
    assert all(option_helps(Config).values())


def test_resolved_yaml_reads_back_to_the_same_configuration(tmp_path: Path) -> None:
    argv = ["--lr", "3e-7", "--prompts", "a b.jsonl", "--no-tensorboard", "--save", "123"]
    argv += ["--param-groups", '[{"pattern": "experts|router", "min_lr": 1e-9}]']
    argv += ["--chat-template-kwargs", '{"system": "é: #", "n": [1, null]}']
    config = parse_config(argv)
    file = write(tmp_path, config.to_yaml())
    assert dataclasses.replace(parse_config(["--config", file]), config=None) == config
    assert Config.from_dict(config.to_dict()) == config
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()


@settings(deadline=None)
@given(
    lr=st.floats(0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0),
    save=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
        lambda t: t not in ("none", "null", "None")
    ),
)
def test_any_value_survives_yaml(lr: float, seed: int, save: str) -> None:
    config = Config.from_dict({"lr": lr, "seed": seed, "save": save})
    assert config.logging.save == save
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats()
    | st.sampled_from(["none", "", "yes", "4", " 4", "4.0", "1e-3", "nan", "linear_qkv", "cosine"])
    | st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=8),
    lambda entry: (
        st.lists(entry, max_size=3)
        | st.dictionaries(st.sampled_from(["pattern", "lr", "math"]), entry, max_size=3)
    ),
    max_leaves=5,
)
READ = {n: o for n, o in option_fields(Config).items() if n not in INVOCATION_FIELDS}


def outcome(argv: list[str] | None = None, values: dict[str, object] | None = None) -> object:
    """The options read, as text (NaN equals itself there); None: they are refused."""
    try:
        config = parse_config(argv) if argv is not None else Config.from_dict(values or {})
    except UserError:
        return None
    return repr(config.to_dict())


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(READ)), value=PLAIN)
def test_flags_yaml_and_json_agree(name: str, value: object) -> None:
    option, read = READ[name], outcome(values={name: value})
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), yaml.safe_dump({name: value}, sort_keys=False))
        assert outcome(["--config", file]) == read
    if isinstance(value, str) and option.type is not bool:
        assert outcome([f"{flag_of(name)}={value}"]) == read
    elif read is not None and option.type not in (bool, str) and value is not None:
        text = json.dumps(value)
        assert outcome([f"{flag_of(name)}={text}"]) == outcome(values={name: text}) == read


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bf16", 1),
        ("bf16", "yes"),
        ("top_k", 4.0),
        ("top_k", "4.0"),
        ("top_k", True),
        ("lr", True),
        ("lr", math.inf),
        ("lr", "nan"),
        ("save", 4),
        ("save", ""),
        ("save", b"runs"),
        ("lora_target_modules", {"linear_qkv"}),
        ("lora_target_modules", [["linear_qkv"]]),
        ("max_response_length_by_domain", {"math": 4.0}),
        ("max_response_length_by_domain", {1: 4}),
        ("param_groups", [{"pattern": "mlp", "lr": True}]),
        ("param_groups", "[" * 5000),
        ("chat_template_kwargs", "9" * 5000),
    ],
)
def test_no_value_is_taken_for_another_type(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        Config.from_dict({name: value})


def test_from_dict_refuses_unknown_fields() -> None:
    with pytest.raises(UserError, match="did you mean block_size"):
        Config.from_dict({"block_sizes": 4}, source="checkpoint")


def test_none_is_read_only_where_it_is_allowed() -> None:
    table = option_fields(Config)
    assert coerce(table["load"], "none", "--load") is None
    assert coerce(table["recompute_granularity"], "none", "--recompute-granularity") == "none"
    with pytest.raises(UserError, match="--block-size"):
        coerce(table["block_size"], "none", "--block-size")


def test_only_the_name_of_a_flag_may_have_underscores() -> None:
    config = parse_config(["--max_prompt_length", "7", "--save", "--a\nmy_run x", "--load=a_b"])
    assert config.data.max_prompt_length == 7
    assert (config.logging.save, config.model.load) == ("--a\nmy_run x", "a_b")
