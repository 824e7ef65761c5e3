"""How much work the forwards of a rollout were."""

from dataclasses import dataclass, field, fields, replace

from megatron_dlm.rollout.forward_plan import ForwardPlan


@dataclass
class RolloutWork:
    """Sizes of each forward of this replica since the last `take`, one entry a forward.

    Attributes:
        tokens: Tokens of the forward.
        pairs: Pairs of a query and a key that it sees.
        logits: Tokens that were drawn, and those of blocks that were verified.
        keys: Keys and values that were read: the length of all sequences.
        read: Tokens that the last layer's feed-forward part was computed of.
        groups: Number of the group whose forward it was, from 0.
    """

    tokens: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def add(
        self,
        plan: ForwardPlan,
        context_block_size: int | None,
        group: int = 0,
        read: int | None = None,
    ) -> None:
        """Add a forward.

        Args:
            plan: Its plan.
            context_block_size: Final tokens that see each other, 1 under a causal context; None:
                tokens see all of their sequence.
            group: Number of its group.
            read: Tokens that the last layer's feed-forward part is computed of; None: all.
        """
        starts, noisy, ends = plan.starts, plan.noisy_starts, plan.ends
        if context_block_size is None:
            pairs = (ends - starts) * ends
        else:
            # A final token sees the keys up to the end of its block, and forwards hold whole ones;
            # the block in decoding sees all up to its own end.
            size = context_block_size
            first, last = starts // size, noisy // size
            pairs = size**2 * (last * (last + 1) - first * (first + 1)) // 2
            pairs += (ends - noisy) * ends
        tokens = int((ends - starts).sum())
        self.tokens.append(tokens)
        self.read.append(tokens if read is None else read)
        self.pairs.append(int(pairs.sum()))
        verified = sum(verification.rows.numel() for verification in plan.verifications)
        self.logits.append(len(plan.draw_rows) + verified)
        self.keys.append(int(ends.sum()))
        self.groups.append(group)

    def take(self) -> "RolloutWork":
        """What there is; what follows is added to nothing."""
        taken = replace(self)
        for part in fields(self):
            setattr(self, part.name, [])
        return taken
