"""Warn when a run turns a diffusion model into another kind of diffusion model.

Growing the block size of a model is a recipe; to lose what it had learnt under full attention may
be a mistake.
"""

from megatron_dlm.config import Config
from megatron_dlm.models.architecture import read_diffusion_kind
from megatron_dlm.training.inputs import RunInputs
from megatron_dlm.types.diffusion_kind import DiffusionKind


def changed_diffusion_kind(config: Config, inputs: RunInputs) -> list[str]:
    """A warning, if the run makes another kind of model of the diffusion model in `--load`.

    Args:
        config: The run's configuration.
        inputs: With the source of the weights.
    """
    source = inputs.source
    if source is None or source.diffusion_kind is None:
        return []
    stated, written = source.architecture.hf_config, inputs.hf_config(config)
    trained = read_diffusion_kind(written)
    block_size = written.get("block_size")
    if trained == source.diffusion_kind and stated.get("block_size", block_size) == block_size:
        return []
    blocks = "" if block_size is None else f" and --block-size {block_size}"
    return [
        f"warning: the config.json of --load {source.path} states "
        f"{_described(source.diffusion_kind, stated.get('block_size'))}; with "
        f"--objective {config.objective.objective}{blocks} this run makes it "
        f"{_described(trained, block_size)}"
    ]


def _described(kind: DiffusionKind | None, block_size: int | None) -> str:
    if kind is None:
        return "an autoregressive model"
    logits = "shifted" if kind.shifted else "unshifted"
    blocks = "" if block_size is None else f", blocks of {block_size}"
    context = " with a causal context" if kind.has_causal_context else ""
    return (
        f"a diffusion model ({kind.attention_pattern} attention{context}, {logits} logits{blocks})"
    )
