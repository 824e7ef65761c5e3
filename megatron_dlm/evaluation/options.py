"""Options of the tools that generate, resolved against the checkpoint; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from megatron_dlm.config import (
    CheckpointOptions,
    Config,
    DataConfig,
    DecodingConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    TemplateConfig,
    validate_inference,
)
from megatron_dlm.config.fields import flag_of
from megatron_dlm.errors import bad_value
from megatron_dlm.output_file import check_output_file
from megatron_dlm.ranges import TEMPERATURE
from megatron_dlm.rollout.decoding_settings import DecodingSetting
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.training.model_source import ModelSource, StatedAttention, open_model_source
from megatron_dlm.types.diffusion_kind import BLOCK_DIFFUSION, DiffusionKind

Decoding = Literal["auto", "diffusion", "autoregressive"]


@dataclass(frozen=True)
class InferenceConfig(CheckpointOptions):
    """Inference: the model, its prompts and the length of its responses."""

    block_size: int | None = None
    """Tokens denoised together (default: block_size of the model's config.json; without one, a
    model of full attention decodes the response as a whole)."""

    attention_pattern: StatedAttention | None = None
    """Attention of the model, where its config.json does not say: a2d folders of dllm hold
    models of full and of block_causal attention."""

    decoding: Decoding = "auto"
    """diffusion, autoregressive, or auto: diffusion where the model's config.json says so or a
    block size is known, but for a diffusion model of causal attention, which decodes from left to
    right only. Attention and shift are those of config.json."""

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


@dataclass(frozen=True)
class GreedyDecodingConfig(DecodingConfig):
    """Decoding: how tokens are drawn and kept."""

    temperature: Annotated[float, TEMPERATURE] = 0.0
    """Softmax temperature of the draws; 0 takes the most likely token."""


@dataclass(frozen=True)
class InferenceArguments:
    """Groups of options that every tool which generates has; a tool adds its own."""

    inference: InferenceConfig = field(default_factory=InferenceConfig)
    decoding: GreedyDecodingConfig = field(default_factory=GreedyDecodingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)


@dataclass(frozen=True)
class InferenceSetup:
    """Options and checkpoint that belong together.

    Attributes:
        config: A run's configuration, of which loading and decoding read their part.
        source: The weights.
        options: As given.
        block_size: From the options or config.json; None if neither names one.
        diffusion_kind: Of config.json, else block diffusion if there is a block size; None for an
            autoregressive model.
    """

    config: Config
    source: ModelSource
    options: InferenceConfig
    block_size: int | None
    diffusion_kind: DiffusionKind | None

    @property
    def _is_causal(self) -> bool:
        """Whether the model is a diffusion model with causal attention."""
        return self.diffusion_kind is not None and self.diffusion_kind.attention_pattern == "causal"

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer."""
        tokenizer = self.options.tokenizer
        return self.source.hf_folder if tokenizer is None else Path(tokenizer)

    def settings(self, texts: Sequence[str] = ()) -> dict[str, GenerationConfig]:
        """Decoding settings by the names of their results.

        Args:
            texts: Each as `DecodingSetting` reads it; none: the one that the options describe.

        Raises:
            UserError: One is unknown or named twice, or an option is read by none of them.
        """
        settings: dict[str, GenerationConfig] = {}
        read: set[str] = set()
        for text in texts:
            setting = DecodingSetting.parse(text, "--settings")
            generation = self._of_setting(setting)
            name = generation.setting_name(setting.block_size)
            if name in settings:
                raise bad_value("--settings", text, f"names {name} twice", "name it once")
            settings[name] = generation
            read |= generation.options_read - setting.options.keys()
        if not texts:
            generation = self.generation()
            settings[generation.setting_name()] = generation
            read |= generation.options_read
        elif self.options.decoding != "auto":
            raise bad_value(
                "--decoding",
                self.options.decoding,
                "--settings decides it too",
                "leave one of them out",
            )
        self._check_nothing_is_ignored(read, f"decoding by {', '.join(settings)}")
        return settings

    def _check_nothing_is_ignored(self, read: set[str], decoding: str) -> None:
        rollout = self.config.rollout
        for option in fields(GreedyDecodingConfig):
            value = getattr(rollout, option.name)
            if option.name in read or value == option.default:
                continue
            remedy = f"drop {flag_of(option.name)}"
            if option.name in ("top_k", "top_p"):
                decoding, remedy = "--temperature 0", f"{remedy}, or choose a temperature above 0"
            elif self.diffusion_kind is None:
                remedy += ", or add --block-size"
            raise bad_value(flag_of(option.name), value, f"{decoding} has no use for it", remedy)

    def generation(self) -> GenerationConfig:
        """The decoding setting that the options describe."""
        decoding = self.options.decoding
        if decoding == "auto":
            left_to_right = self.diffusion_kind is None or self._is_causal
            decoding = "autoregressive" if left_to_right else "diffusion"
        if decoding == "autoregressive":
            return GenerationConfig.autoregressive_from_config(self.config)
        return self._diffusion("--decoding", self.options.decoding)

    def setting(self, text: str) -> GenerationConfig:
        """Read one decoding setting (`rollout.decoding_settings`).

        Raises:
            UserError: It is not one, or the block size it needs is unknown.
        """
        return self._of_setting(DecodingSetting.parse(text, "--settings"))

    def _of_setting(self, setting: DecodingSetting) -> GenerationConfig:
        if setting.is_autoregressive:
            return GenerationConfig.autoregressive_from_config(self.config)
        size = self.block_size if setting.block_size is None else setting.block_size
        sized = replace(self, block_size=size)
        return sized._diffusion("--settings", setting.text).with_setting(setting, "--settings")

    def _diffusion(self, field: str, value: str) -> GenerationConfig:
        if self._is_causal:
            raise bad_value(
                field,
                value,
                f"{self.source.hf_folder / 'config.json'} states causal attention, which decodes "
                "from left to right only",
                "choose autoregressive",
            )
        missing = self.block_size is None
        if self.diffusion_kind is None or (
            missing and self.diffusion_kind.attention_pattern != "full"
        ):
            raise bad_value(
                field,
                value,
                f"needs a block size, and {self.source.hf_folder / 'config.json'} names none",
                "add --block-size",
            )
        return GenerationConfig.from_config(self.config, self.diffusion_kind, self.block_size)


def resolve_inference(arguments: InferenceArguments, world_size: int) -> InferenceSetup:
    """Open the checkpoint's description and check the options against it; reads no weights.

    Raises:
        UserError: Anything that could not work.
    """
    options, decoding = arguments.inference, arguments.decoding
    if options.load is None:
        raise bad_value("--load", None, "there is no model", "name a model or run folder")
    source = open_model_source(options.load, "--load", options.verify_checkpoint).attending(
        options.attention_pattern, options.block_size
    )
    hf_config = source.architecture.hf_config
    stored = hf_config.get("block_size")
    block_size = options.block_size if options.block_size is not None else stored
    kind = source.diffusion_kind
    if options.block_size is not None and kind and kind.attention_pattern == "causal":
        raise bad_value(
            "--block-size",
            options.block_size,
            f"{source.hf_folder / 'config.json'} states causal attention, which has no blocks",
            "drop --block-size",
        )
    if kind is None and block_size is not None:
        kind = BLOCK_DIFFUSION
    template = arguments.template
    by_domain = template.prompt_suffix_by_domain or template.max_response_length_by_domain
    if template.domain_field != TemplateConfig.domain_field and not by_domain:
        raise bad_value(
            "--domain-field",
            template.domain_field,
            "no option by domain is given",
            "drop it, or add --prompt-suffix-by-domain or --max-response-length-by-domain",
        )
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
            # Without blocks, lengths are not rounded.
            block_size=1 if block_size is None else block_size,
        ),
        parallel=arguments.parallel,
        template=template,
        data=DataConfig(
            seed=options.seed,
            max_prompt_length=given.get(
                "max_prompt_length", max(1, source.architecture.max_position_embeddings - 1)
            ),
        ),
        rollout=RolloutConfig(
            **asdict(decoding),
            max_response_length=given.get("max_response_length", RolloutConfig.max_response_length),
        ),
    )
    validate_inference(config, world_size, source.architecture, decodes=True)
    return InferenceSetup(config, source, options, block_size, kind)


def check_output(
    output: str | None, restart: bool, setup: InferenceSetup, data: tuple[str, str | None]
) -> None:
    """Check that results can be written, before the work for them begins.

    Args:
        output: The file; None where there is none.
        restart: Whether what an interrupted command left is to be forgotten.
        setup: What is loaded.
        data: The flag of the file that is answered, and the file.

    Raises:
        UserError: The path is a folder, cannot be written, or is one of the inputs; or there is
            nothing to forget.
    """
    if output is None:
        if restart:
            problem = "without --output, nothing is left by an interrupted command"
            raise bad_value("--restart", restart, problem, "drop it, or add --output")
        return
    from megatron_dlm.conversion.tokenizer_files import TOKENIZER_FILES  # loads PyTorch

    model = [("--load", file) for file in setup.source.files()]
    tokenizer = [("--tokenizer", setup.tokenizer_folder / name) for name in TOKENIZER_FILES]
    check_output_file(output, "--output", [data, *model, *tokenizer])
