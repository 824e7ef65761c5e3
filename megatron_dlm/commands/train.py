"""Train a block-diffusion language model.

megatron-dlm train --config examples/tiny/opdlm.yaml --prompts prompts.jsonl --save runs/mine
torchrun --nproc-per-node 8 -m megatron_dlm train --config examples/qwen3_8b/opdlm.yaml ...
"""

from collections.abc import Sequence

from megatron_dlm.commands import parse_command
from megatron_dlm.config import Config, format_config, format_length, validate
from megatron_dlm.entry import rank, world_size
from megatron_dlm.training.run_lock import owned_run_folder


def main(argv: Sequence[str]) -> int:
    """Parse, validate, build, train, close."""
    config = parse_command("train", Config, argv)
    validate(config, world_size())
    with owned_run_folder(None if config.dry_run else config.logging.save):
        # Imported step by step, so that bad input is reported before PyTorch is loaded.
        from megatron_dlm.training.inputs import read_inputs

        inputs = read_inputs(config)
        if config.dry_run:
            if rank() == 0:
                print(format_config(config))
                print(format_length(config.of_data(len(inputs.data))))
                for line in inputs.notices:
                    print(f"# {line}")
            return 0
        from megatron_dlm.parallel import initialized
        from megatron_dlm.training.loop import train
        from megatron_dlm.training.run import build_run

        with initialized(config):
            train(build_run(config, inputs))
    return 0
