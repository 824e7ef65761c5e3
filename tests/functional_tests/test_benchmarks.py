"""`evaluate` of a model whose every response is known, so the right score is too."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.data.tokenizer_builder import build_tokenizer
from megatron_dlm.evaluation import generation
from megatron_dlm.types.trajectory import Prompt, Trajectory
from tests.functional_tests.entry_points import EVALUATE, Call, lines
from tests.tiny import save_random_model

RESPONSES = {
    0: (r"\boxed{1}", r"\boxed{2}", "I do not know", r"\boxed{3}"),
    1: (r"\boxed{1}", r"\boxed{2}", r"\boxed{3}", r"\boxed{4}"),
}
"""By seed."""


class ScriptedEngine:
    """Answers as the script says, in two forwards."""

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        self._seed = options["seed"]
        self._tokenizer = build_tokenizer()

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_response_length: int,
        on_finished: Callable[[Trajectory], None],
    ) -> list[Trajectory]:
        answered = []
        for prompt in prompts:
            text = RESPONSES[self._seed][prompt.sample_index] + "<|im_end|>"
            ids = torch.tensor(self._tokenizer(text)["input_ids"])
            trajectory = Trajectory(
                sample_index=prompt.sample_index,
                prompt_ids=prompt.token_ids,
                response_ids=ids,
                unmask_step=torch.ones_like(ids),
                finish_reason="eos",
                denoising_forwards=2,
                total_forwards=4,
                record=prompt.record,
            )
            on_finished(trajectory)
            answered.append(trajectory)
        return answered


def test_the_score_of_a_script(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "RolloutEngine", ScriptedEngine)
    data, output, plot = (tmp_path / name for name in ("test.jsonl", "out.json", "out.png"))
    data.write_text(
        "".join(
            json.dumps({"question": f"{n}?", "answer": f"It is {n}.\n#### {n}"}) + "\n"
            for n in (1, 2, 3, 4)
        )
    )
    arguments = (
        *("--load", save_random_model(tmp_path / "model"), "--block-size", 4, "--device", "cpu"),
        *("--task", "gsm8k", "--data", data, "--output", output, "--plot", plot),
        *("--settings", "dynamic:0.9,static", "--num-seeds", 2, "--seed", 0),
    )
    outcome = call(EVALUATE, *arguments)
    outcome.check_error("--num-seeds = 2: dynamic_0.9 draws nothing at --temperature 0")
    outcome = call(EVALUATE, *arguments, "--temperature", 1)
    assert outcome.status == 0, outcome.stderr
    assert "75.0% ± 35.4%" in outcome.stdout
    results = json.loads(output.read_text())["settings"]
    assert list(results) == ["dynamic_0.9", "static"]
    tokenizer = build_tokenizer()
    tokens = [
        sum(len(tokenizer(text + "<|im_end|>")["input_ids"]) for text in texts)
        for texts in RESPONSES.values()
    ]
    for result in results.values():
        assert result["accuracy"] == pytest.approx(0.75)
        assert result["accuracy_std"] == pytest.approx(0.125**0.5)
        assert [result["correct"], result["total"]] == [6, 8]
        assert [entry["accuracy"] for entry in result["seeds"].values()] == [0.5, 1.0]
        assert result["tokens_per_forward"] == pytest.approx(sum(tokens) / 16)
        assert result["eos_rate"] == 1
    kept = lines(tmp_path / "out.responses.jsonl")
    assert len(kept) == 16
    assert [line["text"] for line in kept] == [t for texts in RESPONSES.values() for t in texts] * 2
    assert [line["reward"] for line in kept[:4]] == [1.0, 1.0, 0.0, 0.0]
    assert kept[4]["record"]["answer"] == "1"
    assert [kept[4][name] for name in ("setting", "seed", "sample_index")] == ["dynamic_0.9", 1, 0]
    assert plot.read_bytes().startswith(b"\x89PNG")
