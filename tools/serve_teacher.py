"""`megatron-dlm serve-teacher` from a checkout."""

import sys

from megatron_dlm.commands import main

if __name__ == "__main__":
    sys.exit(main(["serve-teacher", *sys.argv[1:]]))
