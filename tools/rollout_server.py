"""`megatron-dlm rollout-server` from a checkout."""

import sys

from megatron_dlm.commands import main

if __name__ == "__main__":
    sys.exit(main(["rollout-server", *sys.argv[1:]]))
