"""`python -m megatron_dlm COMMAND ...`, which torchrun can start too."""

from megatron_dlm.commands import command_line

if __name__ == "__main__":
    command_line()
