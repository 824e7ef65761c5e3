"""The Python interface: `load`, `generate`, `loss`, `convert`; one process, no launcher.

    import megatron_dlm

    model = megatron_dlm.load("hf/qwen3_8b", bf16=True)
    [response] = megatron_dlm.generate(model, "What is 17 + 25?")
    print(response.text, response.tokens_per_forward)

Results are those of the commands with the same options. Input that cannot work raises `UserError`,
whose text is the line that a command prints. The process groups that Megatron-Core needs exist from
the first open model to the last; the state of the caller's random generators is restored.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_dlm.commands.conversion import run_conversion
from megatron_dlm.commands.convert import Arguments as ConversionArguments
from megatron_dlm.config import Config, ParallelConfig, validate
from megatron_dlm.config.coercion import build
from megatron_dlm.config.objective_traits import OBJECTIVE_TRAITS
from megatron_dlm.data.json_records import RecordsInMemory
from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.prompts import read_examples
from megatron_dlm.data.record_source import RecordSource
from megatron_dlm.data.tokenizer import load_tokenizer, special_tokens_of
from megatron_dlm.entry import world_size
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.generation import (
    Generator,
    load_frozen_model,
    read_inference_inputs,
)
from megatron_dlm.evaluation.options import InferenceArguments, InferenceSetup, resolve_inference
from megatron_dlm.models.model import StageModel
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.training.validation import Validation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = Mapping[str, Any]
Records = str | Path | Sequence[Record]
"""A JSONL file, or its records."""

OF_THE_MODEL = {"load", "tokenizer", "bf16", "attention_pattern", "verify_checkpoint"} | {
    option.name for option in fields(ParallelConfig)
}
"""Options of `load` that cannot change later."""


@dataclass(frozen=True)
class Response:
    """One response.

    Attributes:
        text: Without special tokens.
        token_ids: Up to and including the end of the response.
        finish_reason: "eos" or "length".
        tokens_per_forward: Response tokens for each forward that drew tokens.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    tokens_per_forward: float


class _Groups:
    """The process groups that all open models of this process share."""

    def __init__(self) -> None:
        self._users = 0
        self._stack = ExitStack()

    def enter(self, config: Config) -> None:
        if not self._users:
            with torch.random.fork_rng():  # initialising them sets seeds
                self._stack.enter_context(initialized(config))
        self._users += 1

    def leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._stack.close()


_GROUPS = _Groups()


class Model:
    """A frozen model in memory, made by `load`.

    It is freed by `close`, at the end of a `with` block, or when it is garbage-collected.

    Attributes:
        tokenizer: From the folder of the weights, or as passed to `load`.
        options: The options of `load`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        if world_size() > 1:
            raise bad_value(
                "WORLD_SIZE",
                world_size(),
                "the Python interface is for one process",
                "run the commands under torchrun",
            )
        self.options = dict(options)
        setup = resolve_inference(build(InferenceArguments, self.options, "load()"), 1)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(setup.tokenizer_folder)
        _GROUPS.enter(setup.config)
        self._closing = weakref.finalize(self, _GROUPS.leave)
        try:
            with torch.random.fork_rng():
                self._module: StageModel | None = load_frozen_model(setup)
        except BaseException:
            self._closing()
            raise

    @property
    def module(self) -> StageModel:
        """The PyTorch module.

        Raises:
            UserError: The model is closed.
        """
        if self._module is None:
            raise bad_value("model", self.options["load"], "is closed", "load it again")
        return self._module

    def close(self) -> None:
        """Free the weights and, with the last model, the process groups."""
        self._module = None
        self._closing()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def load(folder: str | Path, **options: Any) -> Model:
    """Load a model: Hugging Face folder, run folder or one of its checkpoints.

    Args:
        folder: Path of the model.
        options: Those of `megatron-dlm generate`, by name: `bf16`, `device`, `block_size`,
            `tokenizer`, `max_response_length`, ... Decoding options can also be passed to
            `generate`, which overrides them.

    Raises:
        UserError: An input cannot work.
    """
    return Model({**options, "load": str(folder)})


def generate(
    model: Model,
    prompts: str | Path | Sequence[str | Record],
    *,
    setting: str | None = None,
    chat: bool = True,
    **options: Any,
) -> list[Response]:
    """Answer prompts.

    Args:
        model: The model.
        prompts: One text, several, records with `messages` or `prompt`, or the `Path` of a JSONL
            file of these.
        setting: Decoding as `megatron-dlm evaluate --settings` names it: `static`, `dynamic:0.9`,
            `autoregressive`, ...; None for what the options say.
        chat: Put texts into the chat template, if there is one, as a user's message.
        options: Decoding options of `megatron-dlm generate`, by name:
            `max_response_length`, `temperature`, `seed`, ...

    Returns:
        A response for each prompt, in their order.

    Raises:
        UserError: An input cannot work.
    """
    module, setup = model.module, _setup(model, options, "generate()")
    [(_, generation)] = setup.settings(() if setting is None else (setting,)).items()
    inputs = read_inference_inputs(setup, model.tokenizer, _prompt_file(model, prompts, chat))
    with torch.random.fork_rng():
        generator = Generator(module, setup, inputs, ParallelGroups.from_parallel_state())
        trajectories = generator.generate(generation)
    return [
        Response(
            text=model.tokenizer.decode(t.response_ids.tolist(), skip_special_tokens=True),
            token_ids=t.response_ids.tolist(),
            finish_reason=t.finish_reason,
            tokens_per_forward=len(t.response_ids) / t.denoising_forwards,
        )
        for t in trajectories
    ]


def loss(model: Model, examples: Records, *, objective: str = "sft", **options: Any) -> float:
    """Loss of given responses, as training reports it for held-out data.

    Args:
        model: The model.
        examples: A JSONL file of prompts with `response` or of chats that end in an answer, or
            such records.
        objective: `sft` (block diffusion: cross entropy at the MASKs of one random state of each
            example, fixed by the seed) or `next_token` (autoregressive cross entropy).
        options: Options of `megatron-dlm train` for the loss, by name: `seed`, `block_size`,
            `loss_weighting`, ...

    Returns:
        Nats per token, over all examples.

    Raises:
        UserError: An input cannot work.
    """
    known = [name for name, traits in OBJECTIVE_TRAITS.items() if "data" in traits.response_sources]
    if objective not in known:
        raise bad_value(
            "objective", objective, "is not one of given responses", f"choose {' or '.join(known)}"
        )
    module, setup = model.module, _setup(model, {}, "loss()")
    architecture = setup.source.architecture
    if isinstance(examples, str | Path):
        file = open_records(examples, "examples")
    else:
        file = RecordsInMemory([dict(record) for record in examples], "examples")
    positions = architecture.max_position_embeddings
    values: dict[str, Any] = {"max_response_length": positions, "max_prompt_length": positions}
    if objective == "sft" and setup.block_size is not None:
        values["block_size"] = setup.block_size
    values |= {
        "load": model.options["load"],
        "objective": objective,
        "bf16": setup.config.model.bf16,
    }
    values |= {"train_data": file.path, "train_iters": 1, "micro_batch_size": 1}
    values |= {"device": setup.config.parallel.device, **options}
    config = Config.from_dict(values, "loss()")
    validate(config, 1)
    special_tokens = special_tokens_of(model.tokenizer, architecture, setup.tokenizer_folder)
    data = read_examples(
        file,
        model.tokenizer,
        special_tokens,
        config.data.max_prompt_length,
        config.rollout.max_response_length,
        config.template.chat_template_kwargs,
        "examples",
        positions,
        config.data.train_on,
    )
    judge = OBJECTIVES[config.objective.objective](
        config, special_tokens.mask_token_id, architecture.vocab_size
    )
    config = config.changed(eval_iters=len(data), global_batch_size=1)
    return Validation(config, judge, data, ParallelGroups()).loss(module)


def convert(
    source: str | Path, target: str | Path, *, format: str | None = None, **options: Any
) -> Path:
    """Write a model in another format.

    Args:
        source: Hugging Face folder, run folder or one of its checkpoints.
        target: Folder to write; it must not exist, unless `overwrite` is given.
        format: As `megatron-dlm convert --target-format`; None: its default.
        options: Those of `megatron-dlm convert`, by name: `block_size`, `dtype`, `overwrite`, ...

    Returns:
        The folder that was written.

    Raises:
        UserError: An input cannot work.
    """
    values = {**options, "load": str(source), "save": str(target)}
    if format is not None:
        values["target_format"] = format
    arguments = build(ConversionArguments, values, "convert()")
    with torch.random.fork_rng():
        written, *_ = run_conversion(arguments.conversion, arguments.parallel)
    return written


def _setup(model: Model, options: Mapping[str, Any], source: str) -> InferenceSetup:
    """The model's options updated by others, checked against the checkpoint again."""
    for name in options:
        if name in OF_THE_MODEL:
            raise bad_value(
                f"{source}: {name}", options[name], "is the model's", "give it to load()"
            )
    return resolve_inference(
        build(InferenceArguments, {**model.options, **options}, source), world_size()
    )


def _prompt_file(
    model: Model, prompts: str | Path | Sequence[str | Record], chat: bool
) -> RecordSource:
    """Prompts as records.

    Raises:
        UserError: There are none, or their file cannot be read.
    """
    if isinstance(prompts, Path):
        return open_records(prompts, "prompts")
    texts = [prompts] if isinstance(prompts, str) else prompts
    records = []
    for prompt in texts:
        if not isinstance(prompt, str):
            records.append(dict(prompt))
        elif chat and model.tokenizer.chat_template:
            records.append({"messages": [{"role": "user", "content": prompt}]})
        else:
            records.append({"prompt": prompt})
    return RecordsInMemory(records, "prompts")
