"""A mixture-of-experts layer: all experts in one product, against one after the other.

The second is Megatron-Core's `SequentialMLP` with its all-to-all dispatcher, built here and run in
the same process with the same weights. Times are processor seconds of a CPU; kernels and waits of
the host do not depend on the machine.

    python -m benchmarks.experts --output benchmarks/results/experts.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.environment import commit, machine, versions
from benchmarks.real_shapes import qwen3
from megatron_dlm.config import Config
from megatron_dlm.megatron_internals import spec_submodules
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.models.model_provider import transformer_config
from megatron_dlm.models.moe_layer import GroupedMoELayer, TorchTopKRouter
from megatron_dlm.output_file import write_file
from megatron_dlm.parallel import initialized

NUM_EXPERTS = (8, 32, 128)
TOKENS, HIDDEN, INNER, TOP_K = 256, 256, 96, 8
"""Of a forward; the sizes are an eighth of Qwen3-30B-A3B's."""
OPTIONS = {"device": "cpu"}

_NO_KERNEL = {"_unsafe_view", "detach", "empty", "empty_like", "lift_fresh", "new_empty", "device"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select"}


class OperationCounter(TorchDispatchMode):
    """Counts operations of PyTorch that launch something: all but views and allocations.

    Attributes:
        kernels: So many.
        waits: Those among them whose result has a shape or value that the host has to wait for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation and run it."""
        name = func._schema.name.partition("::")[2]
        self.kernels += not (func.is_view or name in _NO_KERNEL)
        self.waits += name in _WAITS
        return func(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Counts what hands a tensor's values to the host: on a CPU, no operation of PyTorch does."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call and make it."""
        self.count += func in (torch.Tensor.tolist, torch.Tensor.numpy)
        return func(*args, **(kwargs or {}))


def layers(num_experts: int) -> dict[str, MoELayer]:
    """Both kinds of layer with the same weights."""
    architecture = architecture_from_hf(
        qwen3(
            *(1, HIDDEN, 4, 2, HIDDEN),
            tied=False,
            num_experts=num_experts,
            num_experts_per_tok=TOP_K,
            moe_intermediate_size=INNER,
            norm_topk_prob=True,
        ),
        "config.json",
    )
    config = transformer_config(architecture, Config.from_dict(OPTIONS))
    built = {}
    for name, build in (("sequential", sequential_layer), ("grouped", GroupedMoELayer)):
        torch.manual_seed(0)
        built[name] = build(config)
    return built


def sequential_layer(config: TransformerConfig) -> MoELayer:
    """Megatron's layer whose experts run one after the other."""
    spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts)
    submodules = spec_submodules(spec)
    submodules.router = TorchTopKRouter
    return MoELayer(config, submodules)


def _step(layer: MoELayer, hidden: torch.Tensor, training: bool) -> torch.Tensor:
    layer.zero_grad()
    with torch.set_grad_enabled(training):
        output: torch.Tensor = layer(hidden)[0]
        if training:
            output.square().sum().backward()
    return output.detach()


def _seconds(steps: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Processor seconds of each, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return seconds


def measure(num_experts: int, training: bool, repetitions: int) -> dict[str, Any]:
    """Both layers, forward or forward and backward."""
    built = layers(num_experts)
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(1))
    hidden.requires_grad_(training)
    result: dict[str, Any] = {}
    outputs = {name: _step(layer, hidden, training) for name, layer in built.items()}
    torch.testing.assert_close(*outputs.values(), rtol=1e-4, atol=1e-4)
    for name, layer in built.items():
        with HostReads() as reads, OperationCounter() as counter:
            _step(layer, hidden, training)
        waits = counter.waits + reads.count
        result[name] = {"kernels": counter.kernels, "values_read_by_the_host": waits}
    steps = {name: partial(_step, layer, hidden, training) for name, layer in built.items()}
    medians = {k: statistics.median(v) for k, v in _seconds(steps, repetitions).items()}
    for name, seconds in medians.items():
        result[name]["processor_seconds"] = round(seconds, 5)
    return result | {
        "kernels_saved": round(result["sequential"]["kernels"] / result["grouped"]["kernels"], 2),
        "time_saved": round(medians["sequential"] / medians["grouped"], 2),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with initialized(Config.from_dict(OPTIONS)):
        results = {
            what: {str(n): measure(n, training, arguments.repetitions) for n in NUM_EXPERTS}
            for what, training in (("forward", False), ("forward and backward", True))
        }
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "shape": dict(tokens=TOKENS, hidden=HIDDEN, inner=INNER, experts_per_token=TOP_K),
        "by_number_of_experts": results,
    }
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if arguments.output:
        write_file(arguments.output, text)


if __name__ == "__main__":
    main()
