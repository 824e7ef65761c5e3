"""Our model in lm-evaluation-harness, against the harness's own model of transformers."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

import megatron_dlm
from megatron_dlm.commands import main
from megatron_dlm.data.arithmetic import write_examples
from megatron_dlm.errors import UserError
from megatron_dlm.evaluation.harness import HarnessModel
from tests.distributed_tests.spawn import run_distributed
from tests.faults.jobs import free_port
from tests.functional_tests.entry_points import Outcome, command_on_rank
from tests.tiny import TOKENIZER

CHAT = [{"role": "user", "content": "What is 2 + 3?"}]
TASKS = ("tiny_choice", "tiny_generate", "tiny_perplexity")
NUM_DOCS = 5


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small tasks, one of each kind that the harness has."""
    folder = tmp_path_factory.mktemp("tasks")
    write_examples(folder / "examples.jsonl", "heldout", 3, NUM_DOCS)
    docs = []
    for line in (folder / "examples.jsonl").read_text().splitlines():
        example = json.loads(line)
        number = int(example["answer"])
        docs.append(
            {
                "question": example["messages"][0]["content"],
                "choices": [f"#### {number}", f"#### {number + 1}"],
                "right": number,
            }
        )
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }
    kinds: dict[str, dict[str, Any]] = {
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "tiny_generate": {
            "output_type": "generate_until",
            "doc_to_target": "{{right}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 40},
            "metric_list": [{"metric": "exact_match"}],
            "filter_list": [
                {
                    "name": "number",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"#### (-?\d+)"},
                        {"function": "take_first"},
                    ],
                }
            ],
        },
        "tiny_perplexity": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **kind, "task": name}))
    return folder


def evaluate(tasks: Path, model: Any, **options: Any) -> dict[str, Any]:
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=True,
        **options,
    )
    return results


def responses(results: dict[str, Any], task: str) -> list[Any]:
    """What the model said to each request of each document."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for [response] in sample["resps"]]


@contextmanager
def megatron_dlm_model(**arguments: Any) -> Iterator[HarnessModel]:
    with torch.random.fork_rng():
        model = HarnessModel(**arguments)
        yield model
        model.close()


def test_autoregressive_model_is_that_of_the_harness(tasks: Path) -> None:
    arguments = {"pretrained": str(TOKENIZER), "dtype": "float32"}
    reference = evaluate(tasks, "hf", model_args=arguments, device="cpu", batch_size=4)
    with megatron_dlm_model(load=str(TOKENIZER)) as model:
        found = evaluate(tasks, model)
        context = model.tok_encode(model.apply_chat_template(CHAT))
        written = AutoModelForCausalLM.from_pretrained(TOKENIZER).generate(
            torch.tensor([context]), do_sample=False, max_new_tokens=5
        )
        likely = written[0, len(context) :].tolist()
        continuations = [likely, [*likely[:-1], likely[-1] + 1]]
        scored = model._loglikelihood_tokens([("", context, tokens) for tokens in continuations])
        assert [greedy for _, greedy in scored] == [True, False]
    assert responses(found, "tiny_generate") == responses(reference, "tiny_generate")
    assert found["results"]["tiny_generate"]["exact_match,number"] >= 0.8
    ours, theirs = (responses(results, "tiny_choice") for results in (found, reference))
    assert [value for value, _ in ours] == pytest.approx([v for v, _ in theirs], rel=1e-4)
    assert [bool(greedy) for _, greedy in ours] == [bool(greedy) for _, greedy in theirs]
    ours, theirs = (responses(results, "tiny_perplexity") for results in (found, reference))
    assert ours == pytest.approx(theirs, rel=1e-4)


def _command_without_other_tasks(rank: int, port: int, command: list[str]) -> Outcome:
    """Run a command on a rank; reading the thousands of tasks of the harness would take long."""
    of_folder = functools.partial(TaskManager, include_defaults=False)
    with mock.patch.object(lm_eval.tasks, "TaskManager", of_folder):
        return command_on_rank(rank, 2, port, command)


def test_diffusion_model_generates_and_bounds(tasks: Path, tmp_path: Path) -> None:
    folder = megatron_dlm.convert(TOKENIZER, tmp_path / "hf", format="sdar", block_size=4)
    with megatron_dlm_model(
        load=str(folder), setting="dynamic:0.2", max_response_length=40
    ) as model:
        found = evaluate(tasks, model)
        pairs = [model._encode_pair("What is 2 + 3?", f" #### {n}") for n in (5, 6)]
        bounds = [value for value, _ in model._loglikelihood_tokens([("", *p) for p in pairs])]
    docs = [json.loads(line) for line in (tasks / "docs.jsonl").read_text().splitlines()]
    with megatron_dlm.load(folder, device="cpu") as loaded:
        texts = [
            response.text
            for response in megatron_dlm.generate(
                loaded,
                [doc["question"] for doc in docs],
                setting="dynamic:0.2",
                max_response_length=40,
            )
        ]
    assert responses(found, "tiny_generate") == [text.split("\n\n")[0] for text in texts]
    assert all(value < 0 for value in bounds)
    # Two processes give what one does.
    out = tmp_path / "results"
    command = [
        *("lm-eval", "--model_args", f"load={folder},setting=dynamic:0.2,max_response_length=40"),
        *("--tasks", ",".join(TASKS[:2]), "--include_path", str(tasks)),
        *("--output_path", str(out), "--apply_chat_template", "--log_samples"),
    ]
    outcomes = run_distributed(_command_without_other_tasks, 2, free_port(), command)
    for outcome in outcomes:
        assert outcome.status == 0, outcome.stderr
    shown = [task for task in TASKS if any(task in outcome.stdout for outcome in outcomes)]
    assert shown == list(TASKS[:2])
    [file] = out.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    for task in TASKS[:2]:
        numbers = {
            k: v for k, v in results[task].items() if isinstance(v, float) and "stderr" not in k
        }
        assert numbers
        assert numbers == pytest.approx({k: found["results"][task][k] for k in numbers}, rel=1e-4)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    for arguments, words in (
        ({"load": str(tmp_path / "none")}, "there is no such folder"),
        ({"load": str(TOKENIZER), "temperatur": 1}, "--model_args"),
        ({"load": str(TOKENIZER), "setting": "static"}, "needs a block size"),
        ({"load": str(TOKENIZER), "orders": 0}, "is not positive"),
    ):
        with pytest.raises(UserError, match=words):
            HarnessModel(**arguments)


def test_draws_do_not_depend_on_other_requests() -> None:
    """Of other tasks, or of those that a cache answered."""
    options = {"setting": "autoregressive", "max_response_length": 6, "orders": 2}
    sampled = {"temperature": 1.0, "until": [], "max_gen_toks": 6}

    def request(text: str) -> Instance:
        return Instance("generate_until", {}, (text, sampled), 0)

    with megatron_dlm_model(load=str(TOKENIZER), **options) as model:
        several = model.generate_until([request(text) for text in ("Tom", "Lily", "Tom")])
        alone = model.generate_until([request("Tom"), request("Tom")])
    assert alone == [several[0], several[2]]
    assert alone[0] != alone[1]


def test_only_the_first_rank_writes(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[Any] = []

    def stop(**options: Any) -> None:
        read.append(options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", stop)
    of_folder = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", of_folder)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "out"
    command = ["lm-eval", "--model_args", f"load={TOKENIZER}", "--tasks", TASKS[0]]
    command += ["--include_path", str(tasks), "--predict_only", "--output", str(out)]
    assert main(command) == 0
    assert read[0]["evaluation_tracker"].output_path is None
    assert read[0]["log_samples"] is False
    assert capsys.readouterr().out == ""
    assert EvaluatorConfig.from_cli.__func__ is EvaluatorConfig.__dict__["from_cli"].__func__
