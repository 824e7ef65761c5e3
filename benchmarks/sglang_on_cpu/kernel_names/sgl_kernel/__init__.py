"""Names that SGLang 0.5.23 imports from its compiled kernels on a CPU, and nothing behind them.

PyPI has these kernels for NVIDIA GPUs only. Decoding of blocks imports them, for other features,
and calls none: a call is an error, so nothing of SGLang is replaced unseen.
"""

from collections.abc import Callable
from typing import Any, NoReturn

_NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
)


def _absent(name: str) -> Callable[..., NoReturn]:
    def call(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} was called, and is not here")

    return call


globals().update({name: _absent(name) for name in _NAMES})
