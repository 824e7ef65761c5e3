"""Build a teacher's model with its weights, in its precision."""

from megatron_dlm.config import Config
from megatron_dlm.models.fp8_weights import Fp8Loading, linear_weights_without_memory
from megatron_dlm.models.model import StageModel
from megatron_dlm.models.model_provider import build_frozen_model
from megatron_dlm.models.weights import LoadableWeights


def load_teacher(weights: LoadableWeights, config: Config) -> StageModel:
    """This rank's part of a teacher, frozen; all ranks that hold the model call this.

    Args:
        weights: Of the teacher.
        config: Of the run.

    Raises:
        UserError: The weights do not fit; raised on all ranks.
    """
    own, sizes = config.of_teacher(), weights.architecture
    if config.teacher_precision != "fp8":
        model = build_frozen_model(sizes, own)
        weights.load_into(model)
    else:
        with linear_weights_without_memory():
            model = build_frozen_model(sizes, own)
        loading = Fp8Loading(model)
        weights.load_into(model, place=loading.place)
        loading.finish()
    return model
