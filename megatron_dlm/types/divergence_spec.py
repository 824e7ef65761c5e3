"""The divergence of a distillation, read and checked without PyTorch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dlm.errors import bad_value

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class DivergenceSpec:
    """A divergence between teacher p and student q, at temperature 1.

    Attributes:
        weights: Weight of each divergence in the sum: `forward_kl` = KL(p || q), `reverse_kl` =
            KL(q || p), `jsd` = b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q.
        jsd_beta: b above, strictly between 0 and 1.
        top_k: Compare the teacher's k most likely tokens only (ties are broken arbitrarily);
            0 compares the full vocabulary.
        tail: How top_k treats the other tokens: as one `bucket` of remaining mass on both sides,
            so that the sum stays a divergence, or `ignore`: only the terms of the k tokens, not
            renormalised, possibly negative (as in OPDLM's published 4B and 8B runs).
        chunk_size: Tokens whose logits are in memory at a time; None for as many as memory allows.

    Ranges are those of the options.
    """

    weights: Mapping[str, float]
    jsd_beta: float = 0.5
    top_k: int = 0
    tail: str = "bucket"
    chunk_size: int | None = None

    @classmethod
    def parse(cls, text: str, **settings: Any) -> "DivergenceSpec":
        """Read "forward_kl" or "forward_kl:0.5,reverse_kl:0.5"; a missing weight is 1.

        Raises:
            UserError: A divergence is unknown or named twice, or a weight is not a positive number.
        """

        def require(condition: bool, value: str, problem: str, remedy: str) -> None:
            if not condition:
                raise bad_value("divergence", value, problem, remedy)

        names, weights = ", ".join(DIVERGENCES), dict[str, float]()
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, colon, given = (field.strip() for field in part.partition(":"))
            require(name in DIVERGENCES, name, "is not a divergence", f"choose from {names}")
            require(name not in weights, text, f"names {name} twice", "name it once")
            try:
                weights[name] = float(given if colon else 1)
            except ValueError:
                require(False, text, f"{given!r} is not a number", "write name:weight")
            fine = 0 < weights[name] < math.inf
            require(fine, f"{name}:{weights[name]}", "weighs nothing", "give a positive weight")
        require(bool(weights), "", "names no divergence", f"name one of {names}")
        return cls(weights, **settings)
