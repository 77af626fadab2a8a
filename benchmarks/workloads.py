"""Workloads: two model shapes and the steps of each method, as plain JSON that every system reads.

The same numbers go to every system: shapes, batch sizes, optimizer settings, and for ragged work the length of every
response. Tokens are random and weights are fresh: speed does not depend on what a text says.
"""

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

# A: small enough that overheads show. B: the shape of SmolLM2-135M. G: a 1B-class Llama for a GPU.
SHAPES: dict[str, dict[str, int]] = {
    "A": {"layers": 4, "width": 256, "heads": 4, "kv_heads": 4, "mlp_width": 688, "vocab_size": 4096, "context": 512},
    "B": {
        "layers": 30,
        "width": 576,
        "heads": 9,
        "kv_heads": 3,
        "mlp_width": 1536,
        "vocab_size": 49152,
        "context": 512,
    },
    "G": {
        "layers": 16,
        "width": 2048,
        "heads": 32,
        "kv_heads": 8,
        "mlp_width": 8192,
        "vocab_size": 128256,
        "context": 2304,
    },
    "tiny": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "mlp_width": 64, "vocab_size": 128, "context": 64},
}
LEARNING_RATE, CLIP, WEIGHT_DECAY = 1e-5, 1.0, 0.0
MEAN_LENGTH, MAX_LENGTH = 25, 128  # of ragged responses, tokens


@dataclass(frozen=True)
class Workload:
    """One step that is timed over and over.

    `rows` counts sequences of a step (pairs count as two; prompts where text is generated), `slots` how many of them
    a system may hold at once. Responses are ragged where `mean` says how long they are on average; `lengths` are then
    those of a warm-up, before this package has drawn others.
    """

    task: str
    size: str
    rows: int
    prompt: int = 0
    response: int = 0
    length: int = 0
    slots: int = 0
    epochs: int = 1
    minibatches: int = 1
    per_prompt: int = 1
    mean: int = 0
    lengths: list[int] = field(default_factory=list)
    repeats: int = 5
    seed: int = 0
    dtype: str = "float32"
    warmup: int = 1

    @property
    def name(self) -> str:
        """As results name it: ppo/A, ppo_4_minibatches/A."""
        return f"{self.task}{f'_{self.minibatches}_minibatches' if self.minibatches > 1 else ''}/{self.size}"

    @property
    def shape(self) -> dict[str, int]:
        return SHAPES[self.size]

    def described(self) -> dict[str, Any]:
        """What a worker reads."""
        settings = {"shape": self.shape, "lr": LEARNING_RATE, "clip": CLIP, "weight_decay": WEIGHT_DECAY}
        return dataclasses.asdict(self) | settings | {"name": self.name}


def geometric_lengths(rows: int, mean: float = MEAN_LENGTH, longest: int = MAX_LENGTH, seed: int = 0) -> list[int]:
    """`rows` response lengths, geometric with the given mean and cut off at `longest`; the same for every system."""
    draw = random.Random(seed)
    lengths = []
    for _ in range(rows):
        length = 1
        while length < longest and draw.random() > 1.0 / mean:
            length += 1
        lengths.append(length)
    return lengths


def cpu_workloads() -> list[Workload]:
    """All timed steps on a CPU, cheapest first; B has few repetitions because one of its steps takes up to a minute."""
    ragged = {size: {"mean": MEAN_LENGTH, "lengths": geometric_lengths(n)} for size, n in (("A", 64), ("B", 32))}
    return [
        Workload("sft", "A", rows=8, length=256, repeats=7),
        Workload("generation", "A", rows=16, prompt=64, response=64, slots=16),
        Workload("generation_ragged", "A", rows=64, prompt=64, response=MAX_LENGTH, slots=16, **ragged["A"]),
        Workload("ppo", "A", rows=16, prompt=64, response=64, epochs=4),
        Workload("ppo", "A", rows=16, prompt=64, response=64, epochs=4, minibatches=4),
        Workload("ppo_ragged", "A", rows=16, prompt=64, response=MAX_LENGTH, epochs=4, **ragged["A"]),
        Workload("ppo_shared_trunk", "A", rows=16, prompt=64, response=64, epochs=4),
        Workload("dpo", "A", rows=8, prompt=128, length=256),
        Workload("grpo", "A", rows=16, prompt=64, response=64, per_prompt=4),
        Workload("reward", "A", rows=8, prompt=128, length=256),
        Workload("decode_batch1", "B", rows=1, prompt=64, response=64, slots=1, repeats=5),
        Workload("generation", "B", rows=8, prompt=64, response=64, slots=8, repeats=5),
        Workload("generation_ragged", "B", rows=32, prompt=64, response=MAX_LENGTH, slots=8, **ragged["B"], repeats=3),
        Workload("sft", "B", rows=4, length=256, repeats=3),
        Workload("reward", "B", rows=4, prompt=128, length=256, repeats=3),
        Workload("ppo", "B", rows=8, prompt=64, response=64, epochs=4, repeats=2),
    ]


def quick_workloads() -> list[Workload]:
    """The same tasks at sizes where a step takes milliseconds: what tests and `--quick` run."""
    ragged = {"mean": 4, "lengths": geometric_lengths(8, mean=4, longest=12)}
    return [
        Workload("sft", "tiny", rows=4, length=32, repeats=2),
        Workload("generation", "tiny", rows=4, prompt=8, response=8, slots=4, repeats=2),
        Workload("generation_ragged", "tiny", rows=8, prompt=8, response=12, slots=4, **ragged, repeats=2),
        Workload("decode_batch1", "tiny", rows=1, prompt=8, response=8, slots=1, repeats=2),
        Workload("ppo", "tiny", rows=4, prompt=8, response=8, epochs=2, repeats=2),
        Workload("ppo", "tiny", rows=4, prompt=8, response=8, epochs=2, minibatches=2, repeats=2),
        Workload("ppo_ragged", "tiny", rows=4, prompt=8, response=12, epochs=2, **ragged, repeats=2),
        Workload("ppo_shared_trunk", "tiny", rows=4, prompt=8, response=8, epochs=2, repeats=2),
        Workload("dpo", "tiny", rows=4, prompt=8, length=32, repeats=2),
        Workload("grpo", "tiny", rows=4, prompt=8, response=8, per_prompt=2, repeats=2),
        Workload("reward", "tiny", rows=4, prompt=8, length=32, repeats=2),
    ]
