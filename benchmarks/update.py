"""Time and peak memory of one optimizer update: rows by a token budget, and plain transformers.

    python -m benchmarks.update --output benchmarks/results/update.json

A model of 0.1 billion parameters with Qwen3's vocabulary distils at random states of given
responses; what the teacher says of them is there already, as hidden states. `mixed` is an update of
trajectories of many lengths, with one of them in each micro-batch or as many as a budget of 4,096
tokens holds. `long` is one of rows of 4k tokens, by this framework and by plain transformers: the
same tokens, positions and dense mask, logits of every position, PyTorch's KL divergence, clipping
and AdamW. Losses and gradient norms have to agree. Each measurement is a process of its own;
compare CPU seconds where others use the CPU too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.divergence_memory import peak_bytes, resident_bytes
from benchmarks.environment import commit, machine, versions
from megatron_dlm.config import Config
from megatron_dlm.data.packing import TrainingBatch
from megatron_dlm.models.architecture import read_architecture
from megatron_dlm.models.attention_layout import visible
from megatron_dlm.models.model import head_weight
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.objectives import OBJECTIVES
from megatron_dlm.output_file import write_file
from megatron_dlm.parallel import ParallelGroups, initialized
from megatron_dlm.training.model_source import open_model_source
from megatron_dlm.training.student import build_student
from megatron_dlm.training.train_step import train_step
from megatron_dlm.types.teacher_targets import HiddenTargets
from megatron_dlm.types.trajectory import Trajectory

VOCAB_SIZE = 151_936  # Qwen3
MASK = 151_669
TEACHER_HIDDEN = 512
RESULT = Path(__file__).parent / "results" / "update.json"
PROMPT = 64
BUDGET = 4_096
LENGTHS = {"mixed": (40, 600, 90, 200, 60, 30, 330, 110), "long": (1_980,)}
"""Response tokens of the trajectories of an update."""
METHODS = {
    "mixed": ("one trajectory a micro-batch", "token budget"),
    "long": ("transformers", "token budget"),
}


def save_model(folder: Path) -> None:
    """A random model of 116 million parameters."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1_536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=8_192,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def trajectories(lengths: tuple[int, ...]) -> list[Trajectory]:
    """Given responses of random tokens, with what a teacher says of them."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(0, 151_000, (PROMPT + length,), generator=generator)
        hidden = torch.randn(length, TEACHER_HIDDEN, generator=generator)
        made.append(
            Trajectory(
                sample_index=index,
                prompt_ids=tokens[:PROMPT],
                response_ids=tokens[PROMPT:],
                unmask_step=torch.zeros(length, dtype=torch.int64),
                finish_reason="length",
                targets=HiddenTargets(hidden),
            )
        )
    return made


def teacher_head() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(VOCAB_SIZE, TEACHER_HIDDEN, generator=generator).mul_(TEACHER_HIDDEN**-0.5)


def configuration(method: str, device: str) -> Config:
    budget = {"max_tokens_per_micro_batch": BUDGET} if method == "token budget" else {}
    values = dict(objective="opdlm_off", device=device, lr_decay_iters=10, lr=1e-5, **budget)
    return Config.from_dict(values)


def packed(config: Config, case: str) -> list[TrainingBatch]:
    objective = OBJECTIVES["opdlm_off"](config, MASK, VOCAB_SIZE)
    documents = [objective.update_document(t, 0, 0) for t in trajectories(LENGTHS[case])]
    return objective.rows(documents, 1)


def ours(folder: Path, config: Config, case: str) -> Callable[[], tuple[float, float]]:
    """An update by this framework; returns loss and gradient norm."""
    model = build_model(read_architecture(str(folder)), config)
    open_model_source(str(folder), "--load").load_into(model)
    student = build_student(model, config)
    objective = OBJECTIVES["opdlm_off"](config, MASK, VOCAB_SIZE)
    rows, head = packed(config, case), teacher_head().to(head_weight(model))

    def update() -> tuple[float, float]:
        result = train_step(
            student.ddp,
            student.optimizer,
            student.scheduler,
            objective,
            rows,
            head,
            ParallelGroups.from_parallel_state(),
        )
        return result.loss, result.grad_norm

    return update


def plain(folder: Path, config: Config, case: str) -> Callable[[], tuple[float, float]]:
    """The same update by transformers and PyTorch alone."""
    device = torch.device(config.parallel.device)
    model = Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa").to(device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, betas=(0.9, 0.999), weight_decay=0)
    rows, head = packed(config, case), teacher_head().to(device)
    count = sum(row.loss_count for row in rows)

    def update() -> tuple[float, float]:
        total = 0.0
        for batch in rows:
            layout = batch.row.attention
            assert isinstance(layout, torch.Tensor)
            mask = visible(layout[:, :, None], layout[:, None, :]).to(device)
            logits = model(
                batch.row.token_ids[None].to(device),
                attention_mask=mask[None, None],
                position_ids=batch.row.position_ids[None].to(device),
                use_cache=False,
            ).logits[0]
            assert isinstance(batch.targets, HiddenTargets)
            log_p = (batch.targets.hidden.to(device) @ head.T).log_softmax(-1)
            log_q = logits[batch.supervised.to(device)].log_softmax(-1)
            loss = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
            (loss / count).backward()
            total += float(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return total / count, float(norm)

    return update


def measure(folder: Path, case: str, method: str, device: str) -> dict[str, float]:
    """One update in this process, which allocates the optimizer's state too."""
    config = configuration("token budget" if method == "transformers" else method, device)
    with initialized(config):
        make = plain if method == "transformers" else ours
        update = make(folder, config, case)
        resident_bytes(device)  # on CUDA the peak is counted from here
        start, cpu_start = time.perf_counter(), time.process_time()
        loss, grad_norm = update()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    rows = packed(config, case)
    tokens = sum(len(row.row.token_ids) for row in rows)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mib": peak_bytes(device) / 2**20,
        "loss": loss,
        "grad_norm": grad_norm,
        "micro_batches": len(rows),
        "tokens": tokens,
    }


def measure_apart(folder: Path, case: str, method: str, device: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.update", "--device", device]
    command += ["--measure", case, method, str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def compare(folder: Path, case: str, device: str, repetitions: int) -> dict[str, Any]:
    """Measure the two methods of a case in turn, so that a busy moment meets both."""
    before, after = METHODS[case]
    runs: dict[str, list[dict[str, float]]] = {before: [], after: []}
    for _ in range(repetitions):
        for method, of_method in runs.items():
            of_method.append(measure_apart(folder, case, method, device))
            print(case, method, of_method[-1], flush=True)
    for quantity in ("loss", "grad_norm"):
        first, second = runs[before][0][quantity], runs[after][0][quantity]
        if abs(first - second) > 1e-3 * abs(first):
            raise AssertionError(f"{case}: {quantity} {first} against {second}")
    medians = {
        method: {
            name: statistics.median(run[name] for run in of_method)
            for name in ("seconds", "cpu_seconds", "peak_mib")
        }
        for method, of_method in runs.items()
    }
    return {
        "what": "one optimizer update of 116 million parameters, float32, forward KL",
        "vocab_size": VOCAB_SIZE,
        "budget": BUDGET,
        "response_tokens": LENGTHS[case],
        "device": device,
        "medians": medians,
        "speedup": medians[before]["seconds"] / medians[after]["seconds"],
        "cpu_speedup": medians[before]["cpu_seconds"] / medians[after]["cpu_seconds"],
        "memory_ratio": medians[after]["peak_mib"] / medians[before]["peak_mib"],
        "runs": runs,
        "machine": {**machine(device), "torch_threads": torch.get_num_threads()},
        "commit": commit(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--cases", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        case, method, folder = arguments.measure
        print(json.dumps(measure(Path(folder), case, method, arguments.device)))
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        save_model(Path(temporary))
        for case in arguments.cases:
            found = compare(Path(temporary), case, arguments.device, arguments.repetitions)
            results[case] = found
            write_file(arguments.output, json.dumps(results, indent=2) + "\n")
            print(
                f"{case}: {found['speedup']:.2f} times as fast ({found['cpu_speedup']:.2f} in CPU "
                f"seconds) at {found['memory_ratio']:.2f} of the memory"
            )


if __name__ == "__main__":
    main()
