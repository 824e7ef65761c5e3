"""What products of 8-bit floats need, and what of it is missing here."""

from dataclasses import astuple, dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from megatron_dlm.config.schema import Config
from megatron_dlm.entry import local_rank


@dataclass(frozen=True)
class Parts:
    """What multiplies in FP8.

    Attributes:
        transformer_engine: Its version.
        capability: Compute capability of the GPU.
        cuda: Version that PyTorch is built for.
    """

    transformer_engine: Version
    capability: Version
    cuda: Version


_NAMES = ("transformer_engine {}", "a GPU of compute capability {}", "a PyTorch for CUDA {}")

NEEDED = {
    "delayed": Parts(Version("1.7"), Version("8.9"), Version("12.1")),
    "tensorwise": Parts(Version("2.2"), Version("8.9"), Version("12.1")),
    "blockwise": Parts(Version("2.3"), Version("9.0"), Version("12.9")),
    "mxfp8": Parts(Version("2.1"), Version("10.0"), Version("12.8")),
}
"""At least, by recipe. Megatron-Core and Transformer Engine check the same at the first product."""


def refusal(config: Config) -> str | None:
    """The first thing that the FP8 options lack, as "option: problem; remedy"."""
    model = config.model
    if model.fp8_format is None:
        return None
    without = "or leave --fp8-format out"
    try:
        transformer_engine = Version(version("transformer_engine"))
    except PackageNotFoundError:
        problem = "needs the package transformer_engine, which is not installed"
        return f"fp8_format: {problem}; install it (CUDA only), {without}"
    if model.transformer_impl != "transformer_engine":
        problem = "only layers of Transformer Engine multiply in FP8"
        return f"fp8_format: {problem}; add --transformer-impl transformer_engine, {without}"
    if not model.bf16:
        problem = "what is not multiplied in FP8 has to be in bfloat16"
        return f"fp8_format: {problem}; add --bf16, {without}"
    if model.fp8_recipe == "delayed" and "layernorm" in model.recompute_modules:
        problem = "names layernorm, and --fp8-recipe delayed would count its inputs twice"
        return f"recompute_modules: {problem}; leave it out, or choose another recipe"
    here = _here(config.parallel.device, transformer_engine)
    if here is None:
        return f"fp8_format: needs a GPU, and this run has none; run it on CUDA, {without}"
    lacking = missing(model.fp8_recipe, here)
    if lacking is None:
        return None
    others = [name for name in NEEDED if missing(name, here) is None]
    remedy = f"choose {' or '.join(others)}, {without}" if others else "leave --fp8-format out"
    return f"fp8_recipe: {lacking}; {remedy}"


def _here(device: str, transformer_engine: Version) -> Parts | None:
    """The parts of this process; None without a GPU."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(local_rank())
    cuda = Version(torch.version.cuda or "0")
    return Parts(transformer_engine, Version(f"{major}.{minor}"), cuda)


def missing(recipe: str, here: Parts) -> str | None:
    """What a recipe needs more than there is, in words; None: nothing."""
    for name, least, found in zip(_NAMES, astuple(NEEDED[recipe]), astuple(here), strict=True):
        if found < least:
            return f"needs {name.format(least)} or more, and here is {found}"
    return None
