"""Answer the prompts of a file one setting after the other, and keep each result as it comes."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_dlm.entry import rank
from megatron_dlm.evaluation.generation import Generator, InferenceInputs
from megatron_dlm.evaluation.options import InferenceSetup
from megatron_dlm.evaluation.partial_results import PartialResults
from megatron_dlm.evaluation.progress import GenerationProgress
from megatron_dlm.parallel import on_rank_zero
from megatron_dlm.rollout.generation_config import DECIDE_NO_TOKEN, GenerationConfig
from megatron_dlm.types.trajectory import Trajectory


@dataclass(frozen=True)
class Answers:
    """Results of all prompts under one setting.

    Attributes:
        results: In the order of the prompts; those to one prompt in the order of their numbers.
        seconds: That they took, over all starts of the command.
    """

    results: list[Any]
    seconds: float


def results_header(
    command: str,
    setup: InferenceSetup,
    inputs: InferenceInputs,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, GenerationConfig],
) -> dict[str, Any]:
    """What decides the results of a command, for `open_partial_results`.

    Neither where model and data lie nor the parallel layout are among it.
    """
    prompts = inputs.prompts
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    header = {
        "command": command,
        "model": setup.source.content_fingerprint(),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "data": prompts.file.fingerprint,
        "num_prompts": len(prompts),
        "prompt_tokens": prompts.fingerprint(),
        "prompt_limits": prompts.limits_fingerprint(),
        "max_response_length": inputs.max_response_length,
        "eos_token_ids": sorted(inputs.special_tokens.eos_token_ids),
        "mask_token_id": inputs.special_tokens.mask_token_id,
        "bf16": setup.config.model.bf16,
        "seed": setup.config.data.seed,
        "settings": list(settings),
    }
    for setting, generation in settings.items():
        for name, value in asdict(generation).items():
            if name not in DECIDE_NO_TOKEN:
                header[f"{setting}: {name}"] = value
    return header


def answer_prompts(
    generator: Generator,
    setting: str,
    generation: GenerationConfig,
    partial: PartialResults,
    result_of: Callable[[Trajectory], Any],
    seed: int | None = None,
) -> Answers | None:
    """Generate the responses that have no result yet; all ranks call this.

    Args:
        generator: Answers.
        setting: Name of the decoding setting.
        generation: The setting.
        partial: What is there already, and where results are kept.
        seed: Of the draws; None for that of the options.
        result_of: From a response to its result, which JSON can hold.

    Returns:
        Old and new results on rank 0, None on the others.

    Raises:
        UserError: A result cannot be kept.
    """
    groups = generator.groups
    began, before = time.perf_counter(), partial.seconds.get(setting, 0.0)
    done = partial.done.get(setting, set())
    missing = [index for index in range(generator.num_responses) if index not in done]
    share = len(missing[groups.replica :: groups.num_replicas])
    progress = GenerationProgress(setting, share, enabled=rank() == 0, done=len(done))
    results: dict[int, Any] = {}
    keeps = groups.is_first_of_replica

    def finished(trajectory: Trajectory) -> None:
        if keeps:
            index = generator.inputs.index(trajectory)
            results[index] = result_of(trajectory)
            elapsed = before + time.perf_counter() - began
            partial.add(setting, index, results[index], round(elapsed, 3))
        progress(trajectory)

    generator.generate(generation, missing, finished, seed)
    everything = dict(on_rank_zero(list(results.items())))
    if rank() != 0:
        return None
    everything |= partial.results.get(setting, {})
    seconds = before + time.perf_counter() - began
    return Answers([everything[index] for index in range(generator.num_responses)], seconds)
