"""Bad input ends in one line naming field, value and remedy, exit status 2, on one rank only."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from megatron_dlm.training.manifest import MANIFEST
from tests.functional_tests.entry_points import (
    EVALUATE,
    GENERATE,
    PRETRAIN,
    Call,
    Outcome,
    options,
    run_process,
    run_ranks,
)
from tests.tiny import save_random_model

NEAR = [
    ("--blok-size", "3", "'--blok-size'", "did you mean --block-size?"),
    ("--top-k", "many", "--top-k = 'many'", "whole number"),
    ("--top-p", "1.5", "--top-p = 1.5", "(0, 1]"),
]


def changed_model(source: Path, folder: Path, **config: Any) -> Path:
    """A copy of a model folder whose config.json says something else."""
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def changed_tensors(source: Path, folder: Path, *, drop: str = "", cut: str = "") -> Path:
    """A copy of a model folder without a tensor, or with one that lacks its last row."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if drop:
        del tensors[drop]
    if cut:
        tensors[cut] = tensors[cut][:-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("flag", "value", "named", "remedy"), NEAR)
def test_flags(files: Path, call: Call, flag: str, value: str, named: str, remedy: str) -> None:
    call(PRETRAIN, *options(files), flag, value).check_error(named, remedy)
    call(GENERATE, "--load", files / "dense", "--prompt", "x", flag, value).check_error(
        named, remedy
    )
    call(EVALUATE, "--load", files / "dense", "--data", "x", flag, value).check_error(named, remedy)


def test_unknown_yaml_key(files: Path, call: Call, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("lr: 1e-3\nblok_size: 3\n")
    call(PRETRAIN, *options(files), "--config", config).check_error(
        f"{config}:2", "'blok_size'", "did you mean block_size?"
    )


@pytest.mark.parametrize("script", [PRETRAIN, GENERATE, EVALUATE], ids=lambda path: path.stem)
class TestCheckpoint:
    """Everything that opens a checkpoint refuses it in the same words."""

    def run(self, call: Call, script: Path, files: Path, load: Path, *more: object) -> Outcome:
        if script == PRETRAIN:
            return call(script, *options(files, load=load), *more)
        data = "--prompts" if script == GENERATE else "--data"
        length = ("--max-response-length", 8, "--device", "cpu")
        return call(script, "--load", load, data, files / "examples.jsonl", *length, *more)

    def test_missing_folder(self, call: Call, script: Path, files: Path) -> None:
        load = files / "nowhere"
        self.run(call, script, files, load).check_error(f"--load = '{load}'", "no such folder")

    def test_empty_folder(self, call: Call, script: Path, files: Path, tmp_path: Path) -> None:
        self.run(call, script, files, tmp_path).check_error(
            f"--load = '{tmp_path}'", "neither a Hugging Face model nor a Megatron checkpoint"
        )

    def test_no_weights(self, call: Call, script: Path, files: Path, tmp_path: Path) -> None:
        shutil.copy(files / "dense" / "config.json", tmp_path)
        self.run(call, script, files, tmp_path).check_error(
            f"--load = '{tmp_path}'", "no *.safetensors"
        )

    def test_other_architecture(
        self, call: Call, script: Path, files: Path, tmp_path: Path
    ) -> None:
        model = changed_model(files / "dense", tmp_path / "model", model_type="gpt2")
        self.run(call, script, files, model).check_error(
            str(model / "config.json"), "model_type = 'gpt2'", "use one of llama"
        )

    def test_missing_key(self, call: Call, script: Path, files: Path, tmp_path: Path) -> None:
        model = changed_model(files / "dense", tmp_path / "model")
        config = json.loads((model / "config.json").read_text())
        del config["hidden_size"]
        (model / "config.json").write_text(json.dumps(config))
        self.run(call, script, files, model).check_error("config.json", "'hidden_size'", "missing")

    def test_broken_config(self, call: Call, script: Path, files: Path, tmp_path: Path) -> None:
        for text, problem in (("{", "not valid JSON"), ("[]", "is no JSON object")):
            model = changed_model(files / "dense", tmp_path / problem)
            (model / "config.json").write_text(text)
            self.run(call, script, files, model).check_error("--load", "config.json", problem)

    def test_missing_tensor(self, call: Call, script: Path, files: Path, tmp_path: Path) -> None:
        tensor = "model.layers.1.mlp.up_proj.weight"
        model = changed_tensors(files / "dense", tmp_path / "model", drop=tensor)
        self.run(call, script, files, model).check_error(
            f"--load = '{model}'", tensor, "is missing"
        )

    def test_wrong_shape(self, call: Call, script: Path, files: Path, tmp_path: Path) -> None:
        tensor = "model.layers.0.mlp.down_proj.weight"
        model = changed_tensors(files / "dense", tmp_path / "model", cut=tensor)
        self.run(call, script, files, model).check_error(
            f"--load = '{model / 'model.safetensors'}'", tensor, "[31, 64] instead of [32, 64]"
        )

    def test_damaged_file(self, call: Call, script: Path, files: Path, tmp_path: Path) -> None:
        model = changed_model(files / "dense", tmp_path / "model")
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        self.run(call, script, files, model).check_error(f"--load = '{file}'", "cannot be read")

    def test_tokenizer(self, call: Call, script: Path, files: Path, tmp_path: Path) -> None:
        model = changed_model(files / "dense", tmp_path / "model")
        (model / "tokenizer.json").unlink()
        self.run(call, script, files, model).check_error(str(model), "holds no tokenizer")

    @pytest.mark.parametrize(
        ("model", "flag", "value", "world_size", "problem"),
        [
            ("dense", "tensor-model-parallel-size", 8, 8, "does not divide the model's 4"),
            ("dense", "tensor-model-parallel-size", 4, 4, "does not divide the model's 2 query"),
            ("dense", "tensor-model-parallel-size", 2, 3, "does not divide the 3 processes"),
            ("dense", "pipeline-model-parallel-size", 4, 4, "does not divide the model's 2 layers"),
            ("dense", "expert-model-parallel-size", 2, 2, "the model has no experts"),
            ("moe", "expert-model-parallel-size", 3, 3, "does not divide the model's 4 experts"),
            ("moe", "expert-model-parallel-size", 2, 1, "does not divide 1 processes"),
        ],
    )
    def test_layout(
        self,
        call: Call,
        script: Path,
        files: Path,
        monkeypatch: pytest.MonkeyPatch,
        model: str,
        flag: str,
        value: int,
        world_size: int,
        problem: str,
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        more = ["--" + flag, value]
        if script == PRETRAIN:  # whatever the number of processes, the batches are not at fault
            more += ["--rollout-batch-size", 24, "--global-batch-size", 24]
        self.run(call, script, files, files / model, *more).check_error(
            "--" + flag, str(value), problem, "choose"
        )

    @pytest.mark.parametrize(
        ("lines", "line", "problem"),
        [
            ([], None, "is empty"),
            (['{"prompt": "a"}', "", '{"prompt": "b"'], 3, "broken JSON"),
            (['{"prompt": "a"}', "[1]"], 2, "a list"),
            (['{"text": "a"}'], 1, 'neither of "messages" and "prompt"'),
            (['{"messages": [{"role": "user"}]}'], 1, 'messages[0]["content"]'),
            (['{"prompt": "a"}', '{"prompt": "<|MASK|>"}'], 2, "MASK"),
            (['{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}'], 1, "leaves out"),
            (['{"prompt": "%s"}' % ("7 + " * 400)], 1, "prompt length"),
        ],
    )
    def test_prompt_file(
        self,
        call: Call,
        script: Path,
        files: Path,
        tmp_path: Path,
        lines: list[str],
        line: int | None,
        problem: str,
    ) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_text("\n".join(lines))
        flag = "--data" if script == EVALUATE else "--prompts"
        place = str(path) if line is None else f"{path}:{line}"
        self.run(call, script, files, files / "dense", flag, path).check_error(place, problem)

    def test_missing_prompt_file(self, call: Call, script: Path, files: Path) -> None:
        flag = "--data" if script == EVALUATE else "--prompts"
        self.run(call, script, files, files / "dense", flag, "/none.jsonl").check_error(
            f"{flag} = '/none.jsonl'", "no such file"
        )

    def test_no_eos(self, call: Call, script: Path, files: Path, tmp_path: Path) -> None:
        model = changed_model(files / "dense", tmp_path / "model", eos_token_id=None)
        (model / "generation_config.json").unlink()
        file = model / "tokenizer_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"eos_token": None}))
        self.run(call, script, files, model).check_error("eos_token_id", str(model), "EOS")

    def test_no_mask(self, call: Call, script: Path, files: Path, tmp_path: Path) -> None:
        model = changed_model(files / "dense", tmp_path / "model")
        file = model / "tokenizer.json"
        file.write_text(file.read_text().replace("<|MASK|>", "<|other|>"))
        file = model / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"mask_token": None}))
        self.run(call, script, files, model).check_error(
            "mask_token_id", str(model), "no free id below vocab_size 512"
        )


@pytest.fixture(scope="module")
def megatron(files: Path) -> Path:
    """The dense model as a Megatron checkpoint."""
    folder = files / "megatron"
    arguments = ("--load", files / "dense", "--save", folder, "--target-format", "megatron")
    assert run_ranks(1, "convert", *arguments, "--device", "cpu").status == 0
    return folder


def misfit(megatron: Path, folder: Path, **config: Any) -> Path:
    """A copy of a Megatron checkpoint that claims another architecture."""
    shutil.copytree(megatron, folder)
    (folder / "iter_0000000" / MANIFEST).unlink()
    file = folder / "iter_0000000" / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"tie_word_embeddings": False}, "has no output_layer.weight"),
        ({"intermediate_size": 96}, "mlp.linear_fc2.weight"),
        ({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, "has shape [2, "),
    ],
)
def test_megatron_checkpoint_that_does_not_fit(
    files: Path, call: Call, megatron: Path, tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    load = misfit(megatron, tmp_path / "run", **config)
    place = f"{load / 'iter_0000000' / 'hf' / 'config.json'}: {next(iter(config))} = "
    call(PRETRAIN, *options(files, load=load)).check_error(place, problem)
    generate = ("--load", load, "--prompt", "x", "--max-response-length", 8, "--device", "cpu")
    call(GENERATE, *generate).check_error(place, problem)


def test_megatron_folder_in_pieces(files: Path, call: Call, megatron: Path, tmp_path: Path) -> None:
    load = misfit(megatron, tmp_path / "run")
    latest = load / "latest_checkpointed_iteration.txt"
    # Another checkpoint is there: it is used, and what is odd is said.
    for text, warning in (("7\n", "iter_0000007 is left out"), ("release", "'release' is no iter")):
        latest.write_text(text)
        found = call(PRETRAIN, *options(files, load=load), "--dry-run")
        assert found.status == 0
        assert re.fullmatch(f"warning: .*{warning}.*\n", found.stderr)
    latest.write_text("0")
    (load / "iter_0000000" / ".metadata").write_bytes(b"cut")
    call(PRETRAIN, *options(files, load=load)).check_error("--load", "damaged")


def test_teacher_with_another_vocabulary(files: Path, call: Call, tmp_path: Path) -> None:
    teacher = save_random_model(tmp_path / "teacher", vocab_size=600)
    call(PRETRAIN, *options(files, teacher_load=teacher)).check_error(
        f"--teacher-load = '{teacher}'", "600", "512", "choose a teacher"
    )


def test_teacher_that_is_no_longer_autoregressive(files: Path, call: Call, tmp_path: Path) -> None:
    teacher = changed_model(files / "dense", tmp_path / "teacher", block_size=4)
    call(PRETRAIN, *options(files, teacher_load=teacher)).check_error(
        f"--teacher-load = '{teacher}'", "is a diffusion model", "--teacher-load"
    )
    # Without a teacher of its own, a run takes the student's weights for it.
    call(PRETRAIN, *options(files, load=teacher)).check_error(
        f"--load = '{teacher}'", "has to be autoregressive"
    )


def test_damaged_teacher(files: Path, call: Call, tmp_path: Path) -> None:
    tensor = "model.norm.weight"
    teacher = changed_tensors(files / "dense", tmp_path / "teacher", drop=tensor)
    call(PRETRAIN, *options(files, teacher_load=teacher)).check_error(
        f"--teacher-load = '{teacher}'", tensor, "is missing"
    )


def test_run_folder_without_its_checkpoints(files: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1\n")
    call(PRETRAIN, *options(files, save=tmp_path)).check_error(
        f"--save = '{tmp_path}'", "its checkpoints are gone", "remove that file"
    )


def test_tool_options(files: Path, call: Call, tmp_path: Path) -> None:
    model = ("--load", files / "dense")
    evaluate = (*model, "--data", files / "examples.jsonl")
    call(GENERATE, *model).check_error("--prompt = None", "give one of the two")
    call(GENERATE, *model, "--prompt", "x", "--prompts", "y").check_error("--prompt = 'x'")
    call(EVALUATE, *model).check_error("--data = None")
    call(EVALUATE, *evaluate, "--settings", "dynamic:2", "--block-size", 4).check_error(
        "--settings = 'dynamic:2'", "write entropy", "dynamic:<threshold, (0, 1]>"
    )
    call(EVALUATE, *evaluate, "--settings", "static,static", "--block-size", 4).check_error("twice")
    call(EVALUATE, *evaluate, "--settings", "static").check_error("add --block-size")
    call(EVALUATE, *evaluate, "--settings", "static:3", "--block-size", 4).check_error(
        "--settings = 'static:3'", "1, 2 or 4 steps"
    )
    call(EVALUATE, *evaluate, "--settings", "static", "--block-size", 4, "--top-k", 5).check_error(
        "--top-k = 5", "--temperature 0 has no use for it"
    )
    call(GENERATE, *model, "--prompt", "x", "--dynamic-threshold", 0.5).check_error(
        "--dynamic-threshold = 0.5", "autoregressive has no use for it", "add --block-size"
    )
    call(GENERATE, *model, "--prompt", "x", "--decoding", "diffusion").check_error(
        "--decoding = 'diffusion'", "add --block-size"
    )
    call(EVALUATE, *evaluate, "--task", "essay").check_error("--task = 'essay'", "exact_match")
    call(EVALUATE, *evaluate, "--max-examples", 0).check_error("--max-examples = 0")
    no_answers = tmp_path / "no_answers.jsonl"
    no_answers.write_text('{"prompt": "1 + 1"}\n')
    call(EVALUATE, *model, "--data", no_answers).check_error(f"{no_answers}:1", '"answer"')
    call(EVALUATE, *evaluate, "--max-response-length", 256).check_error(
        "--max-response-length = 256", "256 positions", "or less"
    )
    call(EVALUATE, *evaluate, "--output", tmp_path).check_error(f"--output = '{tmp_path}'")


def test_flag_error_of_a_process(files: Path) -> None:
    started = time.perf_counter()
    outcome = run_process(PRETRAIN, *options(files), "--no-such-flag")
    seconds = time.perf_counter() - started
    outcome.check_error("'--no-such-flag'")
    assert seconds < 10


@pytest.mark.parametrize("script", [PRETRAIN, GENERATE, EVALUATE], ids=lambda path: path.stem)
def test_flags_are_checked_without_pytorch(script: Path, tmp_path: Path) -> None:
    # A `torch` that cannot be imported stands in front of the real one.
    (tmp_path / "torch.py").write_text("raise RuntimeError('PyTorch was imported')\n")
    path = f"{tmp_path}:{script.parents[1] if script != PRETRAIN else script.parent}"
    outcome = run_process(script, "--load", tmp_path, "--no-such-flag", PYTHONPATH=path)
    outcome.check_error("'--no-such-flag'")


def test_other_ranks_are_silent(files: Path) -> None:
    outcome = run_process(PRETRAIN, *options(files, load="/nowhere"), RANK="1", WORLD_SIZE="2")
    assert outcome == Outcome(2, "", "")


def test_error_of_a_process_that_loads_weights(files: Path, tmp_path: Path) -> None:
    model = changed_tensors(files / "dense", tmp_path / "model", drop="model.norm.weight")
    run_process(PRETRAIN, *options(files, load=model)).check_error("model.norm.weight")


def test_error_of_one_rank_ends_all(files: Path, tmp_path: Path) -> None:
    # Only the last pipeline stage, which is not rank 0, reads the tensor that is broken.
    load = changed_model(files / "dense", tmp_path / "model")
    tensors = load_file(load / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, load / "model.safetensors", metadata={"format": "pt"})
    outcome = run_process(
        PRETRAIN, *options(files, load=load, pipeline_model_parallel_size=2), processes=2
    )
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.stderr
    assert "tensor model.norm.weight holds NaN" in errors[0]
    assert "exitcode  : 2" in outcome.stderr  # torchrun's own status is 1 whatever ours is
    assert "Traceback" not in outcome.stderr.split("error: ")[0]


def test_dry_run(files: Path, call: Call, tmp_path: Path) -> None:
    save = tmp_path / "run"
    outcome = call(PRETRAIN, *options(files, save=save), "--dry-run")
    assert (outcome.status, outcome.stderr) == (0, "")
    config = yaml.safe_load(outcome.stdout)
    assert config["save"] == str(save)
    assert config["rollout_batch_size"] == 4
    assert config["remasking_strategy"] == "low_confidence_dynamic"  # a default is shown too
    assert not save.exists()
    # What it prints is a configuration.
    file = tmp_path / "resolved.yaml"
    file.write_text(outcome.stdout)
    assert call(PRETRAIN, "--config", file, "--dry-run").stdout == outcome.stdout
    on_gpus = call(PRETRAIN, "--config", file, "--device", "cuda", "--dry-run").stdout
    assert on_gpus.splitlines()[-1].startswith("# GB of a GPU, planned (megatron-dlm plan): ")


def test_dry_run_counts_what_an_epoch_has(files: Path, call: Call, tmp_path: Path) -> None:
    lines = (files / "prompts.jsonl").read_text().splitlines(keepends=True)[:6]
    long = json.dumps({"prompt": "1" * 200}) + "\n"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join([*lines, long]))
    epoch = options(files, prompts=prompts, num_rollouts=None, num_epochs=1)
    call(PRETRAIN, *epoch, "--dry-run").check_error(f"{prompts}:7", "--max-prompt-length 128")
    outcome = call(PRETRAIN, *epoch, "--long-prompts", "drop", "--dry-run")
    assert (outcome.status, outcome.stderr) == (0, "")
    assert outcome.stdout.splitlines()[-2:] == [
        "# 6 records; 6 samples in 2 rollouts of 4, the last of 2: 2 updates",
        f"# {prompts}: 1 of 7 prompts dropped, longer than --max-prompt-length",
    ]
    never = call(PRETRAIN, *epoch, "--long-prompts", "drop", "--lr-warmup-iters", "2", "--dry-run")
    never.check_error("--lr-warmup-iters = 2", "choose 0 to 1")
