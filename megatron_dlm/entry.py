"""What entry points have in common: how they fail."""

import functools
import os
import sys
from collections.abc import Callable

from megatron_dlm.errors import UserError

USER_ERROR_STATUS = 2


def report_user_errors(main: Callable[[], int]) -> Callable[[], int]:
    """Turn a `UserError` into one line on rank 0's standard error and exit status 2."""

    @functools.wraps(main)
    def wrapper() -> int:
        try:
            return main()
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            return USER_ERROR_STATUS

    return wrapper
