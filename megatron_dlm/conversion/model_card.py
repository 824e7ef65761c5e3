"""The model card of an export, `README.md` in its folder: what it is, how made, how used.

The metadata at its head is what the Hugging Face Hub reads. Of paths, only the last part is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

import megatron_dlm
from megatron_dlm.config import Config
from megatron_dlm.config.objective_traits import OBJECTIVE_TRAITS
from megatron_dlm.errors import bad_value
from megatron_dlm.json_file import read_json_object
from megatron_dlm.models.architecture import (
    SGLANG_CONFIG_FILE,
    Architecture,
    active_parameters,
    parameter_counts,
    read_diffusion_kind,
)
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, DiffusionKind

MODEL_CARD = "README.md"

_DATA_OPTIONS = {
    "prompts": "prompts",
    "train_data": "prompts with responses",
    "data_path": "corpus",
    "eval_prompts": "held-out prompts",
    "valid_data": "held-out examples",
    "valid_data_path": "held-out corpus",
}

_TOTALS = {
    "step": "updates",
    "response_tokens_total": "tokens of the responses",
    "trained_tokens_total": "tokens trained on, over all updates",
}
"""Of the last line of metrics.jsonl."""

METHODS: dict[str, str] = {
    "opdlm": "on-policy distillation (OPDLM): it wrote responses by block diffusion, and was "
    "trained at the states it had visited towards the distributions of an autoregressive teacher",
    "opdlm_off": "distillation on its own responses: it wrote them by block diffusion, and was "
    "trained at random states of them towards the distributions of an autoregressive teacher",
    "off_policy": "off-policy distillation: an autoregressive teacher wrote responses, and it was "
    "trained at random states of them towards that teacher's distributions",
    "sft": "supervised fine-tuning (BD3LM): it was trained to fill in MASKs of given responses",
    "scp": "continual pretraining (SCP of RND1): it was trained to fill in MASKs of a corpus",
    "next_token": "autoregressive training on the next token",
    "d_opsd": "self-distillation (d-OPSD): of its right responses, it was trained at the states "
    "that it had visited towards its own distributions with later text shown",
}
"""What each objective does to a model, by name."""

_ATTENTION = {
    "block_causal": "block-causal: a block sees itself and all earlier blocks",
    "full": "full: every position sees every other",
    "causal": "causal",
}
_CAUSAL_CONTEXT = (
    "a block that is denoised sees itself and all earlier tokens; finished tokens see those before "
    "them (a causal context), so that logits at a finished token predict the next one"
)


@dataclass(frozen=True)
class Provenance:
    """What is known of where the weights come from.

    Attributes:
        config: Flat options of the run that wrote them; empty without a run.
        metrics: The run's line of metrics.jsonl at these weights; empty where it is not there.
        started: The run's last start in history.jsonl; empty likewise.
        scores: Files of results of `megatron-dlm evaluate` on these weights.
        other_scores: On weights that may be others; shown, but not in the metadata.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    started: Mapping[str, Any] = field(default_factory=dict)
    scores: Sequence[Mapping[str, Any]] = ()
    other_scores: Sequence[Mapping[str, Any]] = ()


def read_scores(path: str, flag: str) -> dict[str, Any]:
    """Read a file of results of `megatron-dlm evaluate`.

    Raises:
        UserError: It cannot be read or holds something else.
    """
    results = read_json_object(Path(path), flag)
    settings = results.get("settings")
    is_known = (
        isinstance(settings, dict)
        and bool(settings)
        and all(
            isinstance(rates, dict) and isinstance(rates.get("accuracy"), int | float)
            for rates in settings.values()
        )
        and all(isinstance(results.get(key), str) for key in ("load", "task"))
        and isinstance(results.get("num_examples"), int)
    )
    if not is_known:
        problem = "holds no results of megatron-dlm evaluate"
        raise bad_value(flag, path, problem, "name the --output of that command")
    return results


def model_card(
    architecture: Architecture,
    *,
    name: str,
    format: str,
    dtype: torch.dtype,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    dynamic_threshold: float | None = None,
    base_model: str | None = None,
    has_chat_template: bool = True,
    provenance: Provenance | None = None,
) -> str:
    """The card of a folder as Markdown.

    Args:
        architecture: Architecture of the model; its config.json has the kind of diffusion model.
        name: Of the folder.
        format: Target format.
        dtype: Type of the stored tensors.
        block_size: That it was trained with, or is decoded with; None for none.
        mask_token_id: Id of MASK; None for an autoregressive model.
        dynamic_threshold: Confidence threshold to decode with.
        base_model: The model that adapters belong on, in the `peft` format.
        has_chat_template: Whether the tokenizer has one.
        provenance: Where the weights come from; None: nothing is known.
    """
    about = provenance or Provenance()
    kind = read_diffusion_kind(architecture.hf_config)
    if format == "autoregressive":
        kind = None
    elif format == "sdar":  # what the format makes of any model
        kind = BLOCK_DIFFUSION
    given = (*about.scores, *about.other_scores)
    scores = [*_own_scores(about), *(score for results in given for score in _scores(results))]
    card = Environment(
        autoescape=False, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    text = card.from_string(files(megatron_dlm.conversion).joinpath("model_card.md").read_text())
    return text.render(
        metadata=_metadata(architecture, name, format, kind, about).to_yaml(),
        name=name,
        introduction=_introduction(kind, block_size, about),
        facts=[
            (key, _cell(value))
            for key, value in _facts(architecture, format, dtype, kind, block_size, mask_token_id)
        ],
        origin=_origin(about),
        data=[(key, _cell(value)) for key, value in _data(about)],
        recipe=_recipe(about.config),
        scores=scores,
        held_out=_held_out(about),
        decoding=_decoding(format, kind, dynamic_threshold, base_model, has_chat_template),
        warnings=_warnings(format, kind, block_size, has_chat_template),
    )


def _cell(value: object) -> str:
    """A value as a cell of a table."""
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")


def _last_part(value: Any) -> Any:
    """A path's last part; an address, and what is no path, as it is."""
    if not isinstance(value, str) or "://" in value or "/" not in value.rstrip("/"):
        return value
    return value.rstrip("/").rpartition("/")[2]


def _metadata(
    architecture: Architecture,
    name: str,
    format: str,
    kind: DiffusionKind | None,
    about: Provenance,
) -> ModelCardData:
    tags = ["megatron-dlm", architecture.family]
    if kind is not None:
        tags += ["diffusion-language-model", format]
    if kind is not None and kind.attention_pattern == "block_causal":
        tags.append("block-diffusion")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=score["task"],
            dataset_name=score["task"],
            metric_type="accuracy",
            metric_name=f"accuracy, {score['setting']}",
            metric_value=score["value"],
        )
        for results in about.scores
        for score in _scores(results)
    ]
    return ModelCardData(
        library_name="peft" if format == "peft" else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _introduction(kind: DiffusionKind | None, block_size: int | None, about: Provenance) -> str:
    if kind is None:
        what = "An autoregressive language model"
    elif kind.attention_pattern == "block_causal":
        what = f"A block-diffusion language model with blocks of {block_size} tokens"
    elif kind.attention_pattern == "full":
        what = "A diffusion language model with full attention"
    else:
        what = "A language model with causal attention that was trained to fill in MASKs"
    if kind is not None and kind.has_causal_context:
        what += ", and an autoregressive one in the same weights"
    start = _last_part(about.config.get("load"))
    made = f", made from {start}" if start else ""
    return f"{what}{made}, written by megatron-dlm {megatron_dlm.__version__}."


def _count(parameters: int) -> str:
    """A number of parameters in millions, or billions where it is one."""
    if parameters >= 10**9:
        return f"{parameters / 1e9:.3g} billion"
    return f"{parameters / 1e6:.3g} million"


def _facts(
    architecture: Architecture,
    format: str,
    dtype: torch.dtype,
    kind: DiffusionKind | None,
    block_size: int | None,
    mask_token_id: int | None,
) -> list[tuple[str, object]]:
    size, experts = _count(sum(parameter_counts(architecture))), ""
    if architecture.is_moe:
        size += f", of which a token meets {_count(active_parameters(architecture))}"
        experts = f", {architecture.num_moe_experts} experts a layer"
    facts: list[tuple[str, object]] = [
        ("format", f"`{format}`"),
        ("network", f"{architecture.family}, {architecture.num_layers} layers{experts}"),
        ("parameters", size),
        ("type of the tensors", str(dtype).removeprefix("torch.")),
        ("positions", architecture.max_position_embeddings),
    ]
    if kind is None:
        return [*facts, ("attention", _ATTENTION["causal"])]
    predicted = "token i + 1" if kind.shifted else "token i"
    attention = _CAUSAL_CONTEXT if kind.has_causal_context else _ATTENTION[kind.attention_pattern]
    facts.append(("attention", attention))
    facts.append(("logits at position i predict", predicted + _at_masks(kind)))
    if block_size is not None:
        facts.append(("block size", f"{block_size}, counted from the first token of the prompt"))
    if mask_token_id is not None:
        facts.append(("id of MASK", mask_token_id))
    return facts


def _at_masks(kind: DiffusionKind) -> str:
    return " where it is MASK" if kind.has_causal_context else ""


def _origin(about: Provenance) -> str:
    if not about.config:
        return "The weights come without a record of how they were made."
    traits = OBJECTIVE_TRAITS.get(about.config.get("objective", ""))
    objective = str(about.config.get("objective"))
    method = METHODS.get(objective, objective)
    sentences = [f"Method: {method}."]
    if teacher := _last_part(about.config.get("teacher_load")):
        sentences.append(f"The teacher was {teacher}.")
    elif traits and traits.uses_teacher and not traits.self_distillation:
        sentences.append("The teacher was the model that it was made from.")
    if about.config.get("lora_rank"):
        sentences.append(f"Adapters of rank {about.config['lora_rank']} were trained (LoRA).")
    if about.started:
        environment = about.started.get("environment") or {}
        versions = [f"megatron-dlm {about.started.get('version')}"]
        if commit := about.started.get("commit"):
            changed = " with changes" if about.started.get("uncommitted_changes") else ""
            versions[0] += f" (commit {str(commit)[:12]}{changed})"
        versions += [
            f"{package} {environment[package]}"
            for package in ("megatron-core", "torch", "transformers")
            if environment.get(package)
        ]
        sentences.append(f"Software: {', '.join(versions)}.")
    return " ".join(sentences)


def _data(about: Provenance) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        (label, f"`{_last_part(about.config[option])}`")
        for option, label in _DATA_OPTIONS.items()
        if about.config.get(option)
    ]
    rows += [
        (label, f"{about.metrics[key]:,}")
        for key, label in _TOTALS.items()
        if isinstance(about.metrics.get(key), int)
    ]
    return rows


def _recipe(config: Mapping[str, Any]) -> str:
    """The options that differ from their defaults as YAML."""
    defaults = Config().to_dict()
    changed = {
        name: _last_part(value)
        for name, value in config.items()
        if name != "save" and value != defaults.get(name)
    }
    # JSON first: YAML would write Python's own types with tags that nothing else reads.
    plain = json.loads(json.dumps(changed, default=str))
    return yaml.safe_dump(plain, sort_keys=False, width=100).rstrip() if changed else ""


def _scores(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    scores = []
    for setting, rates in results["settings"].items():
        accuracy = f"{100 * rates['accuracy']:.1f} %"
        if isinstance(deviation := rates.get("accuracy_std"), int | float):
            accuracy += f" ± {100 * deviation:.1f}"
        speed = rates.get("tokens_per_forward")
        scores.append(
            {
                "task": _cell(_last_part(results["task"])),
                "measured_on": _cell(_last_part(results["load"])),
                "setting": _cell(setting),
                "accuracy": accuracy,
                "value": round(rates["accuracy"], 4),
                "tokens_per_forward": f"{speed:.2f}" if isinstance(speed, int | float) else "-",
                "examples": results["num_examples"],
            }
        )
    return scores


def _own_scores(about: Provenance) -> list[dict[str, Any]]:
    """Rates of the run's answers to its held-out prompts, if it measured them at these weights."""
    evaluation = about.metrics.get("evaluation")
    if not isinstance(evaluation, Mapping):
        return []
    return _scores(
        {
            "task": about.config.get("eval_prompts") or "held-out prompts",
            "load": "the run",
            "num_examples": about.config.get("eval_num_prompts") or "all",
            "settings": evaluation,
        }
    )


def _held_out(about: Provenance) -> str:
    loss = about.metrics.get("validation_loss")
    if not isinstance(loss, int | float):
        return ""
    return f"The loss on the held-out data of the run was {loss:.4g} after the last update."


_GENERATE = """\
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = {auto_class}.from_pretrained(folder, trust_remote_code=True)
{encoding}
tokens = model.generate(**prompt, max_new_tokens=256{arguments})
print(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))"""


_CHAT = """\
chat = [{"role": "user", "content": "What is 17 + 25?"}]
prompt = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""

_TEXT = """\
prompt = tokenizer("17 + 25 =", return_tensors="pt", return_token_type_ids=False)"""


def _decoding(
    format: str,
    kind: DiffusionKind | None,
    threshold: float | None,
    base_model: str | None,
    has_chat_template: bool,
) -> list[tuple[str, str, str]]:
    """Ways to decode: a sentence, and code in a language."""
    ways = []
    arguments = ""
    if kind is not None and kind.attention_pattern == "block_causal" and threshold is not None:
        arguments = f", dynamic_threshold={threshold}"
    if format == "peft":
        code = (
            "from peft import PeftModel\n\n# base: the model that the adapters belong on, "
            "as its own card says\nmodel = PeftModel.from_pretrained(base, folder)"
        )
        ways.append((f"The adapters belong on {_last_part(base_model)}:", "python", code))
        return ways
    auto_class = "AutoModelForMaskedLM" if format == "rnd1" else "AutoModelForCausalLM"
    encoding = _CHAT if has_chat_template else _TEXT
    code = _GENERATE.format(auto_class=auto_class, encoding=encoding, arguments=arguments)
    if kind is None:
        code = code.replace(", trust_remote_code=True", "")
        ways.append(("With transformers:", "python", code))
    else:
        ways.append(
            ("With transformers, by the modelling code in this folder:", "python", code),
        )
    if kind is not None and kind.has_causal_context:
        what = (
            "The same distribution as from left to right, in fewer forwards: drafts are verified:"
        )
        speculative = 'tokens = model.generate(**prompt, remasking_strategy="speculative")'
        ways.append((what, "python", speculative))
    if format == "sdar":
        ways.append(
            (
                "With SGLang, which knows MASK by its id in Qwen3's vocabulary only:",
                "bash",
                "python -m sglang.launch_server --model-path FOLDER --trust-remote-code \\\n"
                "    --dllm-algorithm LowConfidence "
                f"--dllm-algorithm-config FOLDER/{SGLANG_CONFIG_FILE}",
            )
        )
    command = "megatron-dlm generate --load FOLDER --prompt 'What is 17 + 25?'"
    if arguments:
        command += f" --dynamic-threshold {threshold}"
    ways.append(("With this project:", "bash", command))
    return ways


def _warnings(
    format: str, kind: DiffusionKind | None, block_size: int | None, has_chat_template: bool
) -> list[str]:
    warnings = []
    if kind is not None and kind.has_causal_context:
        warnings.append(
            "Do not decode it with code that lets the tokens of a finished block see each other, "
            "as servers of block-diffusion models do: its context is causal."
        )
    elif kind is not None:
        warnings += [
            "Do not take the logits of a text without MASK for next-token distributions: "
            "likelihoods and perplexities computed from them mean nothing.",
            "Do not decode it with code for autoregressive models, which draws token by token.",
        ]
    if kind is not None:
        if format != "autoregressive":
            shift = "i + 1, not i" if kind.shifted else "i, not i + 1"
            where = f"those at position i are for token {shift}{_at_masks(kind)}"
            warnings.append(f"Do not move the logits: {where}.")
        if kind.attention_pattern == "block_causal":
            warnings.append(
                f"Do not change the block size of {block_size} or count blocks from the response: "
                "the model has seen no others."
            )
        warnings.append("Do not give MASK another id or resize the vocabulary.")
    else:
        warnings.append("Do not decode it as a diffusion model: it predicts the next token only.")
    if format == "peft":
        warnings.append("Do not put the adapters onto other weights than those named above.")
    if has_chat_template:
        warnings.append("Do not leave out the chat template.")
    warnings += [
        "Do not trust its answers unchecked. Training like this one changes what a model can do, "
        "and tests for harm that its origin passed say nothing about it.",
        "Do not pass it on under other terms: its origin's licence still holds.",
    ]
    return warnings
