"""What `--partial-rollouts` saves, and what it does to learning: OPDLM on the tiny model.

    python -m benchmarks.partial_rollouts --output benchmarks/results/partial_rollouts.json

The tiny autoregressive model learns to decode blocks from examples first, for all arms alike; or
they start from a student that decodes already (`--start`, a checkpoint in the course of a run of
this recipe): accuracy then tells arms apart after few updates. Then each arm distils on-policy on
the same prompts, as many samples and updates: rollouts that wait for all of their responses, and
for shares of those in decoding. Counted are the forwards of the engine, all responses of a rollout
at once, which is the time of a rollout where a forward takes as long for many sequences as for few;
and the sequences that these decode. Then accuracy and tokens a forward on held-out problems,
greedy.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.environment import REPOSITORY, commit, machine, versions

SHARES = (1.0, 0.75, 0.5)
DECODINGS: dict[str, dict[str, Any]] = {
    "static": {"remasking_strategy": "low_confidence_static"},
    "dynamic_0.9": {"remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.9},
}


def recipe(name: str, **changes: Any) -> dict[str, Any]:
    """A tiny example's options, in this process."""
    options: dict[str, Any] = yaml.safe_load(
        (REPOSITORY / f"examples/tiny/{name}.yaml").read_text()
    )
    for key in ("load", "teacher_load"):
        if key in options:
            options[key] = str(REPOSITORY / options[key])
    return {**options, "tensorboard": False, "device": "cpu", **changes}


def train(options: dict[str, Any], heldout: Path | None = None) -> dict[str, Any]:
    """Train one model; what its rollouts were, and what it answers to held-out problems."""
    from megatron_dlm.config import Config, validate
    from megatron_dlm.parallel import initialized
    from megatron_dlm.training.inputs import read_inputs
    from megatron_dlm.training.loop import train as run_to_its_end
    from megatron_dlm.training.run import build_run

    config = Config.from_dict(options)
    validate(config, 1)
    inputs = read_inputs(config)
    started = time.process_time()
    with initialized(config):
        run = build_run(config, inputs)
        forwards: list[int] = []
        if run.source.engine is not None:
            work = run.source.engine.work
            add = work.add

            def counting(plan: Any, *of_forward: Any) -> None:
                forwards.append(len(plan.starts))
                add(plan, *of_forward)

            work.add = counting  # type: ignore[method-assign, assignment]
        run_to_its_end(run)
        seconds = time.process_time() - started
        if heldout is None:
            return {}
        lines = (Path(options["save"]) / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        ages = [m["staleness"] for m in metrics if m["staleness"] is not None]
        return {
            "samples": config.num_samples,
            "updates": len(metrics),
            "forwards": len(forwards),
            "sequences_a_forward": statistics.fmean(forwards),
            "sequence_forwards": sum(forwards),
            "continued_share": statistics.fmean([a["continued_share"] for a in ages] or [0.0]),
            "mean_rollouts": statistics.fmean([a["mean_rollouts"] for a in ages] or [0.0]),
            "processor_seconds": seconds,
            "final_loss": statistics.fmean(m["loss"] for m in metrics[-20:]),
            "held_out": answers(run, heldout),
        }


def answers(run: Any, heldout: Path) -> dict[str, dict[str, float | None]]:
    """Accuracy and tokens a forward by decoding."""
    from megatron_dlm.data.prompts import read_examples
    from megatron_dlm.evaluation.evaluator import evaluate
    from megatron_dlm.evaluation.rewards import REWARDS
    from megatron_dlm.rollout.engine import RolloutEngine
    from megatron_dlm.rollout.generation_config import GenerationConfig
    from megatron_dlm.types.trajectory import Prompt

    inputs, config = run.inputs, run.config
    examples = read_examples(
        heldout, inputs.tokenizer, inputs.special_tokens, config.data.max_prompt_length
    )
    prompts = [Prompt(e.sample_index, e.prompt_ids, e.record) for e in examples]
    measured = {}
    for name, strategy in DECODINGS.items():
        engine = RolloutEngine(
            run.student.model,
            generation=GenerationConfig(
                block_size=config.model.block_size,
                temperature=0.0,
                top_k=0,
                top_p=1.0,
                max_running_requests=64,
                **strategy,
            ),
            special_tokens=inputs.special_tokens,
            seed=1,
            groups=run.groups,
        )
        responses = engine.generate(prompts, config.rollout.max_response_length)
        result = evaluate(responses, inputs.tokenizer, REWARDS["exact_match"])
        measured[name] = {
            "accuracy": result.accuracy,
            "tokens_per_forward": result.tokens_per_forward,
        }
    return measured


def main() -> None:
    from megatron_dlm.data.arithmetic import write_examples

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--examples-first", type=int, default=160, help="updates on examples")
    parser.add_argument("--start", type=Path, help="a student's checkpoint; no examples then")
    parser.add_argument("--num-rollouts", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arms: dict[str, list[dict[str, Any]]] = {f"{share:g}": [] for share in SHARES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_examples(folder / "train.jsonl", "train", 1, 8192)
        heldout = folder / "heldout.jsonl"
        write_examples(heldout, "heldout", 3, arguments.held_out)
        start = arguments.start or folder / "first"
        if arguments.start is None:
            first = recipe(
                "sft",
                train_data=str(folder / "train.jsonl"),
                save=str(start),
                train_iters=arguments.examples_first,
                lr_warmup_iters=20,
            )
            train(first)
        for seed in range(1, arguments.seeds + 1):
            for share in SHARES:
                options = recipe(
                    "opdlm",
                    load=str(start),
                    finetune=True,
                    prompts=str(folder / "train.jsonl"),
                    save=str(folder / f"{share}-{seed}"),
                    seed=seed,
                    num_rollouts=arguments.num_rollouts,
                    epochs_per_rollout=1,
                    lr_warmup_iters=10,
                    max_running_requests=256,
                    partial_rollouts=share,
                    # Answers of the teacher would hide what the student's own do.
                    teacher_response_fraction=0.0,
                    teacher_response_fraction_schedule="constant",
                )
                arms[f"{share:g}"].append(train(options, heldout))
                print(share, seed, json.dumps(arms[f"{share:g}"][-1]), flush=True)
    whole = statistics.fmean(result["forwards"] for result in arms["1"])
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "command": f"python -m benchmarks.partial_rollouts {' '.join(sys.argv[1:])}",
        "held_out_problems": arguments.held_out,
        "starts_from": "examples"
        if arguments.start is None
        else f"{arguments.start.parent.name}/{arguments.start.name}",
        "forwards_over_those_of_whole_rollouts": {
            share: statistics.fmean(result["forwards"] for result in results) / whole
            for share, results in arms.items()
        },
        "by_share": arms,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
