"""How much work the forwards of a rollout were."""

from dataclasses import dataclass, field

from megatron_dlm.rollout.slots import ForwardPlan


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
        lengths = plan.ends - plan.starts
        if block_size is None:
            pairs = int((lengths * plan.ends).sum())
        else:
            # A query sees the keys up to the end of its block, or of the forward.
            ends = plan.ends.repeat_interleave(lengths)
            limit = (plan.position_ids // block_size + 1) * block_size
            pairs = int(limit.minimum(ends).sum())
        self.tokens.append(len(plan.token_ids))
        self.pairs.append(pairs)
        self.logits.append(len(plan.draw_rows))
        self.keys.append(int(plan.ends.sum()))

    def take(self) -> "RolloutWork":
        """What there is; what follows is added to nothing."""
        taken = RolloutWork(self.tokens, self.pairs, self.logits, self.keys)
        self.tokens, self.pairs, self.logits, self.keys = [], [], [], []
        return taken
