"""Autoregressive language models into block-diffusion models, on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Megatron-Core warns at import about every optional package that is not installed. Those that a run
# asks for are checked by `megatron_dlm.config.validation`, with an error that says so.
warnings.filterwarnings("ignore", module=r"megatron\.")
