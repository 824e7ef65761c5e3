"""What a rollout trains on is the same under every layout, each sample once."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.training.rollout_selection import select, share_of


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_selection_does_not_depend_on_how_far_replicas_came(data: st.DataObject) -> None:
    """Replicas that learn of the limit late go on past it; what is chosen is the same."""
    truth = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=12))
    forced = data.draw(st.sets(st.integers(0, len(truth) - 1), max_size=len(truth) // 2))
    wanted = data.draw(st.integers(len(forced), len(truth)))
    order = sorted((n, s) for s, n in enumerate(truth) if s not in forced)
    chosen = order[: wanted - len(forced)]
    limit = chosen[-1][0] if chosen else 0
    forwards, finished = {}, set()
    for sample, number in enumerate(truth):
        seen = number
        if sample not in forced:
            seen = min(number, limit + data.draw(st.integers(0, 5)))
        forwards[sample] = seen
        if seen == number:
            finished.add(sample)
    found = select(forwards, finished, forced, wanted)
    assert found.trained == sorted(forced | {s for _, s in chosen})
    assert found.left == sorted(set(range(len(truth))) - set(found.trained))
    assert found.forwards == limit


@given(st.lists(st.integers(0, 999), min_size=1, max_size=20, unique=True), st.integers(1, 6))
def test_shares_are_equal_and_a_copy_fills_the_last(samples: list[int], replicas: int) -> None:
    shares = [share_of(samples, replica, replicas) for replica in range(replicas)]
    assert len({len(share) for share, _ in shares}) == 1
    assert sorted(s for share, own in shares for s in share[:own]) == sorted(samples)
    assert all(s in samples for share, own in shares for s in share[own:])
