"""Options of the tools that generate, resolved against the checkpoint; needs no PyTorch.

A decoding setting is one word with one optional number: `static`, `static:2` (denoising steps per
block), `dynamic:0.7` (threshold) or `autoregressive`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_dlm.config import (
    Config,
    DataConfig,
    DecodingConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
)
from megatron_dlm.config.validation import validate_inference
from megatron_dlm.errors import bad_value
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.training.model_source import ModelSource, open_model_source

Decoding = Literal["auto", "block_diffusion", "autoregressive"]


@dataclass(frozen=True)
class InferenceConfig:
    """Inference: the model, its prompts and the length of its responses."""

    load: str | None = None
    """Weights: a Hugging Face folder, a run folder (its latest checkpoint) or an iter_* folder."""

    tokenizer: str | None = None
    """Folder with tokenizer.json and the chat template (default: the one beside the weights)."""

    block_size: int | None = None
    """Tokens denoised together (default: block_size of the model's config.json)."""

    decoding: Decoding = "auto"
    """block_diffusion, autoregressive, or auto: block diffusion where a block size is known."""

    bf16: bool = False
    """Compute in bfloat16 instead of float32."""

    max_prompt_length: int | None = None
    """Longest prompt in tokens, chat template included; a longer one is an error (default: what
    the model has positions for)."""

    max_response_length: int | None = None
    """Longest response in tokens (default: that of training, or fewer where the model has no more
    positions)."""

    seed: int = DataConfig.seed
    """Seed of the draws; a prompt's response depends on it and on the prompt's place in the
    file, not on the parallel layout."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, {"enable_thinking": false} for one; JSON as a flag."""


@dataclass(frozen=True)
class GreedyDecodingConfig(DecodingConfig):
    """Decoding: how tokens are drawn and kept."""

    temperature: float = 0.0
    """Softmax temperature of the draws; 0 takes the most likely token."""


@dataclass(frozen=True)
class InferenceArguments:
    """Groups of options that every tool which generates has; a tool adds its own."""

    inference: InferenceConfig = field(default_factory=InferenceConfig)
    decoding: GreedyDecodingConfig = field(default_factory=GreedyDecodingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True)
class InferenceSetup:
    """Options and checkpoint that belong together.

    Attributes:
        config: A run's configuration, of which loading and decoding read their part.
        source: The weights.
        options: As given.
        block_size: From the options or config.json; None if neither names one.
    """

    config: Config
    source: ModelSource
    options: InferenceConfig
    block_size: int | None

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is."""
        tokenizer = self.options.tokenizer
        return self.source.hf_folder if tokenizer is None else Path(tokenizer)

    def generation(self) -> GenerationConfig:
        """The decoding setting that the options describe."""
        decoding = self.options.decoding
        if decoding == "auto":
            decoding = "autoregressive" if self.block_size is None else "block_diffusion"
        if decoding == "autoregressive":
            return self._autoregressive()
        self._require_block_size("--decoding", self.options.decoding)
        return GenerationConfig.from_config(self.config)

    def setting(self, text: str) -> GenerationConfig:
        """Read one decoding setting; whatever it does not name is as in the options.

        Raises:
            UserError: It is not one, or the block size it needs is unknown.
        """
        name, colon, value = text.strip().partition(":")
        if name == "autoregressive" and not colon:
            return self._autoregressive()
        try:
            if name == "static":
                self._require_block_size("--settings", text)
                base = self._with_strategy("low_confidence_static")
                return replace(base, denoising_steps_per_block=int(value)) if colon else base
            if name == "dynamic":
                self._require_block_size("--settings", text)
                base = self._with_strategy("low_confidence_dynamic")
                threshold = float(value) if colon else base.dynamic_threshold
                if 0 < threshold <= 1:
                    return replace(base, dynamic_threshold=threshold)
        except ValueError:
            pass
        raise bad_value(
            "--settings",
            text,
            "is no decoding setting",
            "write static, static:<steps>, dynamic:<threshold in (0, 1]> or autoregressive",
        )

    def _with_strategy(
        self, strategy: Literal["low_confidence_static", "low_confidence_dynamic"]
    ) -> GenerationConfig:
        return replace(GenerationConfig.from_config(self.config), remasking_strategy=strategy)

    def _autoregressive(self) -> GenerationConfig:
        rollout = self.config.rollout
        return GenerationConfig.autoregressive(
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            max_running_requests=rollout.max_running_requests,
        )

    def _require_block_size(self, field: str, value: str) -> None:
        if self.block_size is None:
            raise bad_value(
                field,
                value,
                f"needs a block size, and {self.source.hf_folder / 'config.json'} names none",
                "add --block-size",
            )


def setting_name(generation: GenerationConfig) -> str:
    """What a setting is called in tables and results: `static`, `dynamic_0.9`, ..."""
    if generation.mode == "autoregressive":
        return "autoregressive"
    if generation.remasking_strategy == "low_confidence_dynamic":
        return f"dynamic_{generation.dynamic_threshold:g}"
    steps = generation.denoising_steps_per_block
    name = generation.remasking_strategy.removeprefix("low_confidence_")
    return name if steps == generation.block_size else f"{name}_{steps}"


def resolve_inference(arguments: InferenceArguments, world_size: int) -> InferenceSetup:
    """Open the checkpoint's description and check the options against it; reads no weights.

    Raises:
        UserError: Anything that could not work.
    """
    options, decoding = arguments.inference, arguments.decoding
    if options.load is None:
        raise bad_value("--load", None, "there is no model", "name a model or run folder")
    source = open_model_source(options.load, "--load")
    stored = source.architecture.hf_config.get("block_size")
    block_size = options.block_size if options.block_size is not None else stored
    given = {
        name: getattr(options, name)
        for name in ("max_prompt_length", "max_response_length")
        if getattr(options, name) is not None
    }
    config = Config(
        model=ModelConfig(
            load=options.load,
            tokenizer=options.tokenizer,
            bf16=options.bf16,
            # Without a grid, a block is a token.
            block_size=1 if block_size is None else block_size,
        ),
        parallel=arguments.parallel,
        data=DataConfig(
            seed=options.seed,
            max_prompt_length=given.get(
                "max_prompt_length", max(1, source.architecture.max_position_embeddings - 1)
            ),
            chat_template_kwargs=options.chat_template_kwargs,
        ),
        rollout=RolloutConfig(
            **asdict(decoding),
            max_response_length=given.get("max_response_length", RolloutConfig.max_response_length),
        ),
    )
    if block_size is None and decoding.denoising_steps_per_block is not None:
        raise bad_value(
            "--denoising-steps-per-block",
            decoding.denoising_steps_per_block,
            "the block size is unknown",
            "add --block-size",
        )
    validate_inference(config, world_size, source.architecture)
    return InferenceSetup(config, source, options, block_size)


def check_output(path: str | None) -> None:
    """Make sure that results can be written, before the work for them begins.

    Raises:
        UserError: The path is a folder or cannot be created.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise bad_value("--output", path, "is a folder", "name a file")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a"):
            pass
    except OSError as error:
        raise bad_value(
            "--output", path, f"cannot be written ({error.strerror})", "name another file"
        ) from None
