"""What GPUs can do: published sizes, and the shares of them that training and decoding reach.

A file of measured rates (`--rates`) takes the place of any of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_dlm.errors import bad_value
from megatron_dlm.json_file import read_json_object

MOST = 1e9
"""Above every rate that hardware has in the units of `Gpu`."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, its links, and what software reaches of them.

    Attributes:
        name: As `--gpu` takes it.
        memory_gb: In 10^9 bytes, as on the data sheet.
        tflops: Of dense bf16 products, on the data sheet.
        memory_gb_s: Bandwidth of its memory.
        node_gb_s: Bandwidth to another GPU of the node, one way (NVLink).
        network_gb_s: Bandwidth to another node, one way.
        host_gb_s: Bandwidth to the host's memory.
        dense_share: Of `tflops` that training of a dense model reaches.
        moe_share: The same with experts, exchange within a node included.
        bandwidth_share: Of every bandwidth.
        launch_us: Microseconds of a kernel that does nothing.
        reserve_gb: Memory of CUDA, NCCL, libraries and what the allocator cannot use.
    """

    name: str
    memory_gb: float
    tflops: float
    memory_gb_s: float
    node_gb_s: float
    network_gb_s: float = 50.0
    host_gb_s: float = 25.0
    dense_share: float = 0.4
    moe_share: float = 0.18
    bandwidth_share: float = 0.7
    launch_us: float = 4.0
    reserve_gb: float = 3.0

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gb * 1e9

    def flops(self, *, is_moe: bool) -> float:
        """FLOPs per second that training reaches."""
        return self.tflops * 1e12 * (self.moe_share if is_moe else self.dense_share)

    def bandwidth(self, gb_s: float) -> float:
        """Bytes per second that are reached of a bandwidth."""
        return gb_s * 1e9 * self.bandwidth_share


# Data sheets of NVIDIA: A100 (2021), H100 SXM (2023), H200 (2024), HGX B200 and GB200 (2025).
# Shares: Megatron-LM reports 38 to 47 % of an H100's peak for dense models; RND1's table 4.2 has
# 331 to 454 TFLOP/s of 2,250 for Qwen3-30B-A3B. They are assumptions where no rates are given.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40, 312, 1_555, 300, network_gb_s=25),
        Gpu("a100", 80, 312, 2_039, 300, network_gb_s=25),
        Gpu("h100", 80, 989, 3_350, 450),
        Gpu("h200", 141, 989, 4_800, 450),
        Gpu("b200", 180, 2_250, 8_000, 900),
        Gpu("gb200", 186, 2_500, 8_000, 900, network_gb_s=100, host_gb_s=200),
    )
}


def find_gpu(name: str, rates: str | None) -> Gpu:
    """A GPU by its name, with the rates of a JSON file in place of its own.

    Raises:
        UserError: There is no such GPU, or the file has a key that is no rate, or no number.
    """
    if name not in GPUS:
        remedy = f"choose {', '.join(GPUS)}, or the nearest with its numbers in --rates"
        raise bad_value("--gpu", name, "is unknown", remedy)
    return GPUS[name] if rates is None else _measured(GPUS[name], rates)


def _measured(gpu: Gpu, rates: str) -> Gpu:
    found: Mapping[str, Any] = read_json_object(Path(rates), "--rates")
    known = [field.name for field in fields(Gpu) if field.name != "name"]
    for key, value in found.items():
        if key not in known:
            raise bad_value(f"--rates {rates}", key, "is no rate", f"choose {', '.join(known)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        limit = 1.0 if key.endswith("_share") else MOST
        if not is_number or not 0 < value <= limit:
            remedy = f"give a number above 0 and at most {limit:g}"
            raise bad_value(f"--rates {rates}: {key}", value, "is no such number", remedy)
    return replace(gpu, **found)
