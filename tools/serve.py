"""`megatron-dlm serve` from a checkout."""

import sys

from megatron_dlm.commands import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
