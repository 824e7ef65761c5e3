"""What plans say of published runs and of a run of this machine, and the command."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.real_shapes import SHAPES
from megatron_dlm.commands import main
from megatron_dlm.config import Config, parse_config, validate
from megatron_dlm.models.architecture import architecture_from_hf
from megatron_dlm.planning.activations import layer_bytes
from megatron_dlm.planning.gpus import GPUS
from megatron_dlm.planning.layouts import Layout, accepted
from megatron_dlm.planning.memory import FP32, MemoryModel, teacher_rank_bytes
from megatron_dlm.planning.notice import memory_notice
from megatron_dlm.planning.plan import Planner
from megatron_dlm.planning.workload import Lengths, mean_lengths
from tests.refusal import refusal

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
RECIPE = str(EXAMPLES / "qwen3_30b_a3b" / "opdlm.yaml")


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Writes the config.json of a shape."""
    folder = tmp_path_factory.mktemp("shapes")

    def written(name: str) -> str:
        file = folder / f"{name}.json"
        file.write_text(json.dumps(SHAPES[name]))
        return str(file)

    return written


@pytest.mark.parametrize(
    ("micro_batch", "recomputed", "measured"),
    [
        (8, ("layernorm", "moe_act"), 173.3),  # DeepEP
        (8, ("layernorm", "moe_act"), 170.2),  # all-to-all
        (16, "every layer", 109.7),  # DeepEP
        (16, "every layer", 104.6),  # all-to-all
    ],
)
def test_memory_is_that_of_rnd1s_table_4_2(
    micro_batch: int, recomputed: Any, measured: float
) -> None:
    """Qwen3-30B-A3B on 8 B200, EP 8, windows of 2,048 tokens, without a teacher.

    The table calls recomputation "Selective" (section 4.4: norms and activations of experts) and
    "None"; what it measures under "None", with twice the tokens, is less than these tokens keep
    with anything but full recomputation. Megatron's head, other than ours, has whole logits in bf16
    and a float32 copy: there is the most memory, before any layer goes backward.
    """
    architecture = architecture_from_hf(SHAPES["qwen3_30b_a3b"])
    options = {"expert_model_parallel_size": 8, "use_distributed_optimizer": True, "bf16": True}
    config = Config().changed(
        objective="scp",
        data_path="corpus",
        seq_length=2048,
        micro_batch_size=micro_batch,
        global_batch_size=2048,
        recompute_granularity="full" if recomputed == "every layer" else "none",
        **options,
    )
    layout = Layout.of(config, 8)
    model = MemoryModel(config, architecture, None, Lengths(1, 1, 1.0))
    update = model.of(config, layout, GPUS["b200"]).phases["update"]
    tokens = micro_batch * 2048
    if recomputed == "every layer":
        kept = layer_bytes(architecture, layout, 2).inputs
    else:
        kept = layer_bytes(architecture, layout, 2, recomputed=recomputed).kept
    update["activations"] = tokens * architecture.num_layers * kept
    update["loss"] = tokens * architecture.vocab_size * (2 + FP32)
    assert sum(update.values()) / 1e9 == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("name", "layout", "weights", "gradients", "optimizer"),
    [
        # Student and teacher in bf16, float32 gradients, Adam: GB of a rank.
        ("qwen3_8b", Layout(2, 1, 1, 1, 2, 8), 16.4, 16.4, 12.3),
        ("qwen3_8b", Layout(1, 1, 1, 1, 1, 8), 32.8, 32.8, 12.3),
        ("qwen3_30b_a3b", Layout(1, 1, 1, 8, 1, 8), 20.7, 20.7, 45.8),
        ("qwen3_30b_a3b", Layout(1, 2, 1, 8, 1, 16), 10.3, 10.3, 22.9),
    ],
)
def test_what_stays_is_what_the_formulas_of_the_parts_give(
    name: str, layout: Layout, weights: float, gradients: float, optimizer: float
) -> None:
    config = Config().changed(
        bf16=True, use_distributed_optimizer=True, **layout.options(is_moe="30b" in name)
    )
    architecture = architecture_from_hf(SHAPES[name])
    model = MemoryModel(config, architecture, architecture, Lengths(100, 100, 1.0))
    parts = model.of_stage(config, layout, GPUS["b200"], 0).phases["optimizer step"]
    assert (parts["weights"] + parts["teacher"]) / 1e9 == pytest.approx(weights, abs=0.06)
    assert parts["gradients"] / 1e9 == pytest.approx(gradients, abs=0.06)
    assert parts["optimizer"] / 1e9 == pytest.approx(optimizer, abs=0.06)


def test_memory_is_what_a_run_on_a_cpu_holds() -> None:
    """An update on real tensors, in float32, on one process."""
    from benchmarks.iteration import PROMPT, iteration
    from megatron_dlm.accounting.live_memory import LiveMemory

    shape = {**SHAPES["tiny"], "hidden_size": 256, "intermediate_size": 768, "head_dim": 32}
    shape |= {"num_hidden_layers": 4, "vocab_size": 8192, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4}
    response = 96
    with LiveMemory(on_host=True) as memory, iteration(shape, device="cpu") as built:
        rows = built.rows([PROMPT + 2 * response])
        built.update(rows)  # makes the optimizer's state
        memory.begin()
        built.update(rows)
        most = memory.most
        assert memory.now > 4 * 4 * sum(p.numel() for p in built.student.model.parameters())
        config = built.config.changed(max_response_length=response, global_batch_size=1)
    assert torch.get_default_dtype() == torch.float32
    architecture = architecture_from_hf(shape)
    model = MemoryModel(config, architecture, architecture, Lengths(PROMPT, response, 1.0))
    planned = model.of(config, Layout.of(config, 1), GPUS["h100"])
    phases = {name: dict(planned.phases[name]) for name in ("update", "optimizer step")}
    for parts in phases.values():
        parts["reserve"] = parts["targets"] = 0
        parts["teacher"] = FP32 * architecture.vocab_size * architecture.hidden_size  # its head
    assert max(sum(parts.values()) for parts in phases.values()) == pytest.approx(most, rel=0.1)


ON_A_GPU = """
import torch
from benchmarks.iteration import PROMPT, iteration
from tests.unit_tests.planning.test_plan import GPU_OPTIONS, GPU_RESPONSE, GPU_SHAPE
with iteration(GPU_SHAPE, device="cuda", **GPU_OPTIONS) as built:
    rows = built.rows([PROMPT + 2 * GPU_RESPONSE])
    built.update(rows)
    torch.cuda.reset_peak_memory_stats()
    built.update(rows)
    print(torch.cuda.max_memory_allocated())
"""
GPU_SHAPE = {**SHAPES["qwen3_0.6b"], "num_hidden_layers": 8}
GPU_OPTIONS: dict[str, Any] = {"bf16": True, "use_distributed_optimizer": True}
GPU_RESPONSE = 4_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_memory_is_what_a_gpu_has_allocated() -> None:
    command = [sys.executable, "-c", ON_A_GPU]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    config = Config().changed(
        objective="opdlm_off", max_response_length=GPU_RESPONSE, device="cuda", **GPU_OPTIONS
    )
    architecture = architecture_from_hf(GPU_SHAPE)
    model = MemoryModel(config, architecture, architecture, Lengths(64, GPU_RESPONSE, 1.0))
    parts = model.of(config, Layout.of(config, 1), GPUS["h200"]).phases["update"]
    parts["teacher"] = 2 * architecture.vocab_size * architecture.hidden_size  # its head
    parts["reserve"] = parts["targets"] = 0
    assert sum(parts.values()) == pytest.approx(int(done.stdout), rel=0.1)


def test_layouts_are_those_that_training_accepts() -> None:
    config, architecture = (
        parse_config(["--config", RECIPE]),
        architecture_from_hf(SHAPES["qwen3_30b_a3b"]),
    )
    found = accepted(config, 16, architecture, architecture)
    assert len({layout for layout, _ in found}) == len(found) > 10
    for layout, changed in found:
        assert refusal(validate, changed, 16) is None
        assert Layout.of(changed, 16) == layout
        assert layout.replicas * layout.tensor * layout.pipeline * layout.context == 16
        assert 8 % layout.replicas == 0  # of the batch of 8


def planner(gpu: str, recipe: str = RECIPE) -> Planner:
    config = parse_config(["--config", recipe])
    architecture = architecture_from_hf(SHAPES["qwen3_30b_a3b"])
    return Planner(config, architecture, architecture, GPUS[gpu], mean_lengths(config))


def test_30b_on_8_gpus_of_80_gb_lacks_memory_at_the_first_step() -> None:
    config, model = planner("h100").config, planner("h100").student
    peaks, *warnings = memory_notice(config, model, model, 8)
    assert "optimizer step 9" in peaks
    assert {line.split()[1] for line in warnings} == {"a100-40gb", "a100", "h100"}
    assert "runs out of memory in the first optimizer step, after a whole rollout" in warnings[-1]
    if not torch.cuda.is_available():  # said where a run for GPUs is prepared, of those that lack
        anywhere = config.changed(device="auto")
        assert memory_notice(anywhere, model, model, 8) == [peaks, *warnings]
        small = architecture_from_hf(SHAPES["tiny"])
        assert memory_notice(anywhere.changed(expert_model_parallel_size=1), small, small, 8) == []
    assert planner("b200").stated(8).fits


def test_more_of_anything_is_no_more_memory_a_gpu_and_no_less_time() -> None:
    plans = planner("b200").all(8)
    assert [plan.fits for plan in plans] == sorted((plan.fits for plan in plans), reverse=True)
    fitting = [plan.seconds.per_sample for plan in plans if plan.fits]
    assert fitting == sorted(fitting)
    slow = replace(GPUS["b200"], tflops=100, memory_gb_s=1000, launch_us=40)
    slower = replace(planner("b200"), gpu=slow).all(8)
    assert slower[0].seconds.per_sample > 3 * plans[0].seconds.per_sample
    more = planner("b200").stated(8).memory.most
    offloaded = replace(
        planner("b200"), config=planner("b200").config.changed(offload_teacher=True)
    )
    assert offloaded.stated(8).memory.most < more


def test_a_teacher_elsewhere_takes_no_memory_of_the_students_gpus() -> None:
    beside, model = planner("h100"), planner("h100").student
    options = dict(teacher_ranks=4, divergence_top_k=16, teacher_expert_model_parallel_size=4)
    apart = replace(beside, config=beside.config.changed(**options))
    memory, other = apart.stated(8).memory, beside.stated(8).memory
    assert set(other.phases) - set(memory.phases) == {"teacher"}
    for phase, parts in memory.phases.items():
        gone = other.phases[phase]["teacher"] + other.phases[phase].get("targets", 0)
        assert not parts.get("teacher")
        assert other.peak(phase) - memory.peak(phase) >= gone > 1e9
    assert apart.all(8)[0].config.teacher.teacher_ranks == 4
    assert refusal(validate, apart.all(8)[0].config, 12) is None

    whole = replace(apart, config=apart.config.changed(divergence_top_k=0)).stated(8).memory
    head = 2 * 151936 * 2048  # which goes with hidden states
    assert whole.phases["rollout"]["teacher"] == pytest.approx(head, rel=0.01)

    # 30.5 B parameters, 1.5 B of them outside of experts, which 4 ranks share.
    def weights(**changes: Any) -> float:
        lengths = Lengths(1024, 4096, 2)
        config = apart.config.changed(**changes)
        return teacher_rank_bytes(config, model, lengths)["weights"]

    assert weights() == pytest.approx(2 * (1.54e9 + 28.99e9 / 4), rel=0.02)
    embeddings = 4 * 151936 * 2048  # bytes of input and output, which stay in bf16
    half = (weights() - embeddings) / 2 + embeddings
    assert weights(teacher_precision="fp8") == pytest.approx(half, rel=0.01)
    lines = memory_notice(apart.config, model, model, 8)
    assert any(line.startswith("GB of a GPU of --teacher-ranks 4, planned: we") for line in lines)
    alone = apart.config.changed(teacher_ranks=1, teacher_expert_model_parallel_size=1)
    warnings = [line for line in memory_notice(alone, model, model, 8) if "the teacher" in line]
    assert "try --teacher-precision fp8" in warnings[0]
    assert "with 40 GB" in warnings[0]


def test_a_larger_batch_has_rates_by_its_square_root() -> None:
    plans = planner("b200").all(64, larger_batch=True)
    config = next(plan.config for plan in plans if plan.layout.replicas == 64)
    assert config.training.global_batch_size == 64
    assert config.optimizer.lr_batch_size == 8
    assert config.lr_scale == pytest.approx(8**0.5)
    assert refusal(validate, config, 64) is None


def test_the_command_writes_a_configuration_that_training_takes(
    shape: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, output = str(EXAMPLES / "qwen3_0.6b" / "opdlm.yaml"), tmp_path / "chosen.yaml"
    command = f"plan --config {recipe} --gpus 4 --gpu h100 --student-config {shape('qwen3_0.6b')}"
    assert main([*command.split(), "--output", str(output)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 100
    assert shown[1].startswith("layout")
    assert sum(line.startswith("weights") for line in shown) == 1
    config = parse_config(["--config", str(output)])
    assert refusal(validate, config, 4) is None
    assert yaml.safe_load(output.read_text())["objective"] == "opdlm"


def test_the_command_says_what_is_nearest_where_nothing_fits(
    shape: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"plan --config {RECIPE} --gpus 8 --gpu h100 --rows 2".split()
    command += ["--student-config", shape("qwen3_30b_a3b"), "--json"]
    assert main(command) == 2
    shown = capsys.readouterr()
    plans = [json.loads(line) for line in shown.out.splitlines()]
    assert not any(plan["fits"] for plan in plans)
    nearest = plans[0]
    lacking = f"{-nearest['room_bytes'] / 1e9:.1f} GB too much"
    assert nearest["fullest_phase"] in shown.err
    assert lacking in shown.err
    assert nearest["peak_bytes"] - 80e9 == pytest.approx(-nearest["room_bytes"], abs=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--gpu h100", ("--gpus", "is missing", "add --gpus")),
        ("--gpus 8", ("--gpu", "is missing", "add --gpu")),
        ("--gpus 8 --gpu h1000", ("--gpu", "h1000", "choose a100-40gb")),
        ("--gpus 0 --gpu h100", ("--gpus", "0")),
        ("--gpus 7 --gpu h100", ("--gpus = 7", "choose 6 or 8")),
        ("--gpus 13 --gpu h100", ("--gpus = 13", "choose 12 or 16", "--larger-batch")),
        ("--gpus 8 --gpu h100 --rates RATES", ("is no rate", "choose memory_gb")),
        ("--gpus 8 --gpu h100 --rates SHARE", ("dense_share", "1.5", "at most 1")),
        ("--gpus 8 --gpu h100 --rates ENDLESS", ("tflops", "inf", "at most 1e+09")),
        ("--gpus 8 --gpu h100 --teacher-config none.json", ("--teacher-config", "none.json")),
    ],
)
def test_bad_input_names_field_value_and_remedy(
    shape: Callable[[str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    words: tuple[str, ...],
) -> None:
    files = {"RATES": '"speed": 3', "SHARE": '"dense_share": 1.5', "ENDLESS": '"tflops": 1e999'}
    for name, content in files.items():
        (tmp_path / name).write_text(f"{{{content}}}")
        arguments = arguments.replace(name, str(tmp_path / name))
    command = f"plan --config {RECIPE} --student-config {shape('qwen3_30b_a3b')} {arguments}"
    assert main(command.split()) == 2
    shown = capsys.readouterr().err.strip()
    assert "\n" not in shown
    for word in words:
        assert word in shown


def test_measured_rates_take_the_place_of_published_ones(tmp_path: Path) -> None:
    from megatron_dlm.planning.gpus import find_gpu

    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"tflops": 700, "dense_share": 1}))
    gpu = find_gpu("h100", str(rates))
    assert gpu == replace(GPUS["h100"], tflops=700, dense_share=1)
    assert gpu.flops(is_moe=False) == 7e14


def test_a_rank_keeps_its_part_of_shared_sequences() -> None:
    """As many whole sequences for each rank, or as many times shared ones, take the same memory."""
    architecture = architecture_from_hf(SHAPES["qwen3_8b"])
    recipe = parse_config(["--config", str(EXAMPLES / "qwen3_8b" / "opdlm_math_thinking_32k.yaml")])
    gpu, context = GPUS["h200"], recipe.parallel.context_parallel_size
    assert context == 4
    plans = {
        shared: Planner(
            recipe.changed(rollout_context_parallel=shared, max_running_requests=at_once),
            architecture,
            architecture,
            gpu,
            mean_lengths(recipe),
        ).stated(8)
        for shared, at_once in (("sequences", 8), ("tokens", 8 * context))
    }
    whole, own = plans["sequences"].memory, plans["tokens"].memory
    assert own.sequences == context * whole.sequences == 32
    cache = own.phases["rollout"]["KV cache"]
    assert cache == pytest.approx(whole.phases["rollout"]["KV cache"], rel=0.01)
    assert plans["tokens"].seconds.rollout > plans["sequences"].seconds.rollout
