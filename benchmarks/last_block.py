"""What whole last blocks change: `sft` with rows that end where the response ends, and as they are.

    python -m benchmarks.last_block              # twelve runs: about an hour on two cores
    python -m benchmarks.last_block --seeds 1    # a quicker look

Decoding always shows whole blocks. A row whose last block ends with the response tells the model
its length in training and not in decoding. Both arms train on the same problems in the same order,
with as many updates (`examples/tiny/sft.yaml`). Then, on held-out problems:

- the cross entropy of the reference's last block given everything before it, all of it MASK, once
  as a row that ends with the response and once as decoding shows it;
- where the model puts the EOS of that block in the one forward that decoding begins it with;
- accuracy, and whether responses have the length of the reference, static and dynamic 0.9.

Runs that are finished are not repeated; the report is written when all are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.environment import REPOSITORY, commit, machine, versions
from megatron_dlm.output_file import write_file

ARMS = ("cut", "whole")
RECIPE = "examples/tiny/sft.yaml"
RESULTS = REPOSITORY / "benchmarks/results/last_block"
EXAMPLES, TRAIN_SEED, HELDOUT_SEED = 20_480, 1, 3
QUANTITIES = {
    "cross_entropy_as_row_that_ends": ("last block's cross entropy, row ends there", 1, 3),
    "cross_entropy_as_decoded": ("the same as decoded", 1, 3),
    "eos_in_place": ("EOS in its place, %", 100, 1),
    "eos_early": ("EOS too early, %", 100, 1),
    "eos_late_or_missing": ("EOS late or not in the block, %", 100, 1),
    "static_accuracy": ("static, %", 100, 1),
    "static_same_length": ("static, length of the reference, %", 100, 1),
    "dynamic_0.9_accuracy": ("dynamic 0.9, %", 100, 1),
    "dynamic_0.9_same_length": ("dynamic 0.9, length of the reference, %", 100, 1),
    "dynamic_0.9_tokens_per_forward": ("dynamic 0.9, tok/fwd", 1, 2),
}
"""Heading, factor and decimals of each."""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        arm: `cut` lays rows out as they were: the last block ends where the response ends.
        block_size: Of training and decoding.
        seed: Of order and states.
        updates: Optimizer steps.
        heldout: Held-out problems.
    """

    arm: str
    block_size: int
    seed: int
    updates: int
    heldout: int

    @property
    def name(self) -> str:
        """Unique, fit for a file name."""
        return f"{self.arm}-block{self.block_size}-seed{self.seed}"


def train_and_measure(case: Case, folder: Path) -> dict[str, float]:
    """Train one model in this process and measure it; `folder` gets its run folder."""
    from megatron_dlm.config import Config, validate
    from megatron_dlm.objectives import block_diffusion
    from megatron_dlm.parallel import initialized
    from megatron_dlm.training.inputs import read_inputs
    from megatron_dlm.training.loop import train
    from megatron_dlm.training.run import build_run

    options = yaml.safe_load((REPOSITORY / RECIPE).read_text(encoding="utf-8"))
    options |= {
        "load": str(REPOSITORY / options["load"]),
        "train_data": str(folder.parent / "train.jsonl"),
        "save": str(folder),
        "block_size": case.block_size,
        "seed": case.seed,
        "train_iters": case.updates,
        "lr_warmup_iters": min(options["lr_warmup_iters"], case.updates // 10),
        "tensorboard": False,
        "device": "cpu",
    }
    if case.arm == "cut":
        block_diffusion.fill_last_block = lambda trajectory, *_: trajectory
    config = Config.from_dict(options)
    validate(config, 1)
    inputs = read_inputs(config)
    with initialized(config):
        run = build_run(config, inputs)
        train(run)
        return measure(run, case, folder.parent / "heldout.jsonl")


def measure(run: Any, case: Case, heldout: Path) -> dict[str, float]:
    """Everything in `QUANTITIES`, on the first `case.heldout` problems."""
    import torch

    from megatron_dlm.data.prompts import read_examples
    from megatron_dlm.evaluation.evaluator import evaluate
    from megatron_dlm.evaluation.rewards import REWARDS
    from megatron_dlm.rollout.engine import RolloutEngine
    from megatron_dlm.rollout.generation_config import GenerationConfig
    from megatron_dlm.types.trajectory import Prompt

    inputs, config = run.inputs, run.config
    examples = read_examples(
        heldout, inputs.tokenizer, inputs.special_tokens, config.data.max_prompt_length
    )[: case.heldout]
    run.student.model.eval()
    measured: dict[str, float] = {}
    with torch.no_grad():
        measured |= last_blocks(run, case.block_size, examples)
    prompts = [Prompt(e.sample_index, e.prompt_ids, e.record) for e in examples]
    strategies: dict[str, dict[str, Any]] = {
        "static": {"remasking_strategy": "low_confidence_static"},
        "dynamic_0.9": {"remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.9},
    }
    for name, strategy in strategies.items():
        generation = GenerationConfig(
            block_size=case.block_size,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            max_running_requests=64,
            **strategy,
        )
        engine = RolloutEngine(
            run.student.model,
            generation=generation,
            special_tokens=inputs.special_tokens,
            seed=case.seed,
            groups=run.groups,
        )
        responses = engine.generate(prompts, config.rollout.max_response_length)
        result = evaluate(responses, inputs.tokenizer, REWARDS["exact_match"])
        same_length = [
            len(response.response_ids) == len(example.response_ids)
            for response, example in zip(responses, examples, strict=True)
        ]
        measured[f"{name}_accuracy"] = result.accuracy
        measured[f"{name}_same_length"] = statistics.fmean(same_length)
        assert result.tokens_per_forward is not None
        measured[f"{name}_tokens_per_forward"] = result.tokens_per_forward
    return measured


def last_blocks(run: Any, block_size: int, examples: list[Any]) -> dict[str, float]:
    """Cross entropy and EOS of the references' last blocks, all MASK; see the module."""
    import torch

    from megatron_dlm.data.packing import pack
    from megatron_dlm.models.forward import forward_hidden
    from megatron_dlm.models.model import head_weight
    from megatron_dlm.objectives.block_diffusion import block_diffusion_document

    mask = run.inputs.special_tokens.mask_token_id
    model, head = run.student.model, head_weight(run.student.model)
    sums = {"ends": 0.0, "decoded": 0.0}
    tokens, places = 0, []
    for example in examples:
        prompt, end = len(example.prompt_ids), len(example.token_ids)
        start = max(prompt, (end - 1) // block_size * block_size)
        for row in sums:
            missing = -end % block_size if row == "decoded" else 0
            tail = torch.full((missing,), mask)
            shown = type(example)(
                example.sample_index, example.prompt_ids, example.response_ids,
                example.unmask_step, tail_ids=tail, tail_unmask_step=torch.zeros_like(tail),
            )  # fmt: skip
            masked = torch.arange(end + missing) >= start
            document = block_diffusion_document(
                shown, [masked], masked, block_size=block_size, mask_token_id=mask
            )
            batch = pack([document])
            hidden = forward_hidden(model, [batch.row])
            assert hidden is not None
            logits = (hidden[0][batch.supervised] @ head.T).float()
            log_probabilities = logits.log_softmax(-1)[: end - start]
            labels = batch.labels[: end - start, None]
            sums[row] -= float(log_probabilities.gather(1, labels).sum())
            if row == "decoded":
                eos = int(example.response_ids[-1])
                found = (logits.argmax(-1) == eos).nonzero()[:, 0].tolist()
                places.append(start + found[0] - (end - 1) if found else block_size)
        tokens += end - start
    return {
        "cross_entropy_as_row_that_ends": sums["ends"] / tokens,
        "cross_entropy_as_decoded": sums["decoded"] / tokens,
        "eos_in_place": statistics.fmean(place == 0 for place in places),
        "eos_early": statistics.fmean(place < 0 for place in places),
        "eos_late_or_missing": statistics.fmean(place > 0 for place in places),
    }


def run_case(case: Case, work: Path) -> dict[str, Any]:
    """The result of a case, from its file if that is of the same case; else in a new process."""
    file = work / f"{case.name}.json"
    if file.is_file():
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if result["case"] == asdict(case):
            return result
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with file.with_suffix(".log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.last_block", "--case", json.dumps(asdict(case)),
             "--work", str(work)],
            cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    result = json.loads(file.read_text(encoding="utf-8"))
    print(f"{case.name}: static {result['measured']['static_accuracy']:.1%}", flush=True)
    return result


def report(results: list[dict[str, Any]]) -> str:
    """Means and standard deviations over seeds as a table."""
    first = results[0]
    lines = [
        "# Rows of given responses: the last block cut at the response's end, or whole",
        "",
        "Written by `python -m benchmarks.last_block`: its docstring says what is measured.",
        "",
        f"- {first['case']['updates']:,} updates of `{RECIPE}`, {first['case']['heldout']} held-out"
        " problems, greedy; mean ± sample standard deviation over seeds.",
        f"- {', '.join(sorted({r['machine']['cpu'] for r in results}))}; commit "
        f"{', '.join(sorted({r['commit'] for r in results}))}; "
        f"{', '.join(sorted({r['date'] for r in results}))}; "
        + ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
    ]
    for size in sorted({r["case"]["block_size"] for r in results}):
        lines += [
            "",
            f"## Blocks of {size}",
            "",
            "| | n | cut | whole |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, (heading, factor, decimals) in QUANTITIES.items():
            cells, seeds = [], 0
            for arm in ARMS:
                values = [
                    factor * r["measured"][name]
                    for r in results
                    if (r["case"]["arm"], r["case"]["block_size"]) == (arm, size)
                ]
                seeds = len(values)
                spread = f" ± {statistics.stdev(values):.{decimals}f}" if seeds > 1 else ""
                cells.append(f"{statistics.fmean(values):.{decimals}f}{spread}")
            lines.append(f"| {heading} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is missing, then write results and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--updates", type=int, default=640)
    parser.add_argument("--heldout", type=int, default=250)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs/last_block")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.work.resolve()
    if options.case:
        case = Case(**json.loads(options.case))
        measured = train_and_measure(case, work / case.name)
        result = {
            "case": asdict(case),
            "measured": measured,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        write_file(work / f"{case.name}.json", json.dumps(result) + "\n")
        return 0
    from megatron_dlm.data.arithmetic import write_examples

    work.mkdir(parents=True, exist_ok=True)
    write_examples(work / "train.jsonl", "train", TRAIN_SEED, EXAMPLES)
    write_examples(work / "heldout.jsonl", "heldout", HELDOUT_SEED, options.heldout)
    cases = [
        Case(arm, size, seed, options.updates, options.heldout)
        for seed in range(1, options.seeds + 1)
        for size in sorted(options.block_sizes, reverse=True)
        for arm in ARMS
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda case: run_case(case, work), cases))
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    write_file(options.output / "results.json", text)
    write_file(options.output / "report.md", report(results))
    print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
