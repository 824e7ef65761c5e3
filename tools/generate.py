"""`megatron-dlm generate` from a checkout."""

from megatron_dlm.commands import command_line

if __name__ == "__main__":
    command_line("generate")
