"""Benchmarks of speed: arithmetic and statistics against numbers worked by hand, turns of processes, a run that works.

What is measured is not tested: a figure of a test machine would say nothing.
"""

import gzip
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import blocks, figures, flops, product, speed_table, standins, traces
from benchmarks.command import main
from benchmarks.peers.worker import response_lengths
from benchmarks.turns import System, Timed, interleaved
from benchmarks.workloads import SHAPES, Workload, cpu_workloads, geometric_lengths, quick_workloads
from rlhfjax.errors import DataError
from rlhfjax.sharding import make_mesh

KEYS = ["workload", "system", "metric", "value", "unit", "ratio_to_best_peer", "share_of_peak"]
ROOT = Path(__file__).resolve().parents[1]


def find(rows, metric, system="rlhfjax"):
    return next(row for row in rows if (row["metric"], row["system"]) == (metric, system))


# --- arithmetic


def test_operations_of_an_sft_step_worked_by_hand():
    # 4 layers of 4 · 256² + 3 · 256 · 688 weights; 8 rows of 256 tokens; a multiply-add is two operations.
    assert flops.decoder_parameters(SHAPES["A"]) == 3_162_112
    work = Workload("sft", "A", rows=8, length=256).described()
    layers = 2 * 3_162_112 * 2048
    attention = 4 * 4 * 256 * (8 * 256 * 256 // 2)  # 4 layers, scores and values, 2 · 256 each, half the square
    logits = 2 * 256 * 4096 * 2048
    assert flops.step_flops(work) == 3 * (layers + attention + logits) == 54_962_159_616


def test_grouped_heads_count_their_own_projections_only():
    # SmolLM2-135M has 134,515,008 parameters, 61 norms of 576 among them.
    assert flops.parameters(SHAPES["B"]) == 134_515_008 - 61 * 576


def test_attention_is_the_sum_over_tokens():
    shape, length = SHAPES["tiny"], 64
    tokens = [2 * flops.decoder_parameters(shape) + 4 * 32 * seen for seen in range(1, length + 1)]
    assert flops.forward(shape, [length], 0) == pytest.approx(sum(tokens), rel=0.02)  # T²/2 for T(T+1)/2


def test_a_ppo_iteration_is_seven_kinds_of_passes():
    work = Workload("ppo", "A", rows=2, prompt=8, response=4, epochs=3).described()
    text, scalar = flops.forward(work["shape"], [12, 12], 8), flops.forward(work["shape"], [12, 12], 0)
    # sample, old and reference log-probabilities; values, rewards; 3 epochs forward and backward of both models
    assert flops.step_flops(work) == text * 3 + scalar * 2 + 3 * 3 * (text + scalar)


def test_decoding_one_row_reads_all_weights_once_a_token():
    work = Workload("decode_batch1", "B", rows=1, prompt=2, response=3, slots=1).described()
    attended = (2 + 1) + (2 + 2) + (2 + 3)
    assert flops.decode_bytes(work) == 4 * (3 * flops.parameters(SHAPES["B"]) + 2 * 30 * 3 * 64 * attended)


def test_every_workload_has_arithmetic():
    for workload in (*cpu_workloads(), *quick_workloads()):
        assert flops.step_flops(workload.described()) > 0


# --- statistics


def timed(system, seconds, tokens=8, **end):
    steps = [{"seconds": s, "tokens": tokens} for s in seconds]
    return Timed(Workload("sft", "tiny", rows=4, length=32), system, 1, {}, steps, end)


def test_medians_extremes_and_shares():
    work = Workload("sft", "tiny", rows=4, length=32).described()
    peaks = {"flops_float32": flops.step_flops(work), "bytes_per_second": 1.0}  # the bound is one second
    rows = figures.rows_of(timed("rlhfjax", [1.0, 4.0, 2.0], peak_memory_bytes=7), peaks)
    assert find(rows, "tokens_per_second")["value"] == 4.0
    assert find(rows, "tokens_per_second")["share_of_peak"] == 0.5
    assert [find(rows, f"step_seconds{end}")["value"] for end in ("", "_min", "_max")] == [2.0, 1.0, 4.0]
    assert find(rows, "peak_memory")["value"] == 7


def test_ratios_are_to_the_best_peer():
    peaks = {"flops_float32": 1.0, "bytes_per_second": 1.0}
    pairs = (("rlhfjax", 2.0), ("slow", 8.0), ("fast", 4.0))
    rows = figures.with_ratios([r for name, s in pairs for r in figures.rows_of(timed(name, [s]), peaks)])
    speeds = [find(rows, "tokens_per_second", name)["ratio_to_best_peer"] for name in ("rlhfjax", "slow", "fast")]
    assert speeds == [2.0, 0.5, 1.0]  # 4, 1 and 2 tokens per second
    assert find(rows, "step_seconds")["ratio_to_best_peer"] == 0.5
    assert find(rows, "steps")["ratio_to_best_peer"] is None


def test_ragged_lengths_have_the_mean_of_a_cut_geometric_distribution():
    lengths = geometric_lengths(20_000, mean=25, longest=128)
    assert max(lengths) == 128
    assert np.mean(lengths) == pytest.approx(25 * (1 - (24 / 25) ** 128), rel=0.02)
    work = {"lengths": [1, 2, 3], "rows": 2, "response": 9}
    assert [response_lengths(work, step) for step in range(3)] == [[1, 2], [3, 1], [2, 3]]


def test_a_policy_that_ends_by_chance():
    work = Workload("generation", "tiny", rows=2, prompt=8, response=8, mean=5).described()
    model = product.model_of(work)
    params = product.policy_of(work, make_mesh(devices=jax.devices()[:1]), model)
    tokens = jnp.asarray(product.random_tokens(work, 0, 4, 16))
    logits = jax.jit(model.logits)(params, tokens, jnp.ones_like(tokens, bool))
    assert jax.nn.softmax(logits, axis=-1)[..., product.STOP] == pytest.approx(1 / 5, rel=0.05)


# --- processes

WORKER = """
import sys
sys.path.insert(0, {folder!r})
from worker import Worker
worker = Worker()
name = {name!r}
print("noise on the output")
for step in range(9):
    with open({log!r}, "a") as log:
        print(name, step, worker.lengths(), file=log)
    if name == "bad" and step == 2:
        raise RuntimeError("it broke")
    worker.lap(tokens=1, **({{"lengths": [step + 5]}} if name == "first" else {{}}))
"""


def test_processes_take_turns_and_one_that_fails_stops_nobody(tmp_path):
    log = tmp_path / "order"

    def system(name):
        code = WORKER.format(folder=str(ROOT / "benchmarks" / "peers"), name=name, log=str(log))
        (tmp_path / f"{name}.py").write_text(code)
        return System(name, (sys.executable, str(tmp_path / f"{name}.py")))

    work = Workload("generation", "tiny", rows=1, response=3, repeats=2, mean=2, lengths=[4])
    found = interleaved(work, [system("first"), system("bad"), system("second")], tmp_path / "logs")
    order = ["first 0 [4]", "bad 0 [5]", "second 0 [5]"]  # each starts alone; the first has drawn 5
    order += ["first 1 [4]", "bad 1 [6]", "second 1 [6]", "first 2 [4]", "bad 2 [7]", "second 2 [7]"]
    assert log.read_text().splitlines() == order
    assert [len(one.steps) for one in found] == [2, 1, 2]
    assert "it broke" in found[1].error
    assert [one.error for one in found if one.system != "bad"] == ["", ""]
    assert all(one.end["peak_memory_bytes"] > 1e6 for one in found if one.system != "bad")


# --- a whole run


def test_a_quick_run_end_to_end(tmp_path, capsys):
    path = tmp_path / "deep" / "rows.json"
    assert main(["cpu", "--quick", "--only", "sft/tiny", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert all(list(row) == KEYS for row in rows)
    speed = find(rows, "tokens_per_second")
    assert (speed["workload"], speed["unit"], speed["ratio_to_best_peer"]) == ("sft/tiny", "tokens/s", None)
    assert speed["value"] > 0
    assert 0 < speed["share_of_peak"] < 1
    assert find(rows, "steps")["value"] == 2
    environment = {row["metric"]: row["value"] for row in rows if row["workload"] == "environment"}
    assert {"command", "date", "hardware", "versions", "load_average", "peak_flops_float32"} <= environment.keys()
    assert "sft/tiny" in capsys.readouterr().out


# --- the table


def committed(tmp_path):
    peaks = {"flops_float32": flops.step_flops(Workload("sft", "tiny", rows=4, length=32).described())}
    told = {
        "command": "python -m benchmarks cpu",
        "hardware": "2 cores",
        "date": "2026-01-02T03:04:05",
        "load_average": 0.1,
        "versions": {"rlhfjax": "9.9", "jax": "8.8", "python": "7.7"},
        "peers": {"trl": ["trl==1.2.3"]},
        "peak_flops_float32": 2e11,
    }
    rows = [figures.row("environment", "rlhfjax", name, value, "") for name, value in told.items()]
    rows += figures.rows_of(timed("rlhfjax", [0.5], tokens=4096, peak_memory_bytes=3e9), peaks)
    rows += figures.rows_of(timed("trl", [1.0], tokens=4096), peaks)
    rows.append(figures.row("loss_memory/131072", "rlhfjax", "temporary_of_logits", 0.0625, "1"))
    (tmp_path / "speed_cpu.json").write_text(json.dumps(figures.with_ratios(rows)))
    return tmp_path


def test_the_table_is_what_the_file_says(tmp_path):
    text = speed_table.speed_tables(committed(tmp_path))
    assert "| sft/tiny | 8,192 | 200 % | 3.00 GB | 1 | 4,096 (2.00 ×) |" in text
    assert (
        "`python -m benchmarks cpu` on 2 cores, 2026-01-02, rlhfjax 9.9, jax 8.8, python 7.7; peers: trl==1.2.3" in text
    )
    assert "200 GFLOP/s float32" in text
    assert "vocabulary of 131,072: 6.2 % of the logits' size" in text


def test_the_block_goes_between_the_markers():
    text = "a\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nb"
    assert blocks.with_block(text, "speed", "new") == text.replace("old", "new")
    with pytest.raises(DataError, match="once each"):
        blocks.with_block("nothing", "speed", "new")


def test_the_front_page_compares_with_the_fastest_peer(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_table, "MAIN", {"sft/tiny"})
    assert speed_table.summary(committed(tmp_path)) == "`sft/tiny` 2.00 × (trl)"


def test_documents_hold_the_committed_tables():
    results = speed_table.RESULTS
    for path, block in (
        (speed_table.DOCUMENT, speed_table.speed_tables(results)),
        (speed_table.README, speed_table.summary(results)),
    ):
        text = path.read_text("utf-8")
        assert blocks.with_block(text, "speed", block) == text


# --- machines without the packages for data and settings


def test_stand_ins_let_modules_of_settings_be_imported(tmp_path, monkeypatch):
    code = """
from absent_settings import Field, validator
from absent_settings.deeper import Reader
from typing import Annotated

class Plain(Reader):
    count: Annotated[int, Field(ge=1)] = 3

@validator("count")
def check(x):
    return x
"""
    (tmp_path / "uses_absent.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, standins._Finder(["absent_settings"])])
    import uses_absent  # pyright: ignore[reportMissingImports]

    assert uses_absent.Plain().count == 3


def test_settings_without_pydantic_keep_their_defaults():
    class Inner(standins.BaseModel):
        lam: float = 0.95

    class Outer(standins.BaseModel):
        steps: int
        inner: Inner = Inner()

    assert Outer(steps=2).model_dump() == {"steps": 2, "inner": {"lam": 0.95}}


# --- traces


def test_seconds_of_operations_come_from_the_streams_of_a_device(tmp_path):
    def name(kind, pid, value, **more):
        return {"ph": "M", "name": kind, "pid": pid, "args": {"name": value}} | more

    events = [
        name("process_name", 1, "/device:GPU:0"),
        name("process_name", 2, "/host:CPU"),
        name("thread_name", 1, "Stream #13(Compute)", tid=5),
        name("thread_name", 1, "XLA Modules", tid=6),
        name("thread_name", 2, "xla worker", tid=7),
        {"ph": "X", "pid": 1, "tid": 5, "name": "gemm_fusion", "dur": 2e6},
        {"ph": "X", "pid": 1, "tid": 5, "name": "gemm_fusion", "dur": 1e6},
        {"ph": "X", "pid": 1, "tid": 5, "name": "MemcpyD2D", "dur": 1e6},
        {"ph": "X", "pid": 1, "tid": 6, "name": "jit_step", "dur": 9e6},
        {"ph": "X", "pid": 2, "tid": 7, "name": "dot", "dur": 9e6},
    ]
    (tmp_path / "a.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    seconds = traces.seconds_by_operation(tmp_path)
    assert seconds == {"gemm_fusion": 3.0, "MemcpyD2D": 1.0}
    assert traces.split(seconds) == {"matrix products": 3.0, "copies": 1.0}
    assert math.isclose(sum(seconds.values()), 4.0)
