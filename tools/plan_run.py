"""`megatron-dlm plan` from a checkout."""

import sys

from megatron_dlm.commands import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
