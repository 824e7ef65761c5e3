"""What held-out prompts are answered and rated with: checked before a run builds a model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerBase

from megatron_dlm.config import Config
from megatron_dlm.data.domains import Domains
from megatron_dlm.data.open_records import open_records
from megatron_dlm.data.prompts import PromptDataset, tokenize_prompts
from megatron_dlm.errors import bad_value
from megatron_dlm.evaluation.rewards import Reward, reward_of
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.rollout.decoding_settings import DecodingSetting
from megatron_dlm.rollout.generation_config import DECIDE_NO_TOKEN, GenerationConfig
from megatron_dlm.rollout.pages import PAGE_SIZE, pages_for
from megatron_dlm.types.diffusion_kind import DiffusionKind
from megatron_dlm.types.special_tokens import SpecialTokens

FIELD = "--eval-prompts"


@dataclass(frozen=True)
class EvaluationInputs:
    """Held-out prompts, and how they are answered.

    Attributes:
        prompts: All that are answered, of all ranks.
        decodings: Decoding settings by the names of their results, in the order of the options.
        reward: Rates responses.
        max_response_length: In tokens; a prompt's own limit may be lower.
        fingerprint: Of all that decides which figures can be compared.
    """

    prompts: PromptDataset
    decodings: Mapping[str, GenerationConfig]
    reward: Reward
    max_response_length: int
    fingerprint: str


def read_evaluation_inputs(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: SpecialTokens,
    architecture: Architecture,
    diffusion_kind: DiffusionKind,
) -> EvaluationInputs:
    """Read and check the held-out prompts of a run that has some.

    Args:
        config: Of the run.
        tokenizer: Of the student.
        special_tokens: Of the student.
        architecture: Of the student.
        diffusion_kind: How it decodes.

    Raises:
        UserError: A prompt cannot be used, no response to it could be rated, or the model has no
            room for the responses.
    """
    decodings = eval_decodings(config, diffusion_kind)
    reward = reward_of(config)
    path, wanted = str(config.held_out.eval_prompts), config.held_out.eval_num_prompts
    file = open_records(path, FIELD, config.template.domain_field)
    if wanted is not None:
        if wanted > len(file):
            problem = f"{FIELD} {path} has {len(file)}"
            raise bad_value("--eval-num-prompts", wanted, problem, f"choose {len(file)} or less")
        file = file.first(wanted)
    prompts = tokenize_prompts(
        file,
        tokenizer,
        special_tokens,
        config.data.max_prompt_length,
        config.template.chat_template_kwargs,
        domains=Domains.from_config(config),
        long_prompts=config.data.long_prompts,
    )
    reward.check(prompts)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    _check_room(config, decodings, longest, architecture.max_position_embeddings)
    length = _longest_response(config)
    parts = {
        "data": prompts.file.fingerprint,
        "prompts": prompts.fingerprint(),
        "limits": prompts.limits_fingerprint(),
        "max_response_length": length,
        "reward": config.objective.reward,
        "seed": config.data.seed,
        "decoding": asdict(next(iter(decodings.values()))) | dict.fromkeys(DECIDE_NO_TOKEN),
    }
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return EvaluationInputs(prompts, decodings, reward, length, fingerprint[:16])


def evaluates_after(config: Config, iteration: int) -> bool:
    """Whether a run, `of_data`, answers held-out prompts after an optimizer step."""
    interval, is_last = config.held_out.eval_prompts_interval, iteration == config.train_iters
    is_due = is_last or bool(interval and iteration % interval == 0)
    return config.evaluates and iteration > 0 and is_due


def eval_decodings(config: Config, diffusion_kind: DiffusionKind) -> dict[str, GenerationConfig]:
    """The decoding settings of a run's evaluations by the names of their results.

    Raises:
        UserError: One is named twice, or is none for the model.
    """
    field = "--eval-decodings"
    if config.held_out.eval_temperature is not None:
        config = config.changed(temperature=config.held_out.eval_temperature)
    left_to_right = config.decodes_left_to_right or diffusion_kind.attention_pattern == "causal"
    blocks = diffusion_kind.attention_pattern == "block_causal" or config.uses_rollouts
    # A model of full attention is decoded as a whole unless its rollouts go by blocks.
    size = config.model.block_size if blocks else None
    if not config.held_out.eval_decodings:
        only = (
            GenerationConfig.autoregressive_from_config(config)
            if left_to_right
            else GenerationConfig.from_config(config, diffusion_kind, size)
        )
        return {only.setting_name(): only}
    decodings: dict[str, GenerationConfig] = {}
    for text in config.held_out.eval_decodings:
        setting = DecodingSetting.parse(text, field)
        if setting.is_autoregressive:
            generation = GenerationConfig.autoregressive_from_config(config)
        elif left_to_right:
            problem = "the run trains a model that decodes from left to right only"
            raise bad_value(field, text, problem, "choose autoregressive, or leave it out")
        else:
            own = size if setting.block_size is None else setting.block_size
            generation = GenerationConfig.from_config(config, diffusion_kind, own)
            generation = generation.with_setting(setting, field)
        name = generation.setting_name(setting.block_size)
        if name in decodings:
            raise bad_value(field, text, f"names {name} twice", "name it once")
        decodings[name] = generation
    return decodings


def _longest_response(config: Config) -> int:
    """Tokens of the longest response of an evaluation that any record can have."""
    own = config.held_out.eval_max_response_length
    return (config if own is None else config.changed(max_response_length=own)).longest_response


def _check_room(
    config: Config, decodings: Mapping[str, GenerationConfig], longest: int, positions: int
) -> None:
    """Whole blocks of each setting have positions after the longest prompt, and cache for them."""
    length = _longest_response(config)
    for name, generation in decodings.items():
        size = generation.block_size or 1
        room = positions // size * size - longest
        _check_cache(config, name, generation, -(-(longest + length) // size) * size)
        if length <= room:
            continue
        own = config.held_out.eval_max_response_length
        problem = (
            f"after the longest prompt of {FIELD}, of {longest} tokens, {name} has {max(room, 0)} "
            f"of the model's {positions} positions left"
        )
        remedy = f"choose {room} or less" if room > 0 else "shorten the prompts"
        if own is None and room > 0:
            remedy = f"add --eval-max-response-length {room} or less"
        flag = "--max-response-length" if own is None else "--eval-max-response-length"
        raise bad_value(flag, length, problem, remedy)


def _check_cache(config: Config, name: str, generation: GenerationConfig, tokens: int) -> None:
    """The longest sequence of a setting fits into the KV cache; full attention has none."""
    needed, room = pages_for(tokens) * PAGE_SIZE, config.rollout.max_total_tokens
    if room is not None and room < needed and generation.attention_pattern != "full":
        problem = f"has no room for the longest prompt of {FIELD} and its response under {name}"
        remedy = f"choose {needed} or more, or lower --eval-max-response-length"
        raise bad_value("--max-total-tokens", room, problem, remedy)
