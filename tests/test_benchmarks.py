"""Runs to result files to tables: figures worked out by hand, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.blocks import with_block
from rlhfjax.config import config_hash, load_config, resolved
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.evaluation.results import AccuracyRow, Evaluation, PolicyRow, WinRow
from rlhfjax.evaluation.statistics import Interval

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def collect(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import collect

    return collect


def evaluation(seed=0, entropy=5.0):
    half = Interval(0.5, 0.45, 0.55)
    return Evaluation(
        seed=seed,
        date="2026-01-02 03:04 UTC",
        hardware="2 CPU cores",
        heldout_losses={"pretrain": {"chat": 5.5}, "sft": {"chat": 5.0}, "ppo": {"chat": 5.05}},
        reward_accuracy=[
            AccuracyRow("reward model", {"within_heldout": Interval(0.6, 0.58, 0.62), "across_clear": None}),
            AccuracyRow("VADER", {"within_heldout": half, "across_clear": half}),
            AccuracyRow("reward model", {"comparisons": Interval(0.7, 0.65, 0.75)}),
        ],
        judge_accuracy=[AccuracyRow("judge", {"across_clear": half}), AccuracyRow("VADER", {"across_clear": half})],
        win_rates=[WinRow("judge", "ppo", "sft", Interval(0.75, 0.7, 0.8), 0.5, 0.1)],
        policies=[
            PolicyRow("sft", 8, 10.0, 0.6, 0.8, 0.5, 0.0, 0.0, entropy, -0.1),
            PolicyRow("ppo", 8, 9.0, 0.5, 0.84, 0.75, 0.0, 3.25, 4.0, 1.0),
        ],
    )


def write_run(
    folder, seed=0, config="quickstart", overrides=(), argv=("/opt/bin/rlhfjax", "run"), found=None, jax="0.10.2"
):
    run = load_config(config, [f"seed={seed}", *overrides])
    attempt = {
        "argv": list(argv), "config": resolved(run), "config_hash": config_hash(run), "seed": seed, "python": "3.11.7",
        "git": {"sha": "0123456789abcdef", "dirty": True}, "packages": {"rlhfjax": "0.1.0", "jax": jax},
    }  # fmt: skip
    (folder / "evaluate").mkdir(parents=True)
    (folder / "manifest.jsonl").write_text(json.dumps(attempt) + "\n", encoding="utf-8")
    (folder / "evaluate" / "evaluation.json").write_text((found or evaluation(seed)).to_json(), encoding="utf-8")
    for stage, seconds in (("sft", 40.0), ("ppo", 85.0)):
        (folder / stage).mkdir()
        (folder / stage / "complete.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
    return folder


def test_figures_are_copied_and_changes_are_against_sft(collect, tmp_path):
    result = collect.collect([write_run(tmp_path / "quickstart")])
    [run] = result["runs"]
    assert (result["kind"], result["config"], run["commit"]) == (
        "recipe runs", "quickstart", "0123456789ab with local changes",
    )  # fmt: skip
    assert run["heldout_losses"] == {
        "pretrain": {"chat": {"nats_per_token": 5.5, "change_from_sft": 0.1}},
        "sft": {"chat": {"nats_per_token": 5.0}},
        "ppo": {"chat": {"nats_per_token": 5.05, "change_from_sft": 0.01}},
    }
    assert run["reward_accuracy"]["reward model"] == {
        "within_heldout": [0.6, 0.58, 0.62], "across_clear": None, "comparisons": [0.7, 0.65, 0.75],
    }  # fmt: skip
    ppo = run["policies"]["ppo"]
    assert (ppo["length_change_from_sft"], ppo["distinct_2_change_from_sft"]) == (-0.1, 0.05)
    assert run["stage_seconds"] == {"sft": 40.0, "ppo": 85.0}


def test_the_table_in_full(collect, tmp_path):
    runs = [write_run(tmp_path / "seed1", seed=1), write_run(tmp_path / "quickstart")]
    assert collect.tables([collect.collect(runs)]) == "\n".join(
        [
            "### quickstart",
            "",
            "`rlhfjax run quickstart`, `rlhfjax run quickstart seed=1 --run-dir runs/seed1` on 2 CPU cores, "
            "2026-01-02, rlhfjax 0.1.0, jax 0.10.2. Brackets are 95 % intervals within one run.",
            "",
            "|  | seed 0 | seed 1 |",
            "| --- | --- | --- |",
            *(
                f"| {name} | {figure} | {figure} |"
                for name, figure in [
                    ("Wall time, all stages", "2 min 5 s"),
                    ("Loss on held-out chat, nats per token, pretrain → sft → ppo", "5.50 → 5.00 → 5.05 (+1.0 %)"),
                    ("Accuracy of reward model (one batch, each held-out labeler)", "60.0 % [58.0, 62.0]"),
                    ("Accuracy of VADER (one batch, each held-out labeler)", "50.0 % [45.0, 55.0]"),
                    ("Accuracy of VADER (two batches, means over 0.5 apart)", "50.0 % [45.0, 55.0]"),
                    ("Accuracy of reward model (held-out comparisons)", "70.0 % [65.0, 75.0]"),
                    ("Accuracy of judge (two batches, means over 0.5 apart)", "50.0 % [45.0, 55.0]"),
                    ("ppo preferred to sft by judge", "75.0 % [70.0, 80.0]"),
                    ("KL(ppo ‖ sft), nats per response", "3.25"),
                    ("Entropy, nats per token, sft → ppo", "5.00 → 4.00"),
                    ("Length, tokens, sft → ppo", "10.0 → 9.0 (−10.0 %)"),
                    ("Distinct 2-grams, sft → ppo", "0.800 → 0.840 (+5.0 %)"),
                    ("Responses that end by themselves, sft → ppo", "50.0 % → 75.0 %"),
                ]
            ),
        ]
    )


def test_many_runs_are_shown_as_one_and_what_all_span(collect, tmp_path):
    """Five runs and more: reward model 59 % to 61 %, judge 73 % to 75 %, PPO −10 % to +10 % in length, by hand."""

    def result(seed, jax, accuracy, win, length):
        found = replace(
            evaluation(seed),
            reward_accuracy=[
                AccuracyRow("reward model", dict.fromkeys(("within_heldout", "across_clear"), Interval(accuracy, 0, 1)))
            ],
            win_rates=[WinRow(name, "ppo", "sft", Interval(win, 0, 1), 0, 0) for name in ("ridge judge", "VADER")],
            policies=[PolicyRow(n, 8, x, 0.5, 0.8, 1.0, kl=2.0) for n, x in (("sft", 10.0), ("ppo", length))],
        )
        return write_run(tmp_path / f"{jax}-{seed}", seed, found=found, jax=jax)

    runs = [result(s, "0.10.2", 0.59 + 0.01 * s, 0.75 - 0.01 * s, 9.0 + s) for s in range(3)]
    runs += [result(s, "0.12.0", 0.6, 0.7, 10.0) for s in range(2)]
    text = collect.tables([collect.collect(runs)])
    assert "seed 1" not in text
    assert "| Mean (lowest to highest) | jax 0.10.2, 3 seeds | jax 0.12.0, 2 seeds |" in text
    for row in (
        "reward model, one batch, held-out labelers | 60.0 % (59.0 % to 61.0 %) | 60.0 % (60.0 % to 60.0 %) |",
        "| ppo preferred to sft by VADER | 74.0 % (73.0 % to 75.0 %) | 70.0 % (70.0 % to 70.0 %) |",
        "| Length, sft → ppo | +0.0 % (−10.0 % to +10.0 %) | +0.0 % (+0.0 % to +0.0 %) |",
    ):
        assert row in text
    summary = collect.summary([collect.collect(runs)]).splitlines()
    assert len(summary) == 2 + 6
    assert summary[0] == "|  | `quickstart`, 2 CPU cores, 5 runs |"
    assert "| ppo preferred to sft by VADER | 72.4 % (70.0 % to 75.0 %) |" in summary  # (75 + 74 + 73 + 70 + 70) / 5
    assert "| ppo preferred to sft by VADER | 75.0 % |" in collect.summary([collect.collect(runs[:1])]).splitlines()
    assert "|  | seed 2, jax 0.10.2 | seed 0, jax 0.12.0 |" in collect.tables([collect.collect(runs[2:4])])
    with pytest.raises(ConfigError, match=r"seed 0, jax 0\.12\.0"):
        collect.collect([*runs, runs[3]])


def test_a_changed_configuration_keeps_its_own_command_without_paths(collect, tmp_path):
    argv = ["/opt/bin/rlhfjax", "run", "quickstart", "stages.ppo.steps=3", "--run-dir", "/data/of/somebody/short"]
    run = collect.collect_run(write_run(tmp_path / "short", overrides=["stages.ppo.steps=3"], argv=argv))
    assert run["command"] == "rlhfjax run quickstart stages.ppo.steps=3 --run-dir short"


def test_a_figure_that_is_no_number_is_shown_as_missing(collect, tmp_path):
    result = collect.collect([write_run(tmp_path / "x", found=evaluation(entropy=math.nan))])
    assert "NaN" not in json.dumps(result)
    assert "| Entropy, nats per token, sft → ppo | – → 4.00 |" in collect.tables([result])


def test_runs_that_do_not_belong_together_are_refused(collect, tmp_path):
    first, again = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    other = write_run(tmp_path / "c", seed=1, overrides=["stages.ppo.kl.coef=0.5"])
    unfinished = tmp_path / "d"
    unfinished.mkdir()
    with pytest.raises(ConfigError, match=r"a \(seed 0, jax 0\.10\.2\) and b \(seed 0"):
        collect.collect([first, again])
    with pytest.raises(ConfigError, match=r"a \(seed 0, jax 0\.10\.2\) and c \(seed 1"):
        collect.collect([other, first])
    with pytest.raises(ConfigError, match="run its stages first"):
        collect.collect([first, unfinished])


def test_the_documents_get_the_tables_of_all_result_files(collect, tmp_path, monkeypatch, capsys):
    document, readme, results = tmp_path / "results.md", tmp_path / "README.md", tmp_path / "results"
    for path in (document, readme):
        path.write_text("before <!-- results:begin -->old<!-- results:end --> after", encoding="utf-8")
    monkeypatch.setattr(collect, "DOCUMENT", document)
    monkeypatch.setattr(collect, "README", readme)
    monkeypatch.setattr(collect, "RESULTS", results)
    runs = [str(write_run(tmp_path / f"seed{seed}", seed)) for seed in (0, 1)]
    assert collect.main([*runs, "--json", str(results / "b.json"), "--readme"]) == 0
    table = capsys.readouterr().out.rstrip("\n")
    assert document.read_text("utf-8") == f"before <!-- results:begin -->\n{table}\n<!-- results:end --> after"
    assert "No results are committed yet." in readme.read_text("utf-8")  # without the two judges nothing to sum up

    written = (results / "b.json").read_bytes()
    assert collect.main([*reversed(runs), "--json", str(results / "b.json")]) == 0
    assert (results / "b.json").read_bytes() == written
    (results / "a.json").write_text('{"kind": "speed"}', encoding="utf-8")
    assert [result["config"] for result in collect.read_results(results)] == ["quickstart"]


def test_errors_are_two_lines_at_most(collect, tmp_path, capsys):
    assert collect.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: expected the directory of a run, got ")
    for text in ("", "<!-- results:end --><!-- results:begin -->"):
        with pytest.raises(DataError, match="once each"):
            with_block(text, "results", "x")
    (tmp_path / "x.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="expected JSON"):
        collect.read_results(tmp_path)
    with pytest.raises(SystemExit):
        collect.main(["--json", "x.json"])
