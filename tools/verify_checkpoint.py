"""`megatron-dlm verify` from a checkout."""

from megatron_dlm.commands import command_line

if __name__ == "__main__":
    command_line("verify")
