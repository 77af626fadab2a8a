"""The upkeep of a run: what is saved and stays, when it stops, what is logged and traced."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from rlhfjax.config.sections import Count, Fraction, NonNegative, Positive, Section


class Local(Section):
    """Steps saved every `every` steps in `dir`, on a disk of each host; off without one.

    A run that is killed goes on from the newest of them, or of the checkpoints. Each process also keeps what another
    host's holds, so that a host may be lost.
    """

    dir: str | None = None
    every: Count = 10

    @field_validator("dir")
    @classmethod
    def _on_a_disk(cls, dir: str | None) -> str | None:
        if dir is not None and ("://" in dir or not dir):
            raise ValueError(f"expected a directory on a disk of each host, got {dir!r}")
        return dir


class Checkpoints(Section):
    """Saved every `every` steps and at the end of a stage.

    What stays: the newest `keep`, every step that `keep_every` divides, and the one where the metric `keep_best` was
    highest (`-NAME`: lowest). A damaged one is refused: `fall_back` goes on from the newest that is whole, `stop` ends
    the run with exit code 4.
    """

    every: Count = 100
    keep: Count = 2
    keep_every: Count | None = None
    keep_best: str | None = None
    on_damage: Literal["fall_back", "stop"] = "fall_back"
    local: Local = Local()


class Guards(Section):
    """What a run may not do for long. None: not watched.

    An update with a loss, gradient, score or KL that is no finite number is skipped; `non_finite` steps
    (iterations) in a row without any other are a divergence. So are KL above `kl_ceiling` (nats per response), entropy
    below `entropy_floor` (nats per token), a share of responses without an end above `length_at_cap`, and a total loss
    more than `loss_spike` standard deviations above the mean of its last `spike_window` values. A rollback goes to the
    last checkpoint that was good and leaves out the batches in between, at most `rollbacks` times.
    """

    non_finite: Count = 3
    kl_ceiling: Positive | None = None
    entropy_floor: NonNegative | None = None
    length_at_cap: Fraction | None = None
    loss_spike: Positive | None = None
    spike_window: Annotated[int, Field(ge=8)] = 128
    on_divergence: Literal["stop", "rollback", "continue"] = "stop"
    rollbacks: Count = 3


class Deadlines(Section):
    """Seconds after which work that shows no end is taken for a hang: stacks are written and the process exits with 42.

    After `join` seconds processes no longer wait for one that is missing at the start.
    A program that is not compiled yet gets `compile`; a training step, rollout or batch of an evaluation `step`.
    """

    compile: Positive = 7200.0
    step: Positive = 1800.0
    save: Positive = 1800.0
    join: Positive = 300.0


class Sizes(Section):
    """Sizes that choose programs, and with them the last bits of a run. None: what the machine decides.

    `slots` rows are sampled at a time on all devices together, by matrices that are cut into `blocks` of outputs each.
    A device reads at least `part_tokens` tokens at a time, and a minibatch in at most `most_parts` parts (0: any
    number), unless `micro` says how many rows. Float32 logits exist for `chunk_bytes` at a time. A loop over at most
    `unrolled_layers` layers is written out.
    """

    slots: Count | None = None
    blocks: Count | None = None
    part_tokens: Count | None = None
    most_parts: Annotated[int, Field(ge=0)] | None = None
    chunk_bytes: Count | None = None
    unrolled_layers: Annotated[int, Field(ge=0)] | None = None


class Reliability(Section):
    """When to stop. `heartbeat` is the seconds of silence after which processes take one of them for dead.

    `determinism: strict` asks GPUs for programs that give the same bits again, and refuses flags that say otherwise.
    """

    determinism: Literal["fast", "strict"] = "fast"
    sizes: Sizes = Sizes()
    heartbeat: Annotated[int, Field(ge=3)] = 30
    guards: Guards = Guards()
    deadlines: Deadlines = Deadlines()


class Logging(Section):
    """Sample tables every `samples_every` iterations with `samples` rows; TensorBoard files beside metrics.jsonl."""

    samples_every: Count = 10
    samples: Count = 8
    tensorboard: bool = True


class Profile(Section):
    """A trace of each training stage: `steps` steps or iterations, from the `start`-th of this process on."""

    start: Count = 3
    steps: Count = 2
