"""`megatron-dlm critical-batch-size` from a checkout."""

import sys

from megatron_dlm.commands import main

if __name__ == "__main__":
    sys.exit(main(["critical-batch-size", *sys.argv[1:]]))
