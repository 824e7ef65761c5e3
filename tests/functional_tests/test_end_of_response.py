"""Files of a model and its tokenizer name different EOS ids: each of them ends a response."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_dlm.data.arithmetic import write_examples
from megatron_dlm.errors import UserError
from megatron_dlm.training.inputs import read_inputs
from megatron_dlm.training.run_folder import find_checkpoint
from tests.functional_tests.entry_points import CONVERT, EVALUATE, Call
from tests.tiny import (
    TOKENIZER,
    run_config,
    run_training,
    save_random_model,
    started_inputs,
    write_data,
)

END_OF_TEXT, END_OF_TURN = 508, 510
SAMPLING = {"do_sample": True, "temperature": 0.6}


def stating(model: Path, configured: object, generated: object) -> Path:
    """The folder, whose files name these ends."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": configured}))
    generation = SAMPLING | {"eos_token_id": generated, "pad_token_id": END_OF_TEXT}
    (model / "generation_config.json").write_text(json.dumps(generation))
    return model


def ends(folder: Path) -> tuple[list[int], list[int]]:
    """What config.json and generation_config.json of a folder list."""
    stated = json.loads((folder / "config.json").read_text())["eos_token_id"]
    return stated, GenerationConfig.from_pretrained(folder).eos_token_id


def test_evaluation_stops_at_the_end_that_only_generation_config_lists(
    tmp_path: Path, call: Call
) -> None:
    """The trained teacher ends its turns with 510, which config.json does not mention."""
    model = shutil.copytree(TOKENIZER, tmp_path / "model")
    stating(model, END_OF_TEXT, [END_OF_TURN, END_OF_TEXT])
    # Not even the tokenizer says it.
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|endoftext|>"}))
    data, results = tmp_path / "data.jsonl", tmp_path / "results.json"
    write_examples(data, "heldout", 3, 8)
    arguments = ("--load", model, "--data", data, "--output", results, "--device", "cpu")
    assert call(EVALUATE, *arguments, "--max-response-length", 96).status == 0
    result = json.loads(results.read_text())["settings"]["autoregressive"]
    assert (result["accuracy"], result["eos_rate"]) == (1.0, 1.0)


def test_runs_and_conversions_keep_every_end(tmp_path: Path, call: Call) -> None:
    write_data(tmp_path, 8)
    model = stating(save_random_model(tmp_path / "model"), END_OF_TEXT, [END_OF_TURN, 500])
    teacher = stating(save_random_model(tmp_path / "teacher"), 7, [END_OF_TURN, 501])
    config = run_config(tmp_path, model, objective="sft", train_iters=1)
    run_training(config)
    run = tmp_path / "run"
    expected = [END_OF_TURN, 500, END_OF_TEXT]
    assert ends(find_checkpoint(run) / "hf") == (expected, expected)
    resumed = run_config(tmp_path, run, objective="sft", train_iters=2)
    assert started_inputs(resumed)[1].special_tokens.eos_token_ids == tuple(expected)

    for target, extra in (("sdar", ()), ("a2d-qwen3", ()), ("megatron", ())):
        out = tmp_path / target
        arguments = ("--load", run, "--save", out, "--target-format", target, *extra)
        assert call(CONVERT, *arguments).status == 0
        folder = find_checkpoint(out) / "hf" if target == "megatron" else out
        assert ends(folder) == (expected, expected)
        assert GenerationConfig.from_pretrained(folder).temperature == SAMPLING["temperature"]

    # What ends the teacher's responses ends the student's; 7 is text that 501 overrides.
    config = run_config(tmp_path, model, objective="opdlm", teacher_load=str(teacher))
    assert read_inputs(config).special_tokens.eos_token_ids == (*expected, 501)


def test_an_exported_model_ends_where_ours_does(tmp_path: Path, call: Call) -> None:
    """transformers reads the exported files, and its autoregressive decoding stops at either."""
    model = stating(save_random_model(tmp_path / "model"), END_OF_TEXT, [END_OF_TURN])
    prompt = AutoTokenizer.from_pretrained(model)("3 + 4", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    before = AutoModelForCausalLM.from_pretrained(model).generate(**prompt, **options)[0].tolist()
    third = before[prompt["input_ids"].shape[1] + 2]
    stating(model, END_OF_TEXT, [third, END_OF_TURN])
    out = tmp_path / "out"
    # The ends are the model's, wherever its tokenizer lies.
    arguments = ("--load", model, "--save", out, "--target-format", "autoregressive")
    assert call(CONVERT, *arguments, "--tokenizer", TOKENIZER).status == 0
    after = AutoModelForCausalLM.from_pretrained(out).generate(**prompt, **options)[0].tolist()
    assert after == before[: before.index(third, prompt["input_ids"].shape[1]) + 1]


def test_an_end_outside_the_vocabulary_goes_nowhere(tmp_path: Path, call: Call) -> None:
    write_data(tmp_path, 8)
    model = save_random_model(tmp_path / "model")
    wrong = stating(save_random_model(tmp_path / "wrong"), END_OF_TURN, [END_OF_TURN, 512])
    named = f"{wrong / 'generation_config.json'}: eos_token_id = [510, 512]: is outside"
    for target in ("autoregressive", "megatron"):
        arguments = ("--load", wrong, "--save", tmp_path / "out", "--target-format", target)
        call(CONVERT, *arguments).check_error(named)
    # The student is to learn to write what ends the teacher's responses.
    config = run_config(tmp_path, model, objective="opdlm", teacher_load=str(wrong))
    with pytest.raises(UserError) as error:
        read_inputs(config)
    assert str(error.value).startswith(named)
