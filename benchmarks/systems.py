"""The systems that are timed: this package, and the peers whose environments are installed."""

import sys
from pathlib import Path

from benchmarks.peers import environments
from benchmarks.turns import System
from benchmarks.workloads import Workload

ROOT = Path(__file__).resolve().parents[1]
_TEXT = ("generation", "generation_ragged", "decode_batch1")
PEERS = {  # system: (environment, script, further arguments, tasks)
    "trl": ("trl", "trl_steps.py", (), ("sft", "dpo", "grpo", "reward")),
    "trl 1.12": ("trl_ppo", "trl_ppo.py", (), ("ppo", "ppo_ragged")),
    "transformers": ("trl", "transformers_generation.py", (), _TEXT),  # what TRL samples with
    "torch": ("trl", "torch_loop.py", (), ("sft", "reward", "dpo")),
    "torch.compile": ("trl", "torch_loop.py", ("--compile",), ("sft",)),
    "tunix": ("tunix", "tunix_steps.py", (), ("sft", "dpo", "grpo", "ppo", *_TEXT)),
}
# Left out, with the reason that a result file gives.
LEFT_OUT = {
    ("tunix", "ppo/B"): "compiles for minutes and takes over 14 GB; not run",
    ("tunix", "ppo_4_minibatches/A"): "its mini-batches sample anew, which is another algorithm; not run",
    ("tunix", "sft/B"): "not run to save time",
    ("tunix", "generation_ragged/B"): "not run to save time",
    ("transformers", "generation_ragged/B"): "not run to save time",
    ("torch.compile", "sft/tiny"): "compiles longer than a quick run may take; not run",
}
ROUNDS = {("trl 1.12", "ppo/B"): 1}  # where one step takes most of a minute


def ours() -> System:
    """This package, in the interpreter that runs this program."""
    return System("rlhfjax", (sys.executable, "-m", "benchmarks.ours"), {"PYTHONPATH": str(ROOT)})


def peers(workload: Workload) -> list[System]:
    """The peers that can do this, in the order in which they take turns."""
    found = []
    for name, (environment, script, rest, tasks) in PEERS.items():
        if workload.task not in tasks or (name, workload.name) in LEFT_OUT:
            continue
        python, path = environments.python_of(environment), ROOT / "benchmarks" / "peers" / script
        # JAX compiles tunix's step a second time at its second call.
        warmup, rounds = 2 if name == "tunix" else 1, ROUNDS.get((name, workload.name), System.rounds)
        own = {"TORCHINDUCTOR_CACHE_DIR": str(environments.home() / "inductor")}
        found.append(System(name, (str(python), str(path)), own, arguments=rest, warmup=warmup, rounds=rounds))
    return found
