"""Small random models and runs that many tests share."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_dlm.config import Config, validate
from megatron_dlm.config.objective_traits import OBJECTIVE_TRAITS
from megatron_dlm.config.rules.usage import is_used
from megatron_dlm.data.arithmetic import Split, write_examples
from megatron_dlm.data.prompts import PromptDataset
from megatron_dlm.data.token_shards import ALONE
from megatron_dlm.evaluation.rewards import REWARDS, Record
from megatron_dlm.parallel import ParallelGroups, from_rank_zero, initialized
from megatron_dlm.stop_agreement import StopAgreement
from megatron_dlm.stop_request import StopRequest
from megatron_dlm.training.inputs import RunInputs, joined_ranks, read_inputs
from megatron_dlm.training.loop import train
from megatron_dlm.training.run import build_run
from megatron_dlm.training.run_start import decide_start
from tests.corpora import random_documents, write_corpus
from tests.families import random_family_model

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER = REPOSITORY / "examples" / "tiny" / "qwen3"

DENSE: dict[str, Any] = dict(
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=512,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    initializer_range=0.2,
    eos_token_id=510,
    pad_token_id=508,
    attention_bias=False,
)
MOE: dict[str, Any] = dict(
    DENSE,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    tie_word_embeddings=False,
)


def save_random_model(
    folder: Path, *, moe: bool = False, family: str = "qwen3", seed: int = 0, **changes: Any
) -> Path:
    """Save a random transformers model with the tiny examples' tokenizer; returns the folder."""
    from transformers import AutoTokenizer

    family, sizes = ("qwen3_moe", MOE) if moe else (family, DENSE)
    random_family_model(family, seed, {**sizes, **changes}).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def write_data(folder: Path, num: int = 48, split: Split = "train") -> tuple[Path, Path]:
    """Write prompts, prompt + response examples and corpora; returns the first two files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "examples.jsonl"
    write_examples(path, split, 5, num)
    write_corpus(folder / "corpus", random_documents(num, seed=1))
    write_corpus(folder / "corpus_heldout", random_documents(num, seed=2))
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({key: json.loads(line)[key] for key in ("messages", "answer")}) + "\n"
            for line in path.read_text().splitlines()
        )
    )
    return prompts, path


def declare_diffusion_kind(model: Path, attention_pattern: str, *, shifted: bool) -> None:
    """Make a folder's config.json that of a diffusion model with blocks of 4."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    config |= {"attention_pattern": attention_pattern, "shifted": shifted, "mask_token_id": 511}
    if attention_pattern == "block_causal":
        config["block_size"] = 4
    file.write_text(json.dumps(config))


class _EveryThird:
    """Calls responses of a third of all lengths wrong: something that random models achieve."""

    def check(self, prompts: PromptDataset) -> None:
        pass

    def rate(self, records: Sequence[Record], responses: Sequence[str]) -> list[float]:
        return [float(len(response) % 3 != 0) for response in responses]


@contextmanager
def reward_every_third() -> Iterator[None]:
    """Let `exact_match` stand for a reward that a random model earns with most responses."""
    original = REWARDS["exact_match"]
    REWARDS["exact_match"] = _EveryThird()
    try:
        yield
    finally:
        REWARDS["exact_match"] = original


def run_config(folder: Path, model: Path, **options: Any) -> Config:
    """A run of five updates, of one rollout batch where there are rollouts; `options` win."""
    prompts, examples = folder / "prompts.jsonl", folder / "examples.jsonl"
    values: dict[str, Any] = dict(
        load=str(model),
        prompts=str(prompts),
        save=str(folder / "run"),
        num_rollouts=1,
        rollout_batch_size=20,
        global_batch_size=4,
        micro_batch_size=1,
        max_response_length=16,
        max_running_requests=7,
        max_prompt_length=128,
        lr=1e-3,
        min_lr=1e-4,
        log_interval=1000,
        tensorboard=False,
        measure_machine=False,
        divergence_chunk_size=16,
        device="cpu",
    )
    sources = OBJECTIVE_TRAITS[options.get("objective", "opdlm")].response_sources
    if "rollout" not in sources:
        values.update(num_rollouts=None, train_iters=5)
    if "data" in sources:
        values.update(max_response_length=40, prompts=None, train_data=str(examples))
    if sources == ("corpus",):
        values.update(prompts=None, data_path=str(folder / "corpus"), seq_length=48)
    config = Config.from_dict({**values, **options})
    unused = {name for name in values.keys() - options.keys() if not is_used(config, name)}
    return Config.from_dict({n: v for n, v in config.to_dict().items() if n not in unused})


def started_inputs(config: Config) -> tuple[Config, RunInputs]:
    """Configuration and inputs of a start of a run, which goes on where there is one."""
    start = decide_start(config)
    return start.config, read_inputs(start.config, start.resumed)


def run_training(config: Config, request: StopRequest | None = None) -> list[dict[str, Any]]:
    """Run the real main job in this process (or this rank of a world); its metrics lines."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    validate(config, world)
    start = from_rank_zero(lambda: decide_start(config))
    if not start.is_finished:
        ranks = joined_ranks() if world > 1 else ALONE
        inputs = read_inputs(start.config, start.resumed, ranks)
        with initialized(start.config):
            groups = ParallelGroups.from_parallel_state()
            with StopAgreement(request or StopRequest(), groups) as stop:
                train(build_run(start.config, inputs, stop))
            if world > 1:
                torch.distributed.barrier()
    assert config.logging.save is not None
    lines = (Path(config.logging.save) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
