"""Run tasks of lm-evaluation-harness on any checkpoint, with the harness's own command line.

megatron-dlm lm-eval --model_args load=runs/mine,setting=dynamic:0.9 --tasks gsm8k
torchrun --nproc-per-node 8 -m megatron_dlm lm-eval --model_args load=hf/mine,bf16=True \
    --tasks arc_challenge,gsm8k --apply_chat_template --output_path results/

`--model` is `megatron-dlm`; its arguments are `load`, `setting` (as `megatron-dlm evaluate
--settings` names it), `orders`, `greedy`, `think_end_token` and the options of `megatron-dlm
generate`, by name.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

from megatron_dlm.entry import rank
from megatron_dlm.extras import check_installed


def main(argv: Sequence[str]) -> int:
    """Hand the arguments to the harness, with our model registered."""
    check_installed("lm_eval", "megatron-dlm lm-eval", None)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from megatron_dlm.evaluation.harness import MODEL_NAME  # registers the model

    arguments = list(argv)
    subcommand = arguments.pop(0) if arguments and arguments[0] in ("ls", "validate") else "run"
    if subcommand == "run" and "-h" not in arguments and "--help" not in arguments:
        arguments = ["--model", MODEL_NAME, *arguments]
    with ExitStack() as stack:
        if rank() != 0:  # every process has all results, and one of them shows and writes them
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            read = EvaluatorConfig.from_cli

            def read_without_outputs(namespace: Namespace) -> EvaluatorConfig:
                config = read(namespace)
                config.output_path = None
                config.log_samples = False
                config.wandb_args = config.trackio_args = config.hf_hub_log_args = {}
                return config

            EvaluatorConfig.from_cli = read_without_outputs
            stack.callback(setattr, EvaluatorConfig, "from_cli", read)
        before = sys.argv
        stack.callback(setattr, sys, "argv", before)
        sys.argv = ["megatron-dlm lm-eval", subcommand, *arguments]
        cli_evaluate()
    return 0
