"""Products of 8-bit floats: what they need, and what of it is missing here."""

from dataclasses import astuple, dataclass
from importlib.metadata import version

import torch
from packaging.version import Version

from megatron_dlm.entry import local_rank
from megatron_dlm.platform import DeviceChoice


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


def parts_here(device: DeviceChoice) -> Parts | None:
    """The parts of this process; None without a GPU. Transformer Engine has to be installed."""
    if device == "cpu" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(local_rank())
    cuda = Version(torch.version.cuda or "0")
    return Parts(Version(version("transformer_engine")), Version(f"{major}.{minor}"), cuda)


def missing(recipe: str, here: Parts) -> str | None:
    """What a recipe needs more than there is, in words; None: nothing."""
    for name, least, found in zip(_NAMES, astuple(NEEDED[recipe]), astuple(here), strict=True):
        if found < least:
            return f"needs {name.format(least)} or more, and here is {found}"
    return None
