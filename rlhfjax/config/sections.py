"""Parts that several stages have: mesh, data, optimizer, batches, sampling.

Counts are global: `size`, `minibatch` and `micro` are sequences (prompts for the reward model) over all devices.
Lengths are tokens. Learning rates are per optimizer step. A `None` default means "what the field next to it implies".
"""

import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rlhfjax.errors import ConfigError
from rlhfjax.record_kinds import Reading, reading_of

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every part: unknown keys are errors, values are not coerced, nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


class Axes(Section):
    """A device mesh; the product of its axes must equal the number of devices, one may be -1 (all that are left).

    The outermost part of `data` crosses `slices` of accelerators, which a slower network joins. `offload` says what
    lies in the memory of the devices' hosts while no program reads it: `moments` (the optimizer's, and a moving
    average), `frozen` (reference and reward models), or both (`all`).
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    expert: int = 1
    slices: Count = 1
    offload: Literal["none", "moments", "frozen", "all"] = "none"

    @model_validator(mode="after")
    def _one_free_axis(self):
        sizes = tuple(self.axes.values())
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh axes are positive, at most one of them -1; got {sizes}")
        return self

    @property
    def axes(self) -> dict[str, int]:
        """The axes of the mesh in their order."""
        return {name: getattr(self, name) for name in ("data", "fsdp", "sequence", "tensor", "expert")}

    def offloads(self, what: Literal["moments", "frozen"]) -> bool:
        """Whether that lies in the hosts' memory."""
        return self.offload in (what, "all")


class Mesh(Axes):
    """The mesh of all stages but those with their own in `stages`, which a file may have at `stages.NAME.mesh`."""

    stages: dict[str, Axes] = {}

    def of(self, stage: str) -> Axes:
        """That of one stage."""
        return self.stages.get(stage, self)

    @property
    def all(self) -> dict[str, Axes]:
        """The recipe's, and those that stages have of their own, by the keys that they stand at in a file."""
        return {"mesh": self, **{f"stages.{name}.mesh": mesh for name, mesh in self.stages.items()}}


class Data(Section):
    """One dataset: a prepared name (`movies/chat`) or a file, pattern or folder, its split, its share of the tokens.

    Of files the layout is recognised; `layout` names it, or `map` says which of their fields is which of ours.
    `sample_by` says what a document of a plain text is: between blank lines, a line, or (document) the whole file.
    """

    source: str
    split: str = "train"
    weight: Positive = 1.0
    layout: str | None = None
    map: dict[str, str] = {}
    sample_by: Literal["paragraph", "line", "document"] = "paragraph"

    @property
    def reading(self) -> Reading:
        """How its files are read."""
        return reading_of(self.layout, self.map, self.sample_by)

    @property
    def name(self) -> str:
        """SOURCE@SPLIT, and how its files are read where that is given."""
        how = [self.layout] if self.layout else [f"{ours}={theirs}" for ours, theirs in sorted(self.map.items())]
        how += [self.sample_by] if self.sample_by != "paragraph" else []
        return f"{self.source}@{self.split}" + (f" ({' '.join(how)})" if how else "")

    @model_validator(mode="after")
    def _readable(self):
        try:
            reading_of(self.layout, self.map, self.sample_by)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


Sources = Annotated[list[Data], Field(min_length=1)]


class Tokenizer(Section):
    """A SentencePiece tokenizer to train on `data`, or `path`: a directory that holds one, also Hugging Face's.

    `chat_template_kwargs` are variables for its chat template, such as enable_thinking; `date` is what a template that
    writes today's date gets (none: that of the run's first start).
    """

    path: str | None = None
    vocab_size: Count = 2048
    kind: Literal["bpe", "unigram"] = "bpe"
    data: list[Data] = []
    documents: Count = 100_000
    chat_template_kwargs: dict[str, Any] = {}
    date: str | None = None

    @field_validator("date")
    @classmethod
    def _is_a_date(cls, date: str | None) -> str | None:
        if date is not None:
            try:
                return datetime.date.fromisoformat(date).isoformat()
            except ValueError:
                raise ValueError(f"expected a date such as 2026-01-31, got {date!r}") from None
        return date

    @model_validator(mode="after")
    def _path_or_data(self):
        if self.path and self.data:
            raise ValueError("give either path (an existing tokenizer) or data (to train one), not both")
        return self


class Optimizer(Section):
    """A direction (`_bf16`: its first moments in bfloat16) and a schedule. Adafactor has no `b1`, `b2` and `eps`.

    `final` and `warmup_from` are fractions of `lr`; `clip_norm` null means no clipping. With `ema_decay` d a stage
    hands on, and measures on held-out data, the average of its parameters: after n updates those of update i weigh
    d^(n - i), those it began with nothing.

    `noam` is lr x width^-0.5 x min(step^-0.5, step x warmup_steps^-1.5) (Vaswani et al. 2017, eq. 3; they take lr 1,
    warmup_steps 4000, b2 0.98, eps 1e-9); it has no `final` and no `warmup_from`.
    """

    kind: Literal["adamw", "adamw_bf16", "adafactor", "lion", "lion_bf16", "muon", "muon_bf16"] = "adamw"
    lr: Positive
    schedule: Literal["constant", "linear", "cosine", "noam"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_from: Fraction = 0.0
    final: Fraction = 0.1
    b1: BelowOne = 0.9
    b2: BelowOne = 0.95
    eps: Positive = 1e-5
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = 1.0
    ema_decay: BelowOne | None = None

    @model_validator(mode="after")
    def _noam(self):
        if self.schedule == "noam" and not self.warmup_steps:
            raise ValueError("schedule: noam rises for warmup_steps and then falls; give warmup_steps above 0")
        if self.schedule == "noam" and (self.final, self.warmup_from) != (0.1, 0.0):  # other than what they are
            raise ValueError("schedule: noam starts and ends at 0; remove final and warmup_from")
        return self


class Batch(Section):
    """Sequences of a step. `micro` splits them for memory (gradient accumulation); results do not depend on it.

    `overlong` and `refused` say what is done with rows that are too long, and with those that the chat template cannot
    write. `chat_template_kwargs` go before those of `tokenizer`, in this stage.
    """

    size: Count
    micro: Count | None = None
    length: Count
    pack: bool = True
    overlong: Literal["error", "drop"] = "error"
    refused: Literal["error", "drop"] = "error"
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _divides(self):
        check_divides("batch.size", self.size, "batch.micro", self.micro or self.size)
        return self


class RankedBatch(Section):
    """Prompts of a step, each with up to `candidates` ranked responses; `length` holds prompt and response."""

    size: Count
    micro: Count | None = None
    length: Count
    candidates: Annotated[int, Field(ge=2)] = 9
    overlong: Literal["error", "drop"] = "error"
    refused: Literal["error", "drop"] = "error"
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _divides(self):
        check_divides("batch.size", self.size, "batch.micro", self.micro or self.size)
        return self


class RolloutBatch(Section):
    """Rollouts of an iteration and how the update walks over them.

    `routing` is of a policy with experts: `measured` keeps which of them each token was sent to while it was sampled, 2
    bytes for each layer and expert of a token, and counts those that scoring sends elsewhere, for one more pass;
    `replayed` also sends them there again in scoring and in the update.
    """

    size: Count
    minibatch: Count | None = None
    micro: Count | None = None
    epochs: Count = 4
    prompt_length: Count
    overlong: Literal["error", "drop"] = "error"
    refused: Literal["error", "drop"] = "error"
    chat_template_kwargs: dict[str, Any] = {}
    routing: Literal["own", "measured", "replayed"] = "own"

    @model_validator(mode="after")
    def _divides(self):
        minibatch = self.minibatch or self.size
        check_divides("batch.size", self.size, "batch.minibatch", minibatch)
        check_divides("batch.minibatch", minibatch, "batch.micro", self.micro or minibatch)
        return self


class Sampling(Section):
    """How responses are drawn. Online stages take no top_k, top_p and min_p, since they learn as the policy itself.

    `stop` ends a response at that text of one token, or at each text or id of a list (default: EOS), from position
    `stop_after` on.
    `old_log_probs: rollout` keeps the sampler's own; `recompute` takes them from one forward pass (exact ratio 1).
    `precision` is that of the weights and the cache that sampling reads. `speculate` says where
    `speculate_tokens` draft tokens per call come from: what followed the last `speculate_ngram` tokens in the row, or
    the model's own heads; responses stay.
    """

    max_new_tokens: Count
    temperature: NonNegative = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    stop: str | Annotated[list[str | Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    stop_after: Annotated[int, Field(ge=0)] = 0
    old_log_probs: Literal["recompute", "rollout"] = "recompute"
    precision: Literal["full", "int8_weights", "int8_cache", "int8"] = "full"
    speculate: Literal["none", "ngram", "heads"] = "none"
    speculate_tokens: Count = 4
    speculate_ngram: Count = 3


def check_divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    """Raise ValueError with the arithmetic when `part` does not divide `whole`."""
    if whole % part:
        raise ValueError(f"{part_name} {part} must divide {whole_name} {whole} (remainder {whole % part})")
