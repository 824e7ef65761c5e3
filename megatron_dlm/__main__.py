"""`python -m megatron_dlm COMMAND ...`, which torchrun can start too."""

import sys

from megatron_dlm.commands import main

if __name__ == "__main__":
    sys.exit(main())
