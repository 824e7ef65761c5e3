"""The record of a model family, and the registry of families by name and by model type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megatron_dlm.models.families.parameters import ParameterMapping, llama_parameters
from megatron_dlm.types.diffusion_kind import TWO_MODES, DiffusionKind

if TYPE_CHECKING:
    from megatron_dlm.models.architecture import Architecture


@dataclass(frozen=True)
class ModelType:
    """A `model_type` of config.json.

    Attributes:
        name: The value of the key.
        architecture: Class of transformers that loads an autoregressive model of this type; None
            for types that only diffusion models have.
        is_moe: Whether the feed-forward layers are mixtures of experts.
        diffusion_kind: Kind of the diffusion models of this type, for keys that config.json leaves
            out.
        states_attention: False for a type that allows either attention, whose config.json has to
            state it.
        defaults: Defaults of transformers for optional keys, beside `config_keys.DEFAULTS`.
    """

    name: str
    architecture: str | None = None
    is_moe: bool = False
    diffusion_kind: DiffusionKind | None = None
    states_attention: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _nothing(config: Mapping[str, Any], where: str) -> None:
    pass


@dataclass(frozen=True)
class ModelFamily:
    """A family of models: the meaning of their config.json, and the names of their tensors.

    Attributes:
        name: In `Architecture.family`.
        model_types: Its values of `model_type`. Of dense models and of mixtures of experts, the
            first with an `architecture` is the autoregressive one. `register` adds the types of the
            folders that dense diffusion models are exported to.
        qk_norm: Whether queries and keys are normalised before they are rotated.
        qkv_bias: Whether the projections to queries, keys and values have biases.
        nulls: Keys of config.json for which null differs from an absent key.
        check: Raises a UserError if a config.json asks for something unsupported; called with the
            file's name.
        config: Keys of config.json that this family has beside those of all families.
        parameters: All parameters of an autoregressive model, in the order of the checkpoint.
            Folders of diffusion models have Llama's names, as the modelling code in them has.
    """

    name: str
    model_types: tuple[ModelType, ...]
    qk_norm: bool = False
    qkv_bias: bool = False
    nulls: tuple[str, ...] = ()
    check: Callable[[Mapping[str, Any], str], None] = _nothing
    config: Callable[[Architecture], dict[str, Any]] = lambda architecture: {}
    parameters: Callable[[Architecture], list[ParameterMapping]] = llama_parameters

    def autoregressive_type(self, *, is_moe: bool) -> ModelType:
        """The type that an autoregressive model's config.json has."""
        return next(
            kind
            for kind in self.model_types
            if kind.architecture is not None and kind.is_moe == is_moe
        )


FAMILIES: dict[str, ModelFamily] = {}
"""All families by name."""


def register(family: ModelFamily) -> ModelFamily:
    """Add a family; the file of each family calls this once.

    Returns:
        The family, with the model types of its exports.

    Raises:
        ValueError: Its name or one of its model types is another family's.
    """
    for kind in [kind for kind in family.model_types if kind.architecture and not kind.is_moe][:1]:
        exports = (
            replace(kind, name=f"a2d-{family.name}", architecture=None, states_attention=False),
            replace(
                kind, name=f"two-mode-{family.name}", architecture=None, diffusion_kind=TWO_MODES
            ),
        )
        family = replace(family, model_types=(*family.model_types, *exports))
    taken = [kind.name for kind in family.model_types if kind.name in model_types()]
    if family.name in FAMILIES or taken:
        raise ValueError(f"{family.name} {taken}: the name or a model type is taken")
    FAMILIES[family.name] = family
    return family


def model_types() -> dict[str, tuple[ModelFamily, ModelType]]:
    """All values that `model_type` may have, each with its family."""
    return {
        kind.name: (family, kind) for family in FAMILIES.values() for kind in family.model_types
    }


def exported_as(prefix: str) -> dict[str, str]:
    """Formats of dense diffusion models, `<prefix>-<family>`, with the family of each."""
    return {f"{prefix}-{name}": name for name in FAMILIES if f"{prefix}-{name}" in model_types()}
