"""Objectives by their `--objective` name."""

from megatron_dlm.objectives.base import Objective
from megatron_dlm.objectives.next_token import NextToken
from megatron_dlm.objectives.opdlm import OPDLM

OBJECTIVES: dict[str, type[Objective]] = {"opdlm": OPDLM, "next_token": NextToken}
