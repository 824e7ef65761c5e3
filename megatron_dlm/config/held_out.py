"""Options of what is measured on held-out data while a run trains."""

from dataclasses import dataclass
from typing import Annotated

from megatron_dlm.config.marks import AT_LEAST_ONE, AT_LEAST_ZERO, TEMPERATURE


@dataclass(frozen=True)
class HeldOutConfig:
    """Held-out data: validation loss, and accuracy on prompts."""

    valid_data_path: str | None = None
    """Held-out corpus for the validation loss of a run on --data-path, in the same format."""
    valid_data: str | None = None
    """Held-out examples for the validation loss of a run on --train-data, in the same format."""
    eval_interval: Annotated[int, AT_LEAST_ZERO] = 0
    """Optimizer steps between two validation losses, where held-out data are given; 0 takes one
    only, at the end of the run."""
    eval_iters: Annotated[int, AT_LEAST_ONE] = 10
    """Global batches of held-out data that a validation loss is taken over: always the same samples
    with the same masks."""
    eval_prompts: str | None = None
    """Held-out prompts that the student answers in the course of training, from the same kinds of
    files as --prompts, with what --reward reads: accuracy, tokens a forward and samples."""
    eval_prompts_interval: Annotated[int, AT_LEAST_ZERO] = 0
    """Optimizer steps between two evaluations on --eval-prompts; 0 makes one only, at the end of
    the run."""
    eval_decodings: tuple[str, ...] = ()
    """Decoding settings of an evaluation, by the names of megatron-dlm evaluate --settings: static,
    static:<steps>, dynamic:<threshold>, dynamic:0.9@8 (block size), autoregressive, ... The first
    one decides which checkpoint is the best (default: the one that the decoding options
    describe)."""
    eval_num_prompts: Annotated[int | None, AT_LEAST_ONE] = None
    """Answer only this many prompts from the beginning of the file."""
    eval_temperature: Annotated[float | None, TEMPERATURE] = None
    """Softmax temperature of an evaluation; 0 takes the most likely token (default:
    --temperature)."""
    eval_max_response_length: Annotated[int | None, AT_LEAST_ONE] = None
    """Longest response of an evaluation in tokens (default: --max-response-length)."""
