"""Peak memory and time of the fused divergence against plain autograd on the whole logits.

    python -m benchmarks.divergence_memory

Forward KL over the full vocabulary, forward and backward, gradients of hidden states and head
included. Each measurement is a process of its own: on CPU the peak resident set above what is
resident once the inputs exist, on CUDA `torch.cuda.max_memory_allocated` above the same. Medians
go to `benchmarks/results/divergence_memory.json`. Where others use the CPU too, compare CPU
seconds.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import commit, machine, versions
from megatron_dlm.distillation.vocab_parallel_divergence import (
    vocab_parallel_divergence,
)
from megatron_dlm.output_file import write_file
from megatron_dlm.types.divergence_spec import DivergenceSpec

VOCAB_SIZE = 151_936  # Qwen3
TOKENS = 2_048
HIDDEN_SIZE = 1_024  # Qwen3-0.6B
RESULT = Path(__file__).parent / "results" / "divergence_memory.json"
TARGET_MEMORY_RATIO = 0.2

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def fused_loss(inputs: Inputs, chunk_size: int) -> torch.Tensor:
    weights = torch.ones(inputs[0].shape[0], device=inputs[0].device)
    spec = DivergenceSpec.parse("forward_kl", chunk_size=chunk_size)
    return vocab_parallel_divergence(*inputs, weights, spec, VOCAB_SIZE)[0]


def dense_loss(inputs: Inputs, chunk_size: int) -> torch.Tensor:
    student_hidden, student_head, teacher_hidden, teacher_head = inputs
    log_q = (student_hidden @ student_head.T).log_softmax(-1)
    log_p = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")


LOSSES = {"fused": fused_loss, "dense": dense_loss}


def measure(method: str, chunk_size: int, device: str) -> dict[str, float]:
    """Run one forward and backward pass in this process."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, HIDDEN_SIZE, generator=generator, device=device).mul_(scale)

    student_hidden, student_head = normal(TOKENS, 1), normal(VOCAB_SIZE, HIDDEN_SIZE**-0.5)
    teacher_hidden, teacher_head = normal(TOKENS, 1), normal(VOCAB_SIZE, HIDDEN_SIZE**-0.5)
    student_hidden.requires_grad_()
    student_head.requires_grad_()
    # Libraries load and threads start on the first use: outside what is measured.
    one_token = (student_hidden[:1].detach(), student_head.detach())
    LOSSES[method]((*one_token, teacher_hidden[:1], teacher_head), chunk_size)

    baseline = resident_bytes(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = LOSSES[method]((student_hidden, student_head, teacher_hidden, teacher_head), chunk_size)
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    if student_hidden.grad is None or student_head.grad is None:
        raise AssertionError("a gradient is missing")
    return {
        "peak_mib": (peak_bytes(device) - baseline) / 2**20,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "loss": loss.item(),
        "hidden_grad_norm": student_hidden.grad.norm().item(),
        "head_grad_norm": student_head.grad.norm().item(),
    }


def resident_bytes(device: str) -> int:
    """Memory in use now; from here on the peak is counted."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_apart(method: str, chunk_size: int, device: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.divergence_memory", "--measure", method]
    command += ["--device", device]
    command += ["--chunk-size", str(chunk_size)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output)


def compare(chunk_size: int, device: str, repetitions: int) -> dict[str, Any]:
    """Measure both methods in turn, so that a busy moment of the machine meets both."""
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in LOSSES}
    for _ in range(repetitions):
        for method in LOSSES:
            runs[method].append(measure_apart(method, chunk_size, device))
    for quantity in ("loss", "hidden_grad_norm", "head_grad_norm"):
        fused, dense = (runs[method][0][quantity] for method in ("fused", "dense"))
        if abs(fused - dense) > 1e-4 * abs(dense):
            raise AssertionError(f"{quantity} differs: fused {fused}, dense {dense}")

    medians = {
        method: {
            quantity: statistics.median(run[quantity] for run in of_method)
            for quantity in ("peak_mib", "seconds", "cpu_seconds")
        }
        for method, of_method in runs.items()
    }
    ratios = {name: medians["fused"][name] / medians["dense"][name] for name in medians["fused"]}
    return {
        "what": "forward KL, full vocabulary, forward and backward, float32",
        "vocab_size": VOCAB_SIZE,
        "tokens": TOKENS,
        "hidden_size": HIDDEN_SIZE,
        "chunk_size": chunk_size,
        "device": device,
        "medians": medians,
        "memory_ratio": ratios["peak_mib"],
        "memory_ratio_target": TARGET_MEMORY_RATIO,
        "meets_target": ratios["peak_mib"] < TARGET_MEMORY_RATIO,
        "time_ratio": ratios["seconds"],
        "cpu_time_ratio": ratios["cpu_seconds"],
        "runs": runs,
        "machine": {**machine(device), "torch_threads": torch.get_num_threads()},
        "commit": commit(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measure", choices=list(LOSSES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.chunk_size, arguments.device)))
        return

    result = compare(arguments.chunk_size, arguments.device, arguments.repetitions)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(arguments.output, json.dumps(result, indent=2) + "\n")
    print(f"{'':8}{'peak MiB':>12}{'seconds':>12}{'CPU seconds':>14}")
    for method, median in result["medians"].items():
        peak, seconds, cpu_seconds = (median[k] for k in ("peak_mib", "seconds", "cpu_seconds"))
        print(f"{method:8}{peak:12,.0f}{seconds:12.2f}{cpu_seconds:14.2f}")
    ratios = (result[k] for k in ("memory_ratio", "time_ratio", "cpu_time_ratio"))
    print("{:8}{:12.3f}{:12.2f}{:14.2f}".format("ratio", *ratios))


if __name__ == "__main__":
    main()
