"""How many slots of time the stages of a pipeline are idle in a rollout, counted, not measured.

A slot is what one forward of one model chunk takes on one stage; all take equally long, and
messages take no time. So the count depends on nothing but the order of the forwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageSlots:
    """Slots of all stages from the first forward's begin to the last one's end.

    Attributes:
        busy: With a forward.
        idle: Without.
    """

    busy: int
    idle: int

    @property
    def idle_share(self) -> float:
        """Share of the slots that are idle."""
        return self.idle / max(self.busy + self.idle, 1)


def rounds(turns: Sequence[int], stages: int) -> list[list[int]]:
    """Forwards in a row that run one model chunk after the other, all in turn: one a stage."""
    made: list[list[int]] = []
    for group in turns:
        last = made[-1][-1] if made else group
        if not made or group <= last or group // stages != last // stages:
            made.append([])
        made[-1].append(group)
    return made


def stage_slots(turns: Sequence[int], stages: int, chunks: int = 1) -> StageSlots:
    """Count the slots of a rollout.

    A forward begins on a stage when the stage before has ended it and the stage itself what comes
    before in its order; a chunk after the first when the last stage has ended the chunk before it.
    A group's next forward begins, on any stage, when the last stage has drawn from its last one.

    Args:
        turns: Group of each forward, in their order (`RolloutWork.groups`).
        stages: Of the pipeline.
        chunks: Model chunks of a stage (virtual stages).
    """
    free = [0] * stages  # when a stage has ended what it has begun
    ended: dict[int, int] = {}  # when the last stage has ended a group's last chunk
    for round_ in rounds(turns, stages):
        for _ in range(chunks):
            for group in round_:
                before = ended.get(group, 0)
                for stage in range(stages):
                    before = free[stage] = max(before, free[stage]) + 1
                ended[group] = before
    busy = stages * chunks * len(turns)
    return StageSlots(busy, stages * max(free) - busy)
