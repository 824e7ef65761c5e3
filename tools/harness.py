"""`megatron-dlm lm-eval` from a checkout."""

import sys

from megatron_dlm.commands import main

if __name__ == "__main__":
    sys.exit(main(["lm-eval", *sys.argv[1:]]))
