r"""SGLang itself on a CPU beside our engine: tokens and training on the same weights.

    bash benchmarks/sglang_on_cpu/environment.sh ENVIRONMENT
    python -m benchmarks.sglang_on_cpu --environment ENVIRONMENT \
        --output benchmarks/results/sglang.json

For a dense model and one of experts, random and tiny but with Qwen3's vocabulary (SGLang's MASK is
a constant in it): the model is exported as `sdar`, `python -m sglang.launch_server` serves the
folder, and prompts of all lengths are decoded by it and by our engine: with the weights of the
folder, with the same ones pushed, and with those that training has made. A greedy run trains with
its own rollouts, and with SGLang's by either transfer. Exit status 1 where anything differs. With
`--cases`, results of the others stay in the file.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import commit, machine, versions
from benchmarks.sglang_on_cpu.model import write_model
from benchmarks.sglang_on_cpu.server import SglangServer, environment_versions

BLOCK = 4
LONGEST = 32
"""Tokens of a response."""

CASES: dict[str, dict[str, Any]] = {
    "dense, threshold 0.05": {"moe": False, "threshold": 0.05},
    "dense, threshold 0.01": {"moe": False, "threshold": 0.01},
    "experts, threshold 0.01": {"moe": True, "threshold": 0.01},
}


def options(folder: Path, case: dict[str, Any], save: Path, **served: Any) -> dict[str, Any]:
    """A greedy run of six updates on three rollouts."""
    return {
        "load": str(folder / "model"),
        "prompts": str(folder / "prompts.jsonl"),
        "save": str(save),
        "block_size": BLOCK,
        "remasking_strategy": "low_confidence_dynamic",
        "dynamic_threshold": case["threshold"],
        "temperature": 0.0,
        "num_rollouts": 3,
        "rollout_batch_size": 8,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "max_prompt_length": 128,
        "max_response_length": LONGEST,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "log_interval": 1000,
        "tensorboard": False,
        "device": "cpu",
        **served,
    }


def decoded_by_sglang(run: Any, server: SglangServer, prompts: list[Any]) -> list[list[int]]:
    """Tokens of responses, from a server as it was started."""
    from megatron_dlm.rollout.external.client import RolloutServer
    from megatron_dlm.rollout.external.responses import request

    client = RolloutServer(server.url, timeout_s=600.0, retries=0)
    generation = run.source.engine.generation

    def one(prompt: Any) -> list[int]:
        limit = prompt.response_limit(LONGEST)
        body = request(prompt, limit, generation, run.inputs.special_tokens, 1)
        answer: list[int] = client.post("/generate", body)["output_ids"]
        return answer

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(one, prompts))


def some_prompts(count: int) -> list[Any]:
    """Of 1 to 41 tokens that end anywhere in a block, with limits that do too."""
    from megatron_dlm.types.trajectory import Prompt

    draws = torch.Generator().manual_seed(5)
    prompts = []
    for index in range(count):
        ids = torch.randint(0, 508, (1 + index % 41,), generator=draws)
        limit = int(torch.randint(1, LONGEST + 1, (1,), generator=draws))
        prompts.append(Prompt(index, ids, max_response_length=limit))
    return prompts


def compared(ours: list[Any], theirs: list[list[int]]) -> dict[str, Any]:
    """How many responses have the same tokens."""
    same = [
        trajectory.response_ids.tolist() == ids
        for trajectory, ids in zip(ours, theirs, strict=True)
    ]
    return {
        "responses": len(ours),
        "equal": sum(same),
        "tokens": sum(len(trajectory.response_ids) for trajectory in ours),
        "ended_by_eos": sum(trajectory.finish_reason == "eos" for trajectory in ours),
        "forwards_that_drew": sum(trajectory.denoising_forwards for trajectory in ours),
    }


def train(
    settings: dict[str, Any], server: SglangServer | None = None, count: int = 0
) -> dict[str, Any]:
    """Train; what the updates were, and tokens before and after where there is a server."""
    from megatron_dlm.config import Config, validate
    from megatron_dlm.parallel import initialized
    from megatron_dlm.rollout.engine import RolloutEngine
    from megatron_dlm.training.inputs import read_inputs
    from megatron_dlm.training.loop import train as run_to_its_end
    from megatron_dlm.training.run import build_run

    config = Config.from_dict(settings)
    validate(config, 1)
    inputs = read_inputs(config)
    tokens = {}
    with initialized(config):
        run = build_run(config, inputs)
        engine: Any = run.source.engine
        prompts = some_prompts(count)

        def together() -> list[Any]:
            own = RolloutEngine(
                run.student.model,
                generation=engine.generation,
                special_tokens=inputs.special_tokens,
                seed=1,
                groups=run.groups,
            )
            return own.generate(prompts, LONGEST)

        def pushed() -> dict[str, Any]:
            theirs = engine.generate_together(prompts, LONGEST, one_queue=False)
            return compared(together(), [t.response_ids.tolist() for t in theirs])

        if server is not None and count:
            tokens["weights of the export"] = compared(
                together(), decoded_by_sglang(run, server, prompts)
            )
            tokens["the same, pushed"] = pushed()
        run_to_its_end(run)
        if server is not None and count:
            tokens["trained, pushed"] = pushed()
            engine.close()
    lines = (Path(settings["save"]) / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    names = ("loss", "response_lengths", "tokens_by_step", "tokens_per_forward", "eos_rate")
    return {"tokens": tokens, "updates": [{n: line[n] for n in names} for line in metrics]}


def measure(case: dict[str, Any], environment: Path, count: int) -> dict[str, Any]:
    """One case of `CASES`."""
    from megatron_dlm.commands import main as command
    from megatron_dlm.data.arithmetic import write_examples

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", moe=case["moe"])
        write_examples(folder / "prompts.jsonl", "train", 5, 28)
        words = ["convert", "--load", folder / "model", "--save", folder / "export"]
        words += ["--block-size", BLOCK, "--dynamic-threshold", case["threshold"]]
        if command([str(word) for word in words]):
            sys.exit(1)
        own = train(options(folder, case, folder / "own"))
        result: dict[str, Any] = {"losses": [line["loss"] for line in own["updates"]]}
        with SglangServer(environment, folder / "export", folder / "log") as server:
            for transfer in ("distributed", "disk"):
                served = {
                    "rollout_engine": "sglang",
                    "rollout_engine_urls": [server.url],
                    "rollout_engine_weights": transfer,
                }
                settings = options(folder, case, folder / transfer, **served)
                # A server has the weights of its folder until the first push.
                found = train(settings, server, count if transfer == "distributed" else 0)
                result["tokens"] = found["tokens"] or result.get("tokens")
                result[f"losses by {transfer}"] = [line["loss"] for line in found["updates"]]
                result[f"updates by {transfer} equal"] = found["updates"] == own["updates"]
    return result


def is_equal(result: dict[str, Any]) -> bool:
    """Whether nothing differs."""
    tokens = all(found["equal"] == found["responses"] for found in result["tokens"].values())
    return tokens and result["updates by distributed equal"] and result["updates by disk equal"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--environment", type=Path, required=True, help="with SGLang in it")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=82)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "versions of SGLang's environment": environment_versions(arguments.environment),
    }
    results: dict[str, Any] = {}
    if arguments.output.exists() and set(arguments.cases) != set(CASES):
        results = json.loads(arguments.output.read_text())["cases"]
    for name in arguments.cases:
        results[name] = measure(CASES[name], arguments.environment, arguments.prompts)
        is_same = all(is_equal(result) for result in results.values())
        report |= {"all equal": is_same, "cases": results}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["all equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
