"""The model card of an export, read by the Hub's own library, and its code run as it stands."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from megatron_dlm.config import Config
from megatron_dlm.config.objective_traits import OBJECTIVE_TRAITS
from megatron_dlm.conversion.model_card import METHODS, Provenance, model_card
from megatron_dlm.models.architecture import read_architecture
from tests.tiny import REPOSITORY

TINY = REPOSITORY / "examples" / "tiny"
RESULTS = {
    "load": "/home/somebody/runs/mine",
    "data": "/home/somebody/test.jsonl",
    "task": "gsm8k",
    "num_examples": 200,
    "settings": {
        "static": {"accuracy": 0.8125, "accuracy_std": 0.0123, "tokens_per_forward": 1.0},
        "dynamic:0.9": {"accuracy": 0.75, "tokens_per_forward": None},
    },
}


def _blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("objective", OBJECTIVE_TRAITS)
def test_card_of_a_run(objective: str) -> None:
    architecture = read_architecture(TINY / "qwen3_moe")
    kind = {"attention_pattern": "block_causal", "shifted": False, "block_size": 4}
    config = Config.from_dict(
        {
            "load": "/home/somebody/models/base-7",
            "teacher_load": "/home/somebody/models/large-9/",
            "objective": objective,
            "prompts": "/home/somebody/a|b.jsonl",
            "prompt_suffix_by_domain": {"math": "Think: `step` / by step"},
            "lr": 3e-5,
            "save": "/home/somebody/runs/mine",
        }
    ).to_dict()
    provenance = Provenance(
        config=config | {"option_of_an_older_version": None},
        metrics={
            "step": 1200,
            "trained_tokens_total": 1234567,
            "validation_loss": 0.5,
            "evaluation": {"static": {"accuracy": 0.5, "tokens_per_forward": 1.25}},
        },
        started={"version": "1.2", "commit": "0123456789abcdef", "environment": {"torch": "2.13"}},
        scores=[RESULTS],
        other_scores=[RESULTS | {"load": "others/teacher"}],
    )
    text = model_card(
        replace(architecture, hf_config=architecture.hf_config | kind),
        name="mine",
        format="sdar",
        dtype=torch.bfloat16,
        block_size=4,
        mask_token_id=510,
        dynamic_threshold=0.7,
        provenance=provenance,
    )
    assert "somebody" not in text  # what lies where is nobody's business
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert {"block-diffusion", "sdar", "qwen3"} <= set(card.data.tags)
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {
        "accuracy, static": 0.8125,
        "accuracy, dynamic:0.9": 0.75,
    }
    for row in (
        "| gsm8k | mine | `static` | 81.2 % ± 1.2 | 1.00 | 200 |",
        "| gsm8k | mine | `dynamic:0.9` | 75.0 % | - | 200 |",
        "| gsm8k | teacher | `static` | 81.2 % ± 1.2 | 1.00 | 200 |",
        "| held-out prompts | the run | `static` | 50.0 % | 1.25 | all |",
        "| updates | 1,200 |",
        "| tokens trained on, over all updates | 1,234,567 |",
        "| block size | 4, counted from the first token of the prompt |",
        "| id of MASK | 510 |",
        "| prompts | `a\\|b.jsonl` |",
    ):
        assert row in text
    assert METHODS[objective] in text
    assert "The teacher was large-9." in text
    assert "megatron-dlm 1.2 (commit 0123456789ab), torch 2.13" in text
    assert "held-out data of the run was 0.5" in text
    # With the names of paths alone, the recipe is the run's configuration.
    [recipe] = _blocks(text, "yaml")
    options = yaml.safe_load(recipe)
    assert options.pop("load") == "base-7"
    assert options.pop("teacher_load") == "large-9"
    assert options.pop("prompts") == "a|b.jsonl"
    assert options.pop("option_of_an_older_version", None) is None
    rest = {name: value for name, value in config.items() if name in options}
    assert options == rest
    assert {"prompt_suffix_by_domain", "lr"} <= set(options)
    assert "\n\n\n" not in card.text


def test_code_of_the_card_runs(tmp_path: Path, convert, capsys) -> None:
    scores = tmp_path / "results.json"
    scores.write_text(json.dumps(RESULTS))
    for format, words in (
        ("sdar", "Do not change the block size of 4"),
        ("autoregressive", "it predicts the next token only"),
    ):
        out = tmp_path / format
        arguments = ("--load", TINY / "qwen3", "--save", out, "--target-format", format)
        status, error = convert(*arguments, "--block-size", 4, "--scores", scores)
        assert status == 0
        assert f"scores in {scores} are of {RESULTS['load']}, not of {TINY / 'qwen3'}" in error
        text = (out / "README.md").read_text()
        assert ModelCard(text).data.eval_results is None
        assert words in text
        assert "without a record of how they were made" in text
        assert "| gsm8k | mine | `static` |" in text
        capsys.readouterr()
        [code] = _blocks(text, "python")
        exec(code, {"folder": str(out)})
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", json.dumps(RESULTS | {"settings": {"static": {"accuracy": "1"}}})]
)
def test_what_is_no_results_file_is_refused(tmp_path: Path, convert, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    arguments = ("--load", TINY / "qwen3", "--save", tmp_path / "out", "--target-format", "sdar")
    scores = ("--block-size", 4, "--scores", tmp_path / "results.json")
    status, error = convert(*arguments, *scores)
    assert status == 2
    assert error.startswith(f"error: --scores = '{tmp_path / 'results.json'}': ")
    assert error.count("\n") <= 1
    assert not (tmp_path / "out").exists()


def test_model_without_a_chat_template_continues_a_text(tmp_path: Path, convert, capsys) -> None:
    source = shutil.copytree(TINY / "qwen3", tmp_path / "source")
    (source / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    scores = tmp_path / "results.json"
    scores.write_text(json.dumps(RESULTS | {"load": str(source)}))
    out = tmp_path / "out"
    status, error = convert(
        *("--load", source, "--save", out, "--block-size", 4, "--scores", scores)
    )
    assert (status, error) == (0, "")
    text = (out / "README.md").read_text()
    assert "chat template" not in text
    assert len(ModelCard(text).data.eval_results) == 2  # of these very weights
    capsys.readouterr()
    exec(_blocks(text, "python")[0], {"folder": str(out)})
    assert capsys.readouterr().out.strip()
