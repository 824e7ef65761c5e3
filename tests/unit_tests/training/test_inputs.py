"""Inputs of a run are checked against the model; a change of the kind of model is announced."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dlm.data.corpus import CorpusDataset
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import architecture_from_hf, read_diffusion_kind
from megatron_dlm.training.diffusion_kind_change import changed_diffusion_kind
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, RND1, TWO_MODES, DiffusionKind
from megatron_dlm.types.special_tokens import SpecialTokens
from tests.corpora import write_corpus
from tests.families import FAMILIES
from tests.tiny import run_config, run_training, save_random_model, write_data

FULL = {"attention_pattern": "full", "shifted": True}
CAUSAL = {"attention_pattern": "causal", "shifted": True}
BLOCKS = {"attention_pattern": "block_causal", "shifted": False, "block_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_data(folder)
    save_random_model(folder / "ar")
    return folder


def stating(folder: Path, model: Path, **config: Any) -> Path:
    """The model with more in its config.json."""
    model.mkdir()
    for file in (folder / "ar").iterdir():
        (model / file.name).symlink_to(file)
    stated = json.loads((folder / "ar" / "config.json").read_text()) | config
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(stated))
    return model


@pytest.mark.parametrize(
    ("stated", "objective", "options", "before", "after"),
    [
        (FULL, "sft", {}, "full attention, shifted logits)", "unshifted logits, blocks of 4)"),
        (FULL, "next_token", {}, "full attention, shifted", "makes it an autoregressive model"),
        (BLOCKS, "next_token", {}, "logits, blocks of 8)", "makes it an autoregressive model"),
        (CAUSAL, "scp", {}, "(causal attention, shifted logits)", "(full attention, shifted"),
        (BLOCKS, "scp", {}, "block_causal attention, unsh", "full attention, shifted logits)"),
        (BLOCKS, "sft", {"block_size": 16}, "blocks of 8)", "blocks of 16)"),
        ({"block_size": 8}, "sft", {}, "blocks of 8)", "blocks of 4)"),
        ({**FULL, "shifted": False}, "scp", {}, "full attention, unshifted", "full attention, sh"),
        ({**FULL, "block_size": 8}, "scp", {}, "shifted logits, blocks of 8)", "shifted logits)"),
    ],
)
def test_another_diffusion_kind_is_announced(
    folder: Path,
    tmp_path: Path,
    stated: dict[str, Any],
    objective: str,
    options: dict[str, Any],
    before: str,
    after: str,
) -> None:
    model = stating(folder, tmp_path / "model", **stated)
    config = run_config(folder, model, objective=objective, **options)
    (line,) = changed_diffusion_kind(config, read_inputs(config))
    told, made = line.split("; ")
    assert str(model) in told
    assert before in told
    assert f"--objective {objective}" in made
    assert after in made


@pytest.mark.parametrize(
    ("stated", "objective", "options"),
    [
        ({}, "sft", {}),
        ({}, "next_token", {}),
        (FULL, "scp", {}),
        (BLOCKS, "sft", {"block_size": 8}),
        ({"model_type": "sdar"}, "sft", {"block_size": 8}),
        (FULL, "d_opsd", {"lora_rank": 2, "block_size": 8}),
        (BLOCKS, "d_opsd", {"lora_rank": 2, "block_size": 8}),
    ],
)
def test_a_kept_diffusion_kind_and_a_conversion_are_not(
    folder: Path, tmp_path: Path, stated: dict[str, Any], objective: str, options: dict[str, Any]
) -> None:
    model = stating(folder, tmp_path / "model", **stated)
    config = run_config(folder, model, objective=objective, **options)
    assert changed_diffusion_kind(config, read_inputs(config)) == []


@pytest.mark.parametrize(
    ("objective", "options", "kind"),
    [
        ("sft", {}, BLOCK_DIFFUSION),
        ("sft", {"context_attention": "causal"}, TWO_MODES),
        ("scp", {}, RND1),
    ],
)
def test_the_context_of_a_two_mode_model_is_what_it_is_trained_with(
    folder: Path, tmp_path: Path, objective: str, options: dict[str, Any], kind: DiffusionKind
) -> None:
    """Its model type implies a causal context, which a run need not keep."""
    stated = {"model_type": "two-mode-qwen3", "block_size": 8}
    model = stating(folder, tmp_path / "model", **stated)
    config = run_config(folder, model, objective=objective, block_size=8, **options)
    inputs = read_inputs(config)
    assert read_diffusion_kind(inputs.hf_config(config)) == inputs.diffusion_kind == kind
    assert bool(changed_diffusion_kind(config, inputs)) == (kind != TWO_MODES)


def test_it_is_said_once_and_not_again_when_the_run_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, save = stating(folder, tmp_path / "model", **BLOCKS), str(tmp_path / "run")
    options = dict(objective="sft", save=save, train_iters=2, lr_decay_iters=3)
    run_training(run_config(folder, model, **options))
    assert capsys.readouterr().out.count("warning: the config.json of --load") == 1
    run_training(run_config(folder, Path(save), **{**options, "train_iters": 3}))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["train_data", "valid_data"])
@pytest.mark.parametrize("objective", ["sft", "next_token"])
def test_examples_longer_than_the_model_are_refused(
    folder: Path, tmp_path: Path, objective: str, option: str
) -> None:
    model = stating(folder, tmp_path / "model", max_position_embeddings=40)
    short, long = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    line = {"prompt": "1" * 20, "response": "2" * 19}
    short.write_text((json.dumps(line) + "\n") * 4)
    long.write_text(json.dumps(line) + "\n" + json.dumps(line | {"prompt": "1" * 21}) + "\n")
    files = {"train_data": str(short), option: str(long)}
    config = run_config(folder, model, objective=objective, eval_iters=1, **files)
    with pytest.raises(UserError, match=r"long.jsonl:2: length of .* = 41: exceeds .* 40 pos"):
        read_inputs(config)
    read_inputs(run_config(folder, model, objective=objective, train_data=str(short)))


def test_held_out_windows_are_checked_before_the_run(folder: Path, tmp_path: Path) -> None:
    """Those that the validation loss is measured on, and no others."""
    documents = [[document] * 48 for document in range(12)]
    windows = CorpusDataset(
        str(write_corpus(tmp_path / "good", documents)),
        48,
        seed=1234,
        shuffle=True,
        special_tokens=SpecialTokens(510, 508, 511, vocab_size=512),
    )
    last, following = (int(windows.sample(index, index).response_ids[0]) for index in (7, 8))
    for name, document, bad in (("last", last, 511), ("next", following, 600)):
        changed = [list(tokens) for tokens in documents]
        changed[document][5] = bad
        write_corpus(tmp_path / name, changed)
    options: dict[str, Any] = dict(objective="scp", global_batch_size=4, eval_iters=2)

    def read(name: str) -> None:
        held_out = str(tmp_path / name)
        read_inputs(run_config(folder, folder / "ar", **options, valid_data_path=held_out))

    with pytest.raises(UserError, match=f"--valid-data-path: document {last} contains the MASK"):
        read("last")
    read("next")


def with_tokenizer(
    folder: Path, model: Path, *, swapped: bool = False, masked: bool = True
) -> Path:
    """The model with two tokens of its tokenizer exchanged, or without MASK."""
    stating(folder, model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((model / name).read_text())
        (model / name).unlink()
        if name == "tokenizer.json" and swapped:
            vocabulary = content["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        if not masked:
            content.pop("mask_token", None)
            content["added_tokens"] = content.get("added_tokens", [])[:-1]
        (model / name).write_text(json.dumps(content))
    return model


def test_a_teacher_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    teacher = with_tokenizer(folder, tmp_path / "teacher", swapped=True)
    config = run_config(folder, folder / "ar", teacher_load=str(teacher))
    with pytest.raises(UserError, match=rf"--teacher-load = '{teacher}': .*'[ab]' as .*/ar as "):
        read_inputs(config)


def test_the_tokenizer_that_the_run_reads_with_is_compared(folder: Path, tmp_path: Path) -> None:
    other = with_tokenizer(folder, tmp_path / "other", swapped=True)
    config = run_config(folder, folder / "ar", tokenizer=str(other))
    with pytest.raises(UserError, match=rf"--load = '{folder / 'ar'}': .*'[ab]' as .*{other} as"):
        read_inputs(config)


@pytest.mark.parametrize(("student", "teacher"), [(True, False), (False, True)])
def test_one_of_the_tokenizers_may_lack_mask(
    folder: Path, tmp_path: Path, student: bool, teacher: bool
) -> None:
    load = with_tokenizer(folder, tmp_path / "student", masked=student)
    asked = with_tokenizer(folder, tmp_path / "teacher", masked=teacher)
    inputs = read_inputs(run_config(folder, load, teacher_load=str(asked)))
    assert ("<|MASK|>" in inputs.tokenizer.get_vocab()) == student
    assert inputs.special_tokens.mask_token_id == 511


def test_a_teacher_needs_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    teacher = stating(folder, tmp_path / "teacher")
    for file in teacher.glob("*token*"):
        file.unlink()
    inputs = read_inputs(run_config(folder, folder / "ar", teacher_load=str(teacher)))
    assert inputs.teacher is not None
    assert inputs.teacher.source.hf_folder == teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_an_autoregressive_result_is_of_its_familys_model_type(
    folder: Path, tmp_path: Path, family: str
) -> None:
    source = save_random_model(tmp_path, family=family, moe=family == "qwen3_moe")
    original = json.loads((source / "config.json").read_text())
    name = original["model_type"]
    diffusion = "rnd1" if family == "qwen3_moe" else f"a2d-{name}"
    (source / "config.json").write_text(json.dumps(original | FULL | {"model_type": diffusion}))
    config = run_config(folder, source, objective="next_token")
    inputs = read_inputs(config)
    written = inputs.hf_config(config)
    assert written["model_type"] == name
    again = architecture_from_hf(json.loads(json.dumps(written)))
    assert replace(again, hf_config={}) == replace(
        inputs.architecture, hf_config={}, generation_config={}
    )
