import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dlm.rollout.pages import PAGE_SIZE, PagePool, pages_for, prefix_keys
from megatron_dlm.rollout.prompt_queue import PromptQueue
from megatron_dlm.types.trajectory import Prompt


@settings(max_examples=50, deadline=None)
@given(num_pages=st.integers(1, 12), seed=st.integers(0, 1000))
def test_a_page_is_free_or_used_and_holds_what_its_key_says(num_pages: int, seed: int) -> None:
    """Random sequences of calls against a list of who holds which page."""
    choose = random.Random(seed)
    pool = PagePool(num_pages)
    holders: list[list[int]] = []
    content: dict[int, bytes] = {}  # by page, of pages published since they were handed out
    for _ in range(60):
        held = {page for pages in holders for page in pages}
        assert pool.num_free == num_pages - len(held)
        action = choose.choice(["allocate", "share", "publish", "release", "forget"])
        key = bytes([choose.randrange(4)])
        if action == "allocate":
            count = choose.randint(0, num_pages)
            if count > pool.num_free:
                with pytest.raises(ValueError, match="are free"):
                    pool.allocate(count)
                continue
            pages = pool.allocate(count)
            assert not set(pages) & held
            assert set(pages) <= set(range(1, num_pages + 1))
            content = {page: key for page, key in content.items() if page not in pages}
            holders.append(pages)
        elif action == "forget":
            pool.forget()
            content = {}
        elif action == "publish" and held:
            page = choose.choice(sorted(held))
            if key not in content.values() and page not in content:
                pool.publish(page, key)
                content[page] = key
        elif action == "share":
            page = pool.share(key)
            assert page == next((p for p, k in content.items() if k == key), None)
            if page is not None:
                holders.append([page])
        elif action == "release" and holders:
            pool.release(holders.pop(choose.randrange(len(holders))))


def test_keys_stand_for_all_that_decides_the_keys_of_a_page() -> None:
    tokens = torch.arange(3 * PAGE_SIZE)
    keys = prefix_keys(tokens, 3 * PAGE_SIZE - 4, 4)
    assert len(keys) == 2  # the third page is not of complete blocks only
    changed = tokens.clone()
    changed[PAGE_SIZE - 1] = 0
    assert not set(keys) & set(prefix_keys(changed, 3 * PAGE_SIZE, 4))
    changed = tokens.clone()
    changed[PAGE_SIZE] = 0
    assert prefix_keys(changed, 2 * PAGE_SIZE, 4)[0] == keys[0]
    assert prefix_keys(changed, 2 * PAGE_SIZE, 4)[1] != keys[1]
    # With these, the keys of a page's last positions depend on tokens of the next page.
    assert prefix_keys(tokens, 3 * PAGE_SIZE, 3) == prefix_keys(tokens, 3 * PAGE_SIZE, 128) == []
    assert [pages_for(length) for length in (0, 1, PAGE_SIZE, PAGE_SIZE + 1)] == [0, 1, 1, 2]


def test_longest_responses_start_first_and_equal_prompts_together() -> None:
    def prompt(first: int, length: int, limit: int | None = None) -> Prompt:
        return Prompt(0, torch.full((length,), first), max_response_length=limit)

    prompts = [prompt(1, 3), prompt(2, 3), prompt(3, 5), prompt(1, 3), prompt(4, 9, 8)]
    queue = PromptQueue(prompts, 20)
    order = []
    while (request := queue.first()) is not None:
        order.append(request)
        queue.pop()
    assert not queue.may_have_more
    assert order == [2, 0, 3, 1, 4]
