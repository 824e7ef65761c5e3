"""What the last stage of a pipeline has drawn, on its way to all stages.

n: draws of a forward; V: sequences of one of its verifications; m: all numbers of a forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dlm.idle import NEIGHBOURS
from megatron_dlm.parallel import ParallelGroups
from megatron_dlm.rollout.forward_plan import ForwardPlan
from megatron_dlm.rollout.sampling import SampledTokens
from megatron_dlm.rollout.verification import Verified


@dataclass(frozen=True)
class Decisions:
    """Draws and verifications of one forward; a stage asks for them when it needs them.

    Attributes:
        plan: The plan of that forward.
        numbers: [m] float64, exact for ids: draws [3, n], then each verification's results.
        work: The message that brings them; None where there is none to wait for.
    """

    plan: ForwardPlan
    numbers: Tensor
    work: Any = None

    @classmethod
    def shared(
        cls, plan: ForwardPlan, own: tuple[Tensor, list[Tensor]] | None, groups: ParallelGroups
    ) -> Decisions:
        """Send them, or prepare to receive them; all stages call this in the order of forwards.

        Args:
            plan: The plan of the forward.
            own: Draws and verifications, on the last stage; None on the others.
            groups: Process groups.
        """
        if own is not None:
            draws, verified = own
            parts = [draws.flatten(), *(part.flatten() for part in verified)]
            numbers = torch.cat(parts) if verified else parts[0]
        else:
            size = 3 * len(plan.draw_rows) + sum(v.result_shape.numel() for v in plan.verifications)
            numbers = plan.uniforms.new_empty(size)
        if groups.decisions is None or not len(numbers):
            return cls(plan, numbers)
        work = dist.broadcast(
            numbers, src=groups.pp_last_rank, group=groups.decisions, async_op=True
        )
        return cls(plan, numbers, work)

    def wait(self) -> None:
        """Wait until they are here."""
        if self.work is not None:
            with NEIGHBOURS.waiting():
                self.work.wait()

    @property
    def draws(self) -> SampledTokens:
        """The tokens that were drawn; after `wait`."""
        count = 3 * len(self.plan.draw_rows)
        return SampledTokens.unpack(self.numbers[:count].view(3, -1))

    @property
    def verified(self) -> list[Verified]:
        """Results of the plan's verifications; after `wait`."""
        shapes = [verification.result_shape for verification in self.plan.verifications]
        rest = self.numbers[3 * len(self.plan.draw_rows) :]
        parts = rest.split([shape.numel() for shape in shapes]) if shapes else ()
        return [
            Verified.unpack(part.view(shape)) for part, shape in zip(parts, shapes, strict=True)
        ]
