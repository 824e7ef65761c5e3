"""The command `convert` as a function; its options are in `commands.convert`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_dlm.commands.convert import ConversionConfig, DType
from megatron_dlm.config import Config, ModelConfig, ParallelConfig, validate_inference
from megatron_dlm.conversion.formats import default_format
from megatron_dlm.conversion.hf_export import export_hf
from megatron_dlm.conversion.model_card import Provenance, read_scores
from megatron_dlm.conversion.peft_export import AdapterSettings, check_base_model, export_peft
from megatron_dlm.data.tokenizer import (
    eos_token_ids,
    has_tokenizer,
    load_tokenizer,
    special_tokens_of,
    unusable_tokens,
)
from megatron_dlm.entry import rank, world_size
from megatron_dlm.errors import UserError, bad_value
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.output_file import check_output_folder
from megatron_dlm.parallel import initialized
from megatron_dlm.report.run_record import read_runs
from megatron_dlm.terminal import say
from megatron_dlm.training.checkpoint_saving import save_checkpoint
from megatron_dlm.training.checkpointing import AdapterUse, saved_config, saved_progress
from megatron_dlm.training.model_source import ModelSource, open_model_source
from megatron_dlm.training.rate_precision import config_of_run, unseen_in_bf16
from megatron_dlm.training.run_folder import find_checkpoint, iteration_folder, latest_iteration

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def stored_dtype(choice: DType, architecture: Architecture) -> torch.dtype:
    """The type of the converted weights.

    Raises:
        UserError: `auto`, and config.json states a type that models are not built in.
    """
    name: str = choice
    if choice == "auto":
        config = architecture.hf_config
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise bad_value(
            "--dtype", choice, f"config.json states {name}", f"choose {' or '.join(DTYPES)}"
        )
    return DTYPES[name]


def with_dtype(hf_config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json that states the type of the weights, under its old and its new name."""
    name = str(dtype).removeprefix("torch.")
    return hf_config | {"dtype": name, "torch_dtype": name}


def check_target(arguments: ConversionConfig) -> Path:
    """The folder to write.

    Raises:
        UserError: It was not named, exists, cannot be written, or holds what is read or no model.
    """
    if arguments.save is None:
        raise bad_value("--save", None, "nothing to write to", "name a new folder")
    target = Path(arguments.save)
    # Into a run folder, a converted checkpoint would become the one that the run goes on from.
    may_replace = arguments.overwrite and arguments.target_format != "megatron"
    if target.exists() and not may_replace:
        remedy = "name a new folder"
        if arguments.target_format != "megatron":
            remedy += " or add --overwrite"
        raise bad_value("--save", arguments.save, "already exists", remedy)
    inputs = [
        ("--load", arguments.load),
        ("--tokenizer", arguments.tokenizer),
        ("--base-model", arguments.base_model),
    ]
    check_output_folder(target, "--save", inputs)
    is_model = any((target / name).is_file() for name in ("config.json", "adapter_config.json"))
    if target.is_dir() and any(target.iterdir()) and not is_model:
        problem = "holds no Hugging Face model, which --overwrite replaces"
        raise bad_value("--save", arguments.save, problem, "name another folder, or empty it")
    return target


def check_autoregressive(source: ModelSource) -> None:
    """Check that a model written as `autoregressive` predicts the next token.

    Raises:
        UserError: It is a diffusion model of another kind.
    """
    kind = source.diffusion_kind
    if kind is None or kind.has_causal_context:  # the second mode is the folder's only one
        return
    if kind.attention_pattern == "causal" and kind.shifted:
        return
    raise bad_value(
        "--target-format",
        "autoregressive",
        f"{source.hf_folder / 'config.json'} states a diffusion model with "
        f"{kind.attention_pattern} attention; the folder would be read as autoregressive",
        "choose the format of a diffusion model, such as sdar",
    )


def find_adapters(
    conversion: ConversionConfig, source: ModelSource
) -> tuple[AdapterUse, AdapterSettings | None, ModelSource | None]:
    """How to write the adapters of a run; for peft also their settings and base model.

    Raises:
        UserError: There are none to write or leave out, the base model is not theirs, or options
            contradict each other.
    """
    is_peft = conversion.target_format == "peft"
    if conversion.base_model is not None and not is_peft:
        remedy = "remove it, or choose --target-format peft"
        raise bad_value("--base-model", conversion.base_model, "only peft names one", remedy)
    if conversion.without_adapters and is_peft:
        remedy = "leave it out, or write the base model in another format"
        raise bad_value("--without-adapters", True, "peft is the adapters alone", remedy)
    if not is_peft and not conversion.without_adapters:
        return "merge", None, None
    run_config = saved_config(source.path) if source.is_megatron else {}
    settings = AdapterSettings.of_run(run_config, str(source.path))
    if not is_peft:
        return "remove", None, None
    base = open_model_source(conversion.base_model or run_config["load"], "--base-model")
    check_base_model(base, source)
    return "keep", settings, base


def _is_same_model(source: ModelSource, load: str) -> bool:
    """Whether a path, as it was given to another command, names the model or its run's newest."""
    named = Path(load).resolve()
    if not source.is_megatron:
        return named == source.path.resolve()
    checkpoint = find_checkpoint(source.path, "--load").resolve()
    newest = latest_iteration(checkpoint.parent)
    is_newest = newest is not None and checkpoint == iteration_folder(checkpoint.parent, newest)
    return named == checkpoint or (is_newest and named == checkpoint.parent)


def read_provenance(source: ModelSource, scores: str | None) -> Provenance:
    """What is known of where a model's weights come from: its run's folder, and files of scores.

    Scores of other weights, as far as paths tell, are a warning.

    Raises:
        UserError: A file of scores cannot be read or holds something else.
    """
    own: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for path in scores.split(",") if scores else ():
        results = read_scores(path.strip(), "--scores")
        is_own = _is_same_model(source, results["load"])
        (own if is_own else others).append(results)
        if not is_own and rank() == 0:
            line = f"scores in {path.strip()} are of {results['load']}, not of {source.path}"
            say(f"warning: {line}", error=True)
    config = saved_config(source.path) if source.is_megatron else {}
    known = Provenance(config=config, scores=own, other_scores=others)
    progress = saved_progress(source.path) if config else None
    if progress is None:
        return known
    try:
        [run] = read_runs([find_checkpoint(source.path, "--load").parent])
    except UserError:  # the checkpoint was moved, and its run stayed
        return known
    starts = [event for event in run.history if event["event"] in ("started", "resumed")]
    return replace(
        known,
        metrics=next((line for line in run.metrics if line["step"] == progress.iteration), {}),
        started=starts[-1] if starts else {},
    )


def find_special_tokens(
    source: ModelSource, tokenizer_folder: Path, *, needs_mask: bool
) -> tuple[Architecture, int | None]:
    """The architecture with all ids that end a response, and the id of MASK, as in training."""
    architecture = source.architecture
    if not needs_mask and not has_tokenizer(tokenizer_folder):
        return architecture, None
    tokenizer = load_tokenizer(tokenizer_folder)
    generation_config = architecture.generation_config
    if needs_mask:
        special = special_tokens_of(tokenizer, architecture, tokenizer_folder)
        return architecture.ending_at(special.eos_token_ids), special.mask_token_id
    ends = eos_token_ids(
        tokenizer,
        architecture.hf_config,
        generation_config,
        str(tokenizer_folder),
        architecture.file,
    )
    return architecture.ending_at(ends) if ends else architecture, None


def run_conversion(conversion: ConversionConfig, parallel: ParallelConfig) -> tuple[Path, str, str]:
    """Validate, load, write; warns on standard error of what the written folder lacks.

    Returns:
        The folder that was written, its format, and the type of its weights.

    Raises:
        UserError: Anything that could not work.
    """
    target = check_target(conversion)
    if conversion.load is None:
        raise bad_value("--load", None, "nothing to convert", "name a model or run folder")
    source = open_model_source(conversion.load, "--load", conversion.verify_checkpoint).attending(
        conversion.attention_pattern, conversion.block_size
    )
    _ = source.diffusion_kind  # a config.json that does not say how the model attends is refused
    architecture = source.architecture
    target_format = conversion.target_format or default_format(architecture)
    dtype = stored_dtype(conversion.dtype, architecture)
    config = Config(model=ModelConfig(bf16=dtype == torch.bfloat16), parallel=parallel)
    validate_inference(config, world_size(), architecture)
    adapters, adapter_settings, base = find_adapters(conversion, source)
    # The weights under a run's adapters may be an autoregressive model's, whatever the run trained.
    if target_format == "autoregressive" and adapters != "remove":
        check_autoregressive(source)
    if conversion.scores is not None and target_format == "megatron":
        remedy = "drop it, or write a Hugging Face folder"
        raise bad_value("--scores", conversion.scores, "only a model card shows them", remedy)
    provenance = read_provenance(source, conversion.scores)
    tokenizer_folder = Path(conversion.tokenizer) if conversion.tokenizer else source.hf_folder
    block_size = conversion.block_size or architecture.hf_config.get("block_size")
    architecture, mask_token_id = find_special_tokens(
        source,
        tokenizer_folder,
        needs_mask=target_format not in ("megatron", "autoregressive", "peft"),
    )

    with initialized(config):
        model = build_model(architecture, config)
        source.load_into(model, adapters)
        if target_format == "megatron":
            save_checkpoint(
                target,
                model,
                hf_config=with_dtype(architecture.hf_config, dtype),
                generation_config=architecture.generation_config,
                tokenizer_folder=tokenizer_folder,
            )
        elif adapter_settings is not None and base is not None:
            export_peft(
                model,
                architecture,
                target,
                adapters=adapter_settings,
                base=base,
                dtype=dtype,
                overwrite=conversion.overwrite,
                provenance=provenance,
            )
        else:
            export_hf(
                model,
                architecture,
                target,
                format=target_format,
                tokenizer_folder=tokenizer_folder,
                block_size=block_size,
                mask_token_id=mask_token_id,
                dynamic_threshold=conversion.dynamic_threshold,
                dtype=dtype,
                max_shard_size=conversion.max_shard_size_mb * 10**6,
                overwrite=conversion.overwrite,
                provenance=provenance,
            )
    if rank() == 0:
        if has_tokenizer(tokenizer_folder):
            tokenizer = load_tokenizer(tokenizer_folder)
            if line := unusable_tokens(tokenizer, architecture.vocab_size, str(tokenizer_folder)):
                say(line, error=True)
        if source.is_megatron and dtype == torch.bfloat16 and adapters == "merge":
            run_config = config_of_run(saved_config(source.path))
            for line in unseen_in_bf16(run_config, architecture):
                say(line, error=True)
    return target, target_format, str(dtype).removeprefix("torch.")
