"""Pages of a KV cache: which are free, which are shared, and what is in them.

A page holds the keys and values of `PAGE_SIZE` consecutive positions of a sequence, in every layer,
or of as many on each of several ranks (`megatron_dlm.rollout.token_shares`).
Sequences whose prompts begin alike share the pages of what is alike (prefix caching). This module
keeps account only; keys and values are in `megatron_dlm.rollout.kv_cache`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Positions of a page.
PAGE_SIZE = 32

# Page 0 belongs to no sequence: padding is written there and reads from there.
NULL_PAGE = 0


def pages_for(length: int, page_size: int = PAGE_SIZE) -> int:
    """Pages that hold `length` positions."""
    return -(-length // page_size)


def padded(array: np.ndarray, rows: int, columns: int, value: int) -> np.ndarray:
    """An array with further rows and columns of one value; `np.pad` takes longer."""
    if array.shape == (rows, columns):
        return array
    result = np.full((rows, columns), value, dtype=array.dtype)
    result[: array.shape[0], : array.shape[1]] = array
    return result


def prefix_keys(
    token_ids: Tensor, length: int, block_size: int, page_size: int = PAGE_SIZE
) -> list[bytes]:
    """A key for each whole page of a prompt's first `length` tokens: what decides its content.

    Keys of a position depend on all tokens of its block and of earlier ones. Where blocks do not
    end with pages there are no keys, and nothing is shared.

    Args:
        token_ids: [P] int64, the prompt.
        length: Tokens whose keys do not depend on the response: those of its complete blocks.
        block_size: Tokens of a block of the visibility rule.
        page_size: Positions of a page.
    """
    if page_size % block_size:
        return []
    keys, digest = [], hashlib.sha256()
    for end in range(page_size, length + 1, page_size):
        digest.update(token_ids[end - page_size : end].numpy().tobytes())
        keys.append(digest.digest())
    return keys


class PagePool:
    """Hands out pages and counts the sequences that use each.

    A page that nobody uses keeps its content until it is handed out again, the one that was freed
    first before others: a later response to the same prompt finds it.

    Args:
        num_pages: Pages for sequences, numbered from 1.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = OrderedDict.fromkeys(range(1, num_pages + 1))
        self._users = [0] * (num_pages + 1)
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Pages for one user, with no content, in ascending order: neighbours stay neighbours.

        Raises:
            ValueError: There are not so many free ones.
        """
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} are free")
        pages = sorted(self._free.popitem(last=False)[0] for _ in range(count))
        for page in pages:
            self._users[page] = 1
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._page_of[key]
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Let others share a page, which holds what the key stands for from the next forward on."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def share(self, key: bytes) -> int | None:
        """The page with a content, for one more user; None if there is none."""
        page = self._page_of.get(key)
        if page is not None:
            self._users[page] += 1
            self._free.pop(page, None)
        return page

    def forget(self) -> None:
        """Share no page that was published so far: its content is of other weights."""
        self._key_of.clear()
        self._page_of.clear()

    def release(self, pages: Iterable[int]) -> None:
        """One user fewer for each page; those without a user are free."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free[page] = None
