"""Build a teacher's model with its weights, in its precision."""

from megatron_dlm import platform
from megatron_dlm.config import Config
from megatron_dlm.models.fp8_weights import keep_in_fp8
from megatron_dlm.models.model import StageModel
from megatron_dlm.models.model_provider import build_frozen_model
from megatron_dlm.models.weights import ModelWeights


def load_teacher(weights: ModelWeights, config: Config) -> StageModel:
    """This rank's part of a teacher, frozen; all ranks that hold the model call this.

    Args:
        weights: Of the teacher.
        config: Of the run.

    Raises:
        UserError: The weights do not fit; raised on all ranks.
    """
    model = build_frozen_model(weights.architecture, config.of_teacher())
    weights.load_into(model)
    if config.teacher_precision == "fp8":
        keep_in_fp8(model)
        platform.release_memory()
    return model
