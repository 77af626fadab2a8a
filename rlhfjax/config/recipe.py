"""The stages of the recipe in their order, and what is true of each: every list of stages is taken from this table."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rlhfjax.config.rewards import on_device
from rlhfjax.config.schema import Data, Evaluate, Offline, Online, Ppo, Run

Entry = tuple[Data, str]  # a data entry of the configuration, and the kind of its records


class Reads(NamedTuple):
    """Data of a stage: the key in its section, the kind of the records, and whether entries are mixed by `weight`."""

    key: str
    kind: str
    mixed: bool = False


@dataclass(frozen=True)
class StageFacts:
    """What all others know of a stage; its function is the one of its name in `rlhfjax.stages.MODULE`.

    `key` is folded into the seed: its random numbers depend on it, so that it is never changed or given to another one.
    `role` is the model that it hands on, `starts_from` are the stages whose policy it starts from, the first that the
    recipe has, and `needs` those whose models it may read beside. `unit` is that of its loss, or of its score. With
    `adapts` it trains adapters where the model has them; with `online` it samples while it trains; what `measures`
    makes no model, and reads all that there are.
    """

    name: str
    key: int
    module: str
    reads: tuple[Reads, ...]
    role: Literal["policy", "reward"] | None = None
    starts_from: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    unit: str = ""
    adapts: bool = False
    online: bool = False
    measures: bool = False

    @property
    def place(self) -> str:
        """The key of its section; the tokenizer's stands outside `stages`."""
        return self.name if self.name == TOKENIZER else f"stages.{self.name}"

    @property
    def aligns(self) -> bool:
        """Whether it goes on from the supervised policy, and is compared with it."""
        return self.role == "policy" and SUPERVISED in self.starts_from


TOKENIZER, SUPERVISED = "tokenizer", "sft"
_MIXED = True
_POLICY = (SUPERVISED, "pretrain")
_RANKINGS = (Reads("data", "comparison", _MIXED), Reads("validation", "comparison"))
_PROMPTS = (Reads("data", "prompt", _MIXED), Reads("ptx.data", "document", _MIXED))
_PER_TOKEN, _PER_PAIR = "nats per token", "nats per ranked pair"


def _learning_online(name: str, key: int) -> StageFacts:
    """A stage that samples while it trains: it differs from the others of its kind by its algorithm."""
    return StageFacts(
        name,
        key=key,
        module=name,
        reads=_PROMPTS,
        role="policy",
        starts_from=_POLICY,
        needs=("reward",),
        unit="score",
        adapts=True,
        online=True,
    )


STAGES = (
    StageFacts("tokenizer", key=0, module="tokenizer", reads=(Reads("data", "document"),)),
    StageFacts(
        "pretrain",
        key=1,
        module="pretrain_and_sft",
        reads=(Reads("data", "document", _MIXED), Reads("validation", "document")),
        role="policy",
        unit=_PER_TOKEN,
    ),
    StageFacts(
        "sft",
        key=2,
        module="pretrain_and_sft",
        reads=(
            Reads("data", "demonstration", _MIXED),
            Reads("validation", "demonstration"),
            Reads("pretraining.data", "document", _MIXED),
        ),
        role="policy",
        starts_from=("pretrain",),
        unit=_PER_TOKEN,
        adapts=True,
    ),
    StageFacts(
        "reward",
        key=3,
        module="reward",
        reads=(*_RANKINGS, Reads("normalize.data", "demonstration")),
        role="reward",
        starts_from=_POLICY,
        unit=_PER_PAIR,
        adapts=True,
    ),
    StageFacts(
        "dpo",
        key=6,
        module="dpo",
        reads=_RANKINGS,
        role="policy",
        starts_from=_POLICY,
        unit=_PER_PAIR,
        adapts=True,
    ),
    _learning_online("ppo", key=4),
    _learning_online("grpo", key=7),
    _learning_online("rloo", key=8),
    StageFacts(
        "evaluate",
        key=5,
        module="evaluate",
        reads=(
            Reads("data", "prompt", _MIXED),
            Reads("losses", "document"),
            Reads("comparisons", "comparison"),
            *(Reads(f"ratings.{name}", "rated_text") for name in ("judge", "baseline", "test")),
            Reads("exact_match.data", "demonstration"),
        ),
        measures=True,
    ),
)
FACTS = {facts.name: facts for facts in STAGES}
NAMES = tuple(FACTS)


def stages_of(run: Run) -> list[str]:
    """The stages of a recipe in their order."""
    return [name for name in NAMES if section_of(run, name) is not None]


def section_of(run: Run, stage: str) -> Any:
    """The section of a stage; None of one that the recipe lacks."""
    return run.tokenizer if stage == TOKENIZER else getattr(run.stages, stage, None)


def offline(run: Run) -> list[tuple[str, Offline]]:
    """The stages of a recipe that train on data as they are, with their sections."""
    return [(name, section) for name, section in run.stages if isinstance(section, Offline)]


def online(run: Run) -> list[tuple[str, Online]]:
    """Those that train on what they sample."""
    return [(name, section) for name, section in run.stages if isinstance(section, Online)]


def sampling(run: Run) -> list[tuple[str, Online | Evaluate]]:
    """Those that sample at all."""
    return [(name, section) for name, section in run.stages if isinstance(section, Online | Evaluate)]


def held_at(section: Any, key: str) -> list[Data]:
    """The data entries at a dotted key of a section, none where one of its parts is left out."""
    for name in key.split("."):
        section = getattr(section, name, None)
    return section if isinstance(section, list) else [section] if section else []


def entries_of(run: Run, stage: str) -> list[Entry]:
    """The data entries of one stage; none of a stage that the recipe lacks."""
    section = section_of(run, stage)
    return [(entry, reads.kind) for reads in FACTS[stage].reads for entry in held_at(section, reads.key)]


def starts_of(run: Run, stage: str) -> tuple[str, ...]:
    """The stages whose policy a stage starts from, the first that the recipe has; `start_from` leaves out others."""
    chosen, facts = getattr(section_of(run, stage), "start_from", None), FACTS[stage]
    return facts.starts_from[facts.starts_from.index(chosen) :] if chosen else facts.starts_from


def parents_of(run: Run, stage: str) -> list[str]:
    """The earlier stages whose models a stage reads."""
    facts, there = FACTS[stage], stages_of(run)
    if stage not in there:
        return []
    earlier = [name for name in there[: there.index(stage)] if FACTS[name].role]
    if facts.measures:
        return earlier
    return [*[name for name in starts_of(run, stage) if name in earlier][:1], *needs_of(run, stage)]


def needs_of(run: Run, stage: str) -> list[str]:
    """The stages whose models a stage reads beside its policy: those that its rewards or its value model name."""
    section = section_of(run, stage)
    if not isinstance(section, Online):
        return []
    named = [term.model for term in on_device(section.rewards)]
    if isinstance(section, Ppo) and section.value.trunk == "own":
        named.append(section.value.start_from)
    return [need for need in FACTS[stage].needs if need in named]


def compared(run: Run) -> list[str]:
    """The policies whose responses are compared: the last one, after the one that it started from.

    Without a stage that aligns it is the supervised policy alone, and without that none.
    """
    there = stages_of(run)
    if last := [name for name in there if FACTS[name].aligns][-1:]:
        return [*(name for name in parents_of(run, last[0]) if FACTS[name].role == "policy"), *last]
    return [SUPERVISED] if SUPERVISED in there else []
