"""A further family is one file: the one in docs/adding-a-model-family.md, and nothing else."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3ForCausalLM

from megatron_dlm.config import Config
from megatron_dlm.conversion.hf_export import export_hf
from megatron_dlm.conversion.hf_import import load_hf_weights
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import active_parameters, read_architecture
from megatron_dlm.models.families import FAMILIES
from megatron_dlm.models.model_provider import build_model
from megatron_dlm.parallel import initialized
from tests.tiny import REPOSITORY, run_config, run_training, save_random_model, write_data
from tests.unit_tests.conversion.hf_models import hf_logits
from tests.unit_tests.conversion.megatron_models import megatron_logits, random_tokens

NAME = "megatron_dlm.models.families.phi3"


@pytest.fixture
def family(tmp_path: Path) -> Iterator[None]:
    """The code of the page as a file."""
    page = (REPOSITORY / "docs" / "adding-a-model-family.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "phi3.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield
    finally:
        FAMILIES.pop("phi3", None)
        del sys.modules[NAME]


def test_one_file_is_a_family(family: None, tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "phi3", family="phi3")
    hf_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    assert isinstance(hf_model, Phi3ForCausalLM)
    architecture = read_architecture(source)
    assert active_parameters(architecture) == hf_model.num_parameters()
    tokens = random_tokens()
    expected = hf_logits(hf_model, tokens)
    with initialized(Config.from_dict({"device": "cpu"})):
        model = build_model(architecture, Config())
        load_hf_weights(model, architecture, source)
        logits = megatron_logits(model, tokens)
        assert logits is not None
        assert (logits - expected).abs().max() < 1e-4
        export_hf(model, architecture, tmp_path / "out", format="autoregressive")
    tensors, exported = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out")
    )
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(again, Phi3ForCausalLM)
    assert torch.equal(hf_logits(again, tokens), expected)

    write_data(tmp_path, 8)
    options = dict(rollout_batch_size=4, max_response_length=8)
    (line,) = run_training(run_config(tmp_path, source, **options))
    assert line["loss"] > 0
    assert line["grad_norm"] > 0


def test_without_its_file_it_is_unknown(tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "phi3", family="phi3")
    with pytest.raises(UserError, match=r"model_type = 'phi3': .* use one of"):
        read_architecture(source)
