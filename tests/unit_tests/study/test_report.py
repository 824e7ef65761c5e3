"""The report shows the numbers of results.json, whatever they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study.cells import all_cells, write_result
from benchmarks.study.claims import RISING, SOLVING, Claim, papers_claims, plateau_claims
from benchmarks.study.findings import findings, plateau_left
from benchmarks.study.recipes import BLOCK_SIZES, SETTINGS, Sizes
from benchmarks.study.report import collect, write_report
from megatron_dlm.errors import UserError

SIZES = Sizes(seeds=3, rollouts=2, best_rollouts=3, heldout=4)
ACCURACY = {
    "sft": 0.80,
    "off_policy": 0.70,
    "opdlm_off": 0.88,
    "opdlm": 0.90,
    "opdlm_global": 0.6,
    "blocks_8_after_4": 0.97,
}
AUTOREGRESSIVE = {"teacher": 0.98, "qwen3_64": 0.5, "qwen3_96": 0.75}
JITTER = (-0.005, 0.0, 0.005)
READINGS = {
    "decoded by diffusion": ("seen", "static"),
    "read out autoregressively": ("seen_autoregressive", "autoregressive"),
}
"""How the claims on forgetting call a reading, and what it makes of what the corpus has."""


def measured(recipe: str, seed: int) -> dict[str, Any]:
    """Made-up results; every seed differs a little, and lower thresholds are worse and faster."""
    base = ACCURACY.get(recipe, 0.95) + JITTER[seed - 1]
    blocks = {
        f"block_{size}": {
            setting: {
                "accuracy": base - 0.02 * place * (3 if recipe == "sft" else 1) - 0.005 * size,
                "tokens_per_forward": 1 + place * size / 10,
            }
            for place, setting in enumerate(SETTINGS)
        }
        for size in BLOCK_SIZES
    }
    if recipe in AUTOREGRESSIVE:
        right = {"autoregressive": {"accuracy": AUTOREGRESSIVE[recipe]}}
        kinds = ("", "seen_", "unseen_") if recipe == "teacher" else ("",)
        return {"evaluations": {f"{kind}autoregressive": right for kind in kinds}}
    curve = {"step": [1, 2, 3, 4], "tokens_per_forward": [1.0, 2.0, 2.5, 2.6]}
    if recipe != "sft":
        curve |= {"loss": [3.0, 1.4, 1.3, 1.0] if seed < 3 else [3.0, 1.0, 1.6, 1.7]}
    if recipe.startswith("scp"):
        unseen = 1.5 if recipe == "scp_rnd1_groups" else 2.5
        curve |= {"loss": [3.0, 2.0, 1.0, 1.0 + 10 * JITTER[seed - 1]]}
        curve |= {
            "validation_step": [2, 3, 4],
            "validation_loss": [3.0, 1.0, unseen + 10 * JITTER[seed - 1]],
        }
    training = {"updates": 32, "response_tokens": 100, "seconds": 9.0, "curves": curve}
    if recipe != "sft":  # as a cell of an earlier version
        training |= {"trained_tokens": 128, "flops": 3_200_000_000}
    evaluations = forgetting(recipe, seed) if recipe.startswith("scp") else blocks
    return {"evaluations": evaluations, "training": training}


def forgetting(recipe: str, seed: int) -> dict[str, Any]:
    """Accuracies after pretraining: what the corpus has is solved, what it lacks half forgotten."""
    unseen = {"scp_rnd1_groups": 0.6, "scp_annealed_all": 0.8}.get(recipe, 0.4)
    return {
        f"{kind}{suffix}": {setting: {"accuracy": reached + JITTER[seed - 1]}}
        for kind, reached in (("seen", 0.9), ("unseen", unseen))
        for suffix, setting in (("", "static"), ("_autoregressive", "autoregressive"))
    }


def write_study(folder: Path, output: Path, sizes: Sizes = SIZES, without: str = "") -> None:
    common = {
        "machine": {"cpu": "Abacus", "cores": 7},
        "commit": "abc1234",
        "date": "2026-01-02",
        "seconds": 10.0,
    }
    cells = all_cells(sizes)
    for cell in cells:
        if cell.name != without:
            results = {**common, **measured(cell.recipe.name, cell.seed)}
            write_result(folder, cell, cell.specification(), results)
    collect(cells, folder, output, sizes)


@pytest.fixture
def results() -> list[dict[str, Any]]:
    return [
        {"recipe": cell.recipe.name, "seed": cell.seed, **measured(cell.recipe.name, cell.seed)}
        for cell in all_cells(SIZES)
    ]


def find(claims: list[Claim], *fragments: str) -> Claim:
    [claim] = [claim for claim in claims if all(part in claim.statement for part in fragments)]
    return claim


def test_verdicts_follow_the_numbers(results: list[dict[str, Any]]) -> None:
    claims = papers_claims(results)
    on_policy = find(claims, "OPDLM is more accurate than off-policy (static)")
    assert on_policy.verdict == "supported"
    assert on_policy.measured == "88.00 ± 0.50 against 68.00 ± 0.50: +20.00, std 0.50"
    assert find(claims, "visited (per block)").verdict == "supported"
    assert find(claims, "visited (global)").verdict == "not supported"
    assert find(claims, "SFT loses more points").verdict == "supported"
    assert find(claims, "close under static").verdict == "not supported"
    assert find(claims, "threshold 0.7 decodes more").verdict == "supported"
    assert find(claims, "rise more in the first half").verdict == "supported"
    forgotten = find(claims, "forgets less", "diffusion loss")
    assert forgotten.measured == "1.50 ± 0.05 against 0.50 ± 0.05: +1.00, std 0.05"
    assert forgotten.verdict == "supported"
    for reading in READINGS:
        unsolved = find(claims, "forgets less", reading)
        assert unsolved.measured == "60.00 ± 0.50 against 40.00 ± 0.50: +20.00, std 0.50"
        assert unsolved.verdict == "supported"


def test_verdicts_turn_with_the_numbers(results: list[dict[str, Any]]) -> None:
    for result in results:
        swap = {"opdlm": "off_policy", "off_policy": "opdlm"}
        result["recipe"] = swap.get(result["recipe"], result["recipe"])
    claim = find(papers_claims(results), "OPDLM is more accurate than off-policy (static)")
    assert claim.verdict == "not supported"


def test_a_loss_that_falls_throughout_shows_no_forgetting(results: list[dict[str, Any]]) -> None:
    for result in results:
        if result["recipe"].startswith("scp"):
            end = 1.0 if result["recipe"] == "scp_one_lr" else 2.0
            result["training"]["curves"]["validation_loss"] = [3.0, 2.5, end]
    claim = find(papers_claims(results), "forgets less", "diffusion loss")
    reason = f"no run rises by {RISING:g}"
    assert claim.measured == f"0.00 ± 0.00 against 0.00 ± 0.00: +0.00, std 0.00; {reason}"
    assert claim.verdict == "not distinguishable"


@pytest.mark.parametrize(
    ("rises", "verdict"), [(0.8, "not distinguishable"), (1.2, "supported")], ids=["noise", "rise"]
)
def test_noise_in_a_loss_is_not_forgetting(
    results: list[dict[str, Any]], rises: float, verdict: str
) -> None:
    for result in results:
        if result["recipe"].startswith("scp"):
            end = 2.0 + (rises * RISING if result["recipe"] == "scp_one_lr" else 0.0)
            result["training"]["curves"]["validation_loss"] = [3.0, 2.0, end]
    assert find(papers_claims(results), "forgets less", "diffusion loss").verdict == verdict


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("recipe", ["scp_one_lr", "scp_rnd1_groups"])
def test_nothing_is_said_of_forgetting_where_nothing_is_solved(
    results: list[dict[str, Any]], recipe: str, reading: str
) -> None:
    evaluation, setting = READINGS[reading]
    solved = [
        result["evaluations"][evaluation][setting]
        for result in results
        if result["recipe"].startswith("scp")
    ]
    for each in solved:
        each["accuracy"] = SOLVING / 100 - 0.01
    claims = papers_claims(results)
    assert find(claims, "forgets less", reading).verdict == "not distinguishable"
    assert "no run solves 10 % of what the corpus has" in find(claims, reading).measured
    [other] = set(READINGS) - {reading}
    assert find(claims, "forgets less", other).verdict == "supported"
    one = next(result for result in results if result["recipe"] == recipe)
    one["evaluations"][evaluation][setting]["accuracy"] = SOLVING / 100
    assert find(papers_claims(results), "forgets less", reading).verdict == "supported"


def test_what_was_not_run_gets_no_verdict(results: list[dict[str, Any]]) -> None:
    claims = papers_claims([each for each in results if each["recipe"] != "off_policy"])
    claim = find(claims, "OPDLM is more accurate than off-policy (static)")
    assert (claim.measured, claim.verdict) == ("", None)


def test_distance_from_the_teacher(results: list[dict[str, Any]]) -> None:
    _, static, dynamic = plateau_claims(results)  # 92.5 and 90.5 of 98, see `measured`
    assert (static.verdict, dynamic.verdict) == ("not supported", "not supported")
    for result in results:
        if result["recipe"] == "teacher":
            result["evaluations"]["autoregressive"]["autoregressive"]["accuracy"] = 0.94
    _, static, dynamic = plateau_claims(results)
    assert (static.verdict, dynamic.verdict) == ("supported", "not supported")


@pytest.mark.parametrize(
    ("last", "verdict"), [(2.65, "supported"), (2.8, "not supported"), (2.4, "not supported")]
)
def test_plateau_of_the_long_run(results: list[dict[str, Any]], last: float, verdict: str) -> None:
    for result in results:
        if result["recipe"] == "best":
            curve = result["training"]["curves"]
            curve["tokens_per_forward"] = [1.0] * 8 + [2.6, last]
    assert plateau_claims(results)[0].verdict == verdict


@pytest.mark.slow
def test_report_is_written_from_the_raw_results_alone(tmp_path: Path) -> None:
    cells, output = tmp_path / "cells", tmp_path / "output"
    cells.mkdir()
    write_study(cells, output)
    for file in cells.iterdir():
        file.unlink()
    write_report(output)
    page, report = ((output / name).read_text() for name in ("report.md", "details.md"))
    assert "Incomplete" not in report
    assert "earlier version" not in report
    assert "†" not in page
    assert "Not measured" not in page
    assert len(page.splitlines()) < 70  # one page
    assert (
        "| OPDLM, states per block | 4 | 32 | 87.5 / 88.0 / 88.5 | 85.5 / 86.0 / 86.5 "
        "| 1.40 / 1.40 / 1.40 | 2 / 2 / never |" in page
    )
    assert "| AR model qwen3_64, not converted | - | - | 50.0 | - | - | - |" in page
    assert "| OPDLM, states per block | 3 | 88.0 ± 0.5 | 1.00 ± 0.00 | 86.0 ± 0.5 |" in report
    assert "- Abacus, 7 cores, no GPU used; " in page
    assert "abc1234" in page
    assert "| SCP, one learning rate | 1.00 ± 0.05 | 2.50 ± 0.05 |" in report
    assert "| response tokens | tokens trained on | training FLOPs | seconds |" in report
    assert "| 32 | 100 | 128 | 3.20e+09 | 9 |" in report
    assert "| - | - | 9 |" in report
    for line in (page + report).splitlines():
        if line.startswith("!["):
            assert (output / line.partition("(")[2].rstrip(")")).stat().st_size > 1000
    raw = json.loads((output / "results.json").read_text())
    assert len(raw["cells"]) == len(all_cells(SIZES))
    assert all("curves" in cell["training"] for cell in raw["cells"] if "training" in cell)


@pytest.mark.slow
def test_report_of_an_incomplete_study_says_so(tmp_path: Path) -> None:
    cells, output = tmp_path / "cells", tmp_path / "output"
    cells.mkdir()
    write_study(cells, output, without="sft-seed2")
    write_report(output)
    report = (output / "details.md").read_text()
    assert "Missing cells: sft seed 2." in report
    assert "| SFT on the teacher's responses | 2 |" in report


@pytest.mark.slow
def test_report_names_the_cells_of_an_earlier_version(tmp_path: Path) -> None:
    cells, output = tmp_path / "cells", tmp_path / "output"
    cells.mkdir()
    write_study(cells, output)
    study = json.loads((output / "results.json").read_text())
    for cell in study["cells"]:
        if (cell["recipe"], cell["seed"]) in (("sft", 2), ("opdlm", 3)):
            cell["specification"]["golden_losses"] = "another method"
    (output / "results.json").write_text(json.dumps(study))
    write_report(output)
    assert "again: sft seed 2, opdlm seed 3." in (output / "details.md").read_text()
    page = (output / "report.md").read_text()
    assert "| SFT on the teacher's responses † |" in page
    assert "| off-policy distillation |" in page
    collect(all_cells(SIZES), cells, output, SIZES)  # a finished cell replaces the earlier one
    write_report(output)
    assert "†" not in (output / "report.md").read_text()


def test_an_earlier_result_stays_until_its_cell_is_finished(tmp_path: Path) -> None:
    cells, output = tmp_path / "cells", tmp_path / "output"
    cells.mkdir()
    write_study(cells, output)
    (cells / "sft-seed2.json").unlink()
    collect(all_cells(SIZES), cells, output, SIZES)
    kept = json.loads((output / "results.json").read_text())["cells"]
    assert ("sft", 2) in {(cell["recipe"], cell["seed"]) for cell in kept}
    assert len(kept) == len(all_cells(SIZES))


def test_findings_follow_the_numbers(results: list[dict[str, Any]]) -> None:
    text = "\n".join(findings(results))
    assert "SFT reaches 78.0 ± 0.5 % static and 72.0 ± 0.5 % at dynamic 0.9" in text
    assert "0 of 9 solve less than 50 %" in text
    assert "get out of it at update 2 / 2 / never" in text
    assert "temperature 0.5 2 / 2, responses that grow from one block 2 / 2 / never" in text
    assert "need none of the teacher's, and solve 92.5 / 93.0 / 93.5 %" in text
    sizes = "92.5 / 90.5 % after blocks of 4, 91.0 / 89.0 % decoded so, but trained with 4"
    assert f"blocks of 8 90.5 / 88.5 % from the start, {sizes}" in text
    assert "from 92.5 / 93.0 / 93.5 to 92.5 / 93.0 / 93.5 % static" in text
    assert "qwen3_64 reaches 92.5 % from qwen3_64 (50.0 %), 92.5 % from qwen3_96 (75.0 %)" in text
    assert "; qwen3_96 reaches 92.5 % from qwen3_96 (75.0 %), 92.5 % from qwen3 (98.0 %)." in text
    assert "the best run solves 90.5 %" in text
    assert "89.5 / 39.5 % (from left to right 89.5 / 39.5 %) after eight times as many" in text
    assert "89.5 / 79.5 % (from left to right 89.5 / 79.5 %) after those on a corpus of" in text
    assert "it was 98.0 / 98.0 % before" in text
    for result in results:
        if result["recipe"] == "opdlm_off":
            result["evaluations"]["block_4"]["static"]["accuracy"] = 0.02
    assert "3 of 9 solve less than 50 %" in "\n".join(findings(results))


def test_a_finding_without_its_measurements_is_left_out(results: list[dict[str, Any]]) -> None:
    whole = findings(results)
    for recipe in ("off_policy", "opdlm_off", "opdlm_grown", "best", "d_opsd", "scp_one_lr"):
        fewer = findings([result for result in results if result["recipe"] != recipe])
        assert 1 <= len(whole) - len(fewer) <= 2
    assert findings([]) == []


@pytest.mark.parametrize(
    ("loss", "update"),
    [
        ([3, 2, 1, 1, 1], 30),
        ([1, 1, 1, 1, 1], 10),
        ([3, 1, 2, 1, 1], float("inf")),  # two points below may be chance
        ([3, 1, 1, 1, 2], float("inf")),
    ],
)
def test_a_run_has_left_the_plateau_when_its_loss_stays_below(
    loss: list[float], update: float
) -> None:
    curves = {"step": [10, 20, 30, 40, 50], "loss": loss, "tokens_per_forward": [1.0] * 5}
    result = {"recipe": "opdlm", "training": {"curves": curves}}
    assert plateau_left(result) == update
    assert plateau_left({**result, "recipe": "best"}) is None  # its loss is on the teacher's too
    del curves["tokens_per_forward"]
    assert plateau_left(result) is None


def test_no_report_without_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json"):
        write_report(tmp_path)
