"""Load exported folders as a user of transformers does, without this repository.

Arguments: input_ids as JSON, a folder for the results, exported folders. Writes logits and what
was generated as results.safetensors, and everything that was warned of as warnings.json.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    pipeline,
)

REMOTE = {"trust_remote_code": True}
NUM_MASKED = 6
TEXTS = ["abcdefgh", "ij", "klmno"]


def load_and_run(folder: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, a response and the head, loaded by the classes that the folder's format names.

    The input ends in MASK, which is what a diffusion model predicts; what is before is the prompt.
    """
    stated = json.loads((folder / "config.json").read_text())
    masked = "AutoModelForMaskedLM" in stated.get("auto_map", {})
    model_class = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(folder, **REMOTE)
    assert config.model_type == stated["model_type"]
    tokenizer = AutoTokenizer.from_pretrained(folder, **REMOTE)
    assert tokenizer.eos_token_id is not None
    special = tokenizer.convert_tokens_to_ids("x27")
    assert tokenizer.decode([special, tokenizer.eos_token_id], skip_special_tokens=True) == ""
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **REMOTE)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    model.eval()
    with torch.no_grad():
        logits = model(tokens).logits[0]
    prompt = tokens[:, :-NUM_MASKED]
    response = model.generate(prompt, max_new_tokens=NUM_MASKED)[0, prompt.shape[1] :]
    if "auto_map" in stated:
        assert tokenizer.mask_token_id == model.config.mask_token_id
        assert not (response == model.config.mask_token_id).any()
        model.save_pretrained(folder / "again")
        again = model_class.from_pretrained(folder / "again", **REMOTE)
        for name in (
            "block_size",
            "shifted",
            "attention_pattern",
            "context_attention",
            "rope_theta",
        ):
            assert getattr(again.config, name) == getattr(model.config, name)
        generated = again.generate(prompt, max_new_tokens=NUM_MASKED)
        assert torch.equal(generated[0, prompt.shape[1] :], response)
    head = model.get_output_embeddings().weight.detach().clone()
    return {"logits": logits, "response": response, "head": head}


def check_pipeline(folder: Path) -> None:
    """A pipeline answers texts, in a batch, and a chat as `generate` answers each of them."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    tokenizer = AutoTokenizer.from_pretrained(folder, **REMOTE)
    tokenizer.chat_template = "{{ messages[0].content }}"
    model: str | torch.nn.Module = str(folder)
    if "AutoModelForCausalLM" not in auto_map:
        model = AutoModelForMaskedLM.from_pretrained(folder, **REMOTE)
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer, **REMOTE)
    settings = {"max_new_tokens": NUM_MASKED, "do_sample": False}
    expected = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        response = answer.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(response, skip_special_tokens=True))
    answers = answer(TEXTS, batch_size=len(TEXTS), return_full_text=False, **settings)
    # transformers 4 leaves the space between prompt and response.
    assert [found[0]["generated_text"].strip() for found in answers] == expected
    (found,) = answer([{"role": "user", "content": TEXTS[0]}], **settings)
    assert found["generated_text"][-1]["content"].strip() == expected[0]


def main() -> None:
    """Load every folder and write the results."""
    assert "megatron_dlm" not in sys.modules
    torch.set_num_threads(1)
    messages: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    transformers.utils.logging.get_logger("transformers").addHandler(Recorder(logging.WARNING))
    tokens, out = torch.tensor([json.loads(sys.argv[1])]), Path(sys.argv[2])
    results: dict[str, torch.Tensor] = {}
    warned: dict[str, list[str]] = {}
    for folder in map(Path, sys.argv[3:]):
        messages.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = load_and_run(folder, tokens)
        results |= {f"{folder.name}/{key}": value for key, value in found.items()}
        warned[folder.name] = messages + [str(warning.message) for warning in caught]
        # It warns of every model that transformers does not bring itself.
        if folder.name.endswith(".untied") and not folder.name.startswith("autoregressive"):
            check_pipeline(folder)
    save_file(results, out / "results.safetensors")
    (out / "warnings.json").write_text(json.dumps(warned))
    (out / "version").write_text(transformers.__version__)


main()
