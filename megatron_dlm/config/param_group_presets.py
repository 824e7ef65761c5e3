"""Parameter groups that publications trained with, by name (`--param-group-preset`)."""

from megatron_dlm.config.training_groups import ParameterGroup, ParamGroupPreset

PARAM_GROUP_PRESETS: dict[ParamGroupPreset, tuple[ParameterGroup, ...]] = {
    # RND1 section 4.2, setting 4. Its schedule is constant; with another one, rates decay to 0.
    "rnd1": (
        ParameterGroup("attention", lr=3e-4, min_lr=0.0, weight_decay=0.1),
        ParameterGroup("default", lr=1e-8, min_lr=0.0, weight_decay=0.1),
    ),
}
