"""Plans of a small recipe on CPU devices: against the equations, against what runs, with compilers that die."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from rlhfjax.config import load_config
from rlhfjax.planning.answer import asked
from rlhfjax.planning.assumed import Assumed
from rlhfjax.planning.chips import this_machine
from rlhfjax.planning.compiler import Compiler, failure
from rlhfjax.planning.plan import planned
from rlhfjax.planning.programs import Limits, compiled
from rlhfjax.planning.remedies import remedies
from rlhfjax.planning.table import table

CONFIG = """
name: small
mesh: {data: -1, fsdp: 2}
model: {family: llama, layers: 2, width: 64, heads: 4, kv_heads: 2, mlp_width: 128, context: 64}
tokenizer: {vocab_size: 279, data: [{source: arithmetic/text}]}
stages:
  sft:
    data: [{source: arithmetic/demonstrations}]
    steps: 4
    batch: {size: 16, length: 64, pack: false}
    optimizer: {lr: 1.0e-3}
"""
GRPO = """
  grpo:
    data: [{source: arithmetic/prompts}]
    steps: 3
    batch: {size: 16, minibatch: 8, epochs: 1, prompt_length: 8}
    sampling: {max_new_tokens: 16}
    groups: {size: 4}
    rewards:
      - {numeric_match: {field: answer}}
    missing_eos: {value: 0.0}
    optimizer: {lr: 1.5e-4}
checkpoints: {every: 2}
"""
QUIET = {"programs": None, "assumed": Assumed(), "say": lambda _: None}


@pytest.fixture
def question(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(CONFIG)
    asks = asked(load_config(file), None, 2, 1, **QUIET)
    return replace(asks, chip=this_machine(2, 1e12, 2**30))


@pytest.fixture
def described(question):
    """The step of SFT, compiled in this process."""
    compiler = Compiler(question.job)
    return compiler.names("sft"), compiler.describe("sft", "step")


def test_a_program_is_what_the_equations_say(described):
    names, step = described
    tokens, layers, width, words = 16 * 64, 2, 64, 279
    weights = layers * (2 * width * width + 2 * width * width // 2 + 3 * width * 128) + words * width
    attention = layers * 4 * 16 * 64 * 65 / 2 * width  # 4 head_dim for each head, layer and pair of tokens
    assert step["model_flops"] == 3 * (2 * weights * tokens + attention)
    square = 3 * (2 * weights * tokens + attention * 2 * 64 / 65)  # one block of attention computes all of it
    assert 2 * step["flops"] == pytest.approx(square, rel=0.05)  # of both devices
    # Weights, moments and what SFT reads: three trees in float32, of which each device holds half.
    parameters = weights + layers * 2 * width + width
    assert names["saved"] == pytest.approx(3 * 4 * parameters, rel=0.01)
    assert names["held"] == pytest.approx(3 * 4 * parameters / 2, rel=0.02)
    assert step["peak"] >= step["arguments"] + step["temporaries"]
    assert step["leaves"][0][2].endswith("embedding")


def fake_compiler(tmp_path, monkeypatch, what):
    """A program in the place of Python that knows of one step, and does something else than to compile it."""
    fake, names = tmp_path / "compiler", json.dumps({"programs": ["step"], "held": 0, "saved": 0})
    answers = f"case $line in sft) echo '{names}';; sft/step) {what};; esac"
    fake.write_text(f"#!/bin/sh\nwhile read -r line; do {answers}; done\n")
    fake.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(fake))


def failures(question, limits):
    """Why there is no answer, of the stage or of its program: a slow machine may not come to the second."""
    held, found = compiled(question.job, ["sft"], limits, lambda _: None)
    return [answer.get("failed") for answer in (held | found).values()]


def test_a_compiler_that_dies_is_a_line_of_the_table(question, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, "kill -SEGV $$")
    plan = planned(question, lambda _: None)
    assert not plan["fits"]
    assert "the compiler died: SIGSEGV" in plan["steps"]["sft/step"]["reason"]
    assert "the compiler died: SIGSEGV" in table(plan)


def test_a_compiler_that_does_not_end_is_stopped(question, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, "exec sleep 1000")
    assert "time" in failures(question, Limits(seconds=0.5))


def test_a_compiler_that_takes_too_much_memory_is_stopped(question, tmp_path, monkeypatch):
    fake_compiler(tmp_path, monkeypatch, "exec sleep 1000")
    assert "memory of this host" in failures(question, Limits(memory=1))


def test_what_the_compiler_wants_is_read_from_what_it_says():
    said = "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required (2.50T) exceeds 95.73G"
    assert failure(RuntimeError(said))["wants"] == 2.5 * 2**40
    assert failure(RuntimeError("Used 20.5G of 15.75G hbm. Exceeded"))["wants"] == 20.5 * 2**30
    assert failure(ValueError("no mesh"))["failed"] == "ValueError"


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_changes_that_plan_as_fitting(question):
    fits = planned(question, lambda _: None)
    assert fits["fits"], fits["reasons"]
    peak = fits["steps"]["sft/step"]["peak"]
    small = replace(question, chip=this_machine(2, 1e12, int(0.95 * peak)))  # 5 % over
    plan = planned(small, lambda _: None)
    assert not plan["fits"]
    assert "too much" in plan["reasons"][0]
    assert remedies(small, plan, lambda _: None)
    host = replace(question, chip=replace(question.chip, host_memory=4 * 10**9))  # as much as one process has alone
    plan = planned(host, lambda _: None)
    assert (plan["fits"], remedies(host, plan, lambda _: None)) == (False, [])
    assert plan["reasons"][0].startswith("a host needs 3.7 GiB of its memory")


@pytest.mark.slow
def test_programs_of_a_plan_are_those_that_run_and_none_is_compiled_again(tmp_path):
    file, folder = tmp_path / "small.yaml", tmp_path / "programs"
    file.write_text(CONFIG + GRPO)
    rlhfjax = [sys.executable, "-m", "rlhfjax.cli"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    subprocess.run([*rlhfjax, "data", "prepare", "arithmetic"], check=True, env=environment)
    subprocess.run(
        [*rlhfjax, "plan", str(file), "--devices", "2", "--programs", str(folder)], check=True, env=environment
    )
    steps = json.loads((folder / "plan.json").read_text())["steps"]
    assert {"sft/step", "grpo/rollout", "grpo/score", "grpo/estimate", "grpo/update"} <= steps.keys()

    def run(name, *overrides):
        words = [*rlhfjax, "run", str(file), *overrides, "--run-dir", str(tmp_path / name), "--plan", str(folder)]
        here = environment | {"RLHFJAX_DEVICES_PER_PROCESS": "2"}
        done = subprocess.run(words, capture_output=True, text=True, env=here)
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = run("planned")
    assert "programs of the plan: 1 loaded, 0 compiled" in said
    assert f"programs of the plan: {len(steps)} loaded, 0 compiled" in said
    assert "step_ratio" in said
    other = run("other", "stages.grpo.sampling.max_new_tokens=24")
    assert "the configuration is another: stages.grpo.sampling.max_new_tokens was 16, is 24" in other
