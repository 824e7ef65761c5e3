"""Autoregressive language models into block-diffusion models, on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Megatron-Core warns at import about every optional package that is not installed. Those that a run
# asks for are checked by `megatron_dlm.config.validation`, with an error that says so.
warnings.filterwarnings("ignore", module=r"megatron\.")
# Its distributed checkpoints are made of what PyTorch is about to replace.
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
