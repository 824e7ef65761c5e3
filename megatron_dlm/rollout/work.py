"""How much work the forwards of a rollout were."""

from dataclasses import dataclass, field

from megatron_dlm.rollout.forward_plan import ForwardPlan


@dataclass
class RolloutWork:
    """Sizes of each forward of this replica since the last `take`, one entry a forward.

    Attributes:
        tokens: Tokens of the forward.
        pairs: Pairs of a query and a key that it sees.
        logits: Tokens that were drawn.
        keys: Keys and values that were read: the length of all sequences.
    """

    tokens: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)

    def add(self, plan: ForwardPlan, block_size: int | None) -> None:
        """Add a forward.

        Args:
            plan: Its plan.
            block_size: Grid of block-causal attention, 1 of causal; None: tokens see all of their
                sequence.
        """
        starts, ends = plan.starts, plan.ends
        if block_size is None:
            pairs = (ends - starts) * ends
        else:
            # A query sees the keys up to the end of its block; forwards hold whole ones.
            first, last = starts // block_size, ends // block_size
            pairs = block_size**2 * (last * (last + 1) - first * (first + 1)) // 2
        self.tokens.append(int((ends - starts).sum()))
        self.pairs.append(int(pairs.sum()))
        self.logits.append(len(plan.draw_rows))
        self.keys.append(int(ends.sum()))

    def take(self) -> "RolloutWork":
        """What there is; what follows is added to nothing."""
        taken = RolloutWork(self.tokens, self.pairs, self.logits, self.keys)
        self.tokens, self.pairs, self.logits, self.keys = [], [], [], []
        return taken
