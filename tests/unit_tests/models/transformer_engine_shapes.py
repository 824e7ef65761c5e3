"""Builds models with Transformer Engine's layers, and with ours, and prints the shapes of both.

    python -m tests.unit_tests.models.transformer_engine_shapes FOLDER

FOLDER holds the Python part of Transformer Engine, as pip installs it: its layers, without the
compiled library that they call. Nothing is computed: a device without values stands for a GPU.
"""

import enum
import importlib
import json
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dense": ("qwen3", 1, {}),
    "dense FP8": ("qwen3", 1, {"fp8_format": "hybrid"}),
    "dense TP2": ("qwen3", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "experts": ("qwen3_moe", 1, {}),
    "experts EP2": ("qwen3_moe", 2, {"expert_model_parallel_size": 2}),
    "experts TP2": ("qwen3_moe", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}
"""Tiny model, processes and options."""

DTYPES = (
    "kByte",
    "kInt32",
    "kFloat32",
    "kFloat16",
    "kBFloat16",
    "kFloat8E4M3",
    "kFloat8E5M2",
    "kFloat4E2M1",
)


def import_transformer_engine(folder: Path) -> None:
    """Import its Python part, with stand-ins for its library and for what exports graphs."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # look for no library
    sys.path.append(str(folder))
    for name in ("transformer_engine_torch", "onnx", "onnxscript", "einops"):
        stand_in = MagicMock(name=name)
        stand_in.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = stand_in
    library: Any = sys.modules["transformer_engine_torch"]
    library.DType = enum.IntEnum("DType", DTYPES, start=0)
    package: Any = ModuleType("transformer_engine")
    package.__path__ = [str(folder / "transformer_engine")]
    package.__spec__ = ModuleSpec("transformer_engine", None, is_package=True)
    package.__version__ = version("transformer_engine")
    sys.modules["transformer_engine"] = package
    package.common = importlib.import_module("transformer_engine.common")
    package.common.load_framework_extension = lambda framework: None
    package.pytorch = importlib.import_module("transformer_engine.pytorch")


def shapes(model: str, world_size: int, options: dict[str, Any]) -> tuple[Any, set[str]]:
    """Shapes of the first process's parameters by Hugging Face's names, and classes of layers."""
    from megatron_dlm.accounting.fake_cuda import fake_cuda
    from megatron_dlm.config import Config
    from megatron_dlm.models.architecture import architecture_from_hf
    from megatron_dlm.models.model_parameters import local_parameters
    from megatron_dlm.models.model_provider import build_model
    from megatron_dlm.parallel import initialized

    path = Path("examples/tiny") / model / "config.json"
    architecture = architecture_from_hf(json.loads(path.read_text()), str(path))
    config = Config.from_dict({"device": "cuda", "bf16": True, **options})
    with fake_cuda(0, world_size), initialized(config):
        built = build_model(architecture, config)
        found = {
            " ".join(part.mapping.hf): [list(part.parameter.shape), part.shard, part.num_shards]
            for part in local_parameters(built, architecture)
        }
    return found, {type(module).__name__ for module in built.modules()}


def main() -> None:
    """Print a JSON list of the cases."""
    import_transformer_engine(Path(sys.argv[1]))
    results = []
    for name, (model, world_size, options) in CASES.items():
        engine = {"transformer_impl": "transformer_engine", **options}
        theirs, classes = shapes(model, world_size, engine)
        local = {key: value for key, value in options.items() if key != "fp8_format"}
        ours, _ = shapes(model, world_size, local)
        results.append(
            {
                "name": name,
                "transformer_engine": theirs,
                "local": ours,
                "classes": sorted(classes),
            }
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
