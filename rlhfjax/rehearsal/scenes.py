"""The faults of a rehearsal: what happens to which process, and what is expected of the launch file then."""

import difflib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhfjax.errors import ConfigError
from rlhfjax.rehearsal.shrinking import HEARTBEAT, JOIN, STEP

_SAVED = 4  # a step that is saved
_STEPS = (3, 4, 5)  # steps at which a process may be hit: the first programs are compiled, a step is saved
_LAST_WORD = 10.0  # seconds: who speaks leaves last, and the stacks of all are written
_LOOK = 60.0  # seconds of a preflight, of as many processes as there are on one machine


@dataclass(frozen=True)
class Scene:
    """One fault: `fault` as RLHFJAX_FAULT has it, or what happens to a `node`, at the first start alone.

    It `ends` resumed, with the bits of a run without faults, or in a verdict, with exit code `code` and a line that
    `says` so, within `bound` seconds. `{stage}`, `{step}` and `{process}` are filled in. With `damage` the newest step
    is damaged before the second start; one that `keeps` leaves the state of its first end for those.
    What takes effect later than it happens is counted from what the line says (`since_line`).
    """

    name: str
    text: str
    ends: Literal["resumed", "verdict"]
    fault: str = ""
    node: str = ""
    verb: Literal["run", "doctor"] = "run"
    who: Literal["other", "first"] = "other"
    starts: int = 2
    says: str = ""
    code: int = 42
    bound: float = 0.0
    damage: Literal["", "torn", "flipped"] = ""
    keeps: bool = False
    since_line: bool = False


# jax looks for a SIGTERM once a second, in which tiny steps would be over.
_NOTICED = "slow@{{stage}}:{}:{{process}}"
_PREEMPTED = "sigterm@{stage}:3:{process}," + _NOTICED.format(4)
_OURS = r"error: process {process} \("
_SCENES = (
    Scene("kill", "a process is killed", "resumed", "sigkill@{stage}:{step}:{process}"),
    Scene("kill-first", "process 0 is killed", "resumed", "sigkill@{stage}:{step}:0", who="first"),
    Scene("kill-save", "killed while a step is saved", "resumed", "sigkill@save:{saved}:{process}"),
    Scene("kill-commit", "killed before a step has its name", "resumed", "sigkill@commit:{saved}:0", who="first"),
    Scene("preempt", "SIGTERM to one process", "resumed", _PREEMPTED, says="by a preemption",
          keeps=True),
    Scene("preempt-save", "SIGTERM while a step is saved", "resumed", "sigterm@save:2:{process}," + _NOTICED.format(3)),
    Scene("torn", "a file of the newest step is cut", "resumed", _PREEMPTED,
          damage="torn", says="set aside as"),
    Scene("flipped", "a bit of the newest step is flipped", "resumed",
          _PREEMPTED, damage="flipped", says="set aside as"),
    Scene("full-disk", "no space left for a step", "resumed", "full@commit:{saved}:0", who="first",
          says="No space left"),
    Scene("slow-disk", "a step takes 5 s more to write", "resumed", "slow@commit:{saved}:0", who="first", starts=1),
    Scene("late", "a node starts 5 s after the others", "resumed", node="late", starts=1),
    Scene("stop", "SIGSTOP: a frozen process", "verdict", "sigstop@{stage}:{step}:{process}",
          says=_OURS + r".*says nothing since \d+ s \(stopped by a signal\)", bound=HEARTBEAT + 2),
    Scene("hang", "a collective that all but one enter", "verdict", "hang@{stage}:{step}:{process}",
          says=_OURS + r".* host code, for \d+ s; at faults\.py", bound=STEP + _LAST_WORD),
    Scene("lock", "a lock in the input pipeline", "verdict", "lock@data:4:{process}",
          says=_OURS + r".*, reading data, for", bound=STEP + _LAST_WORD, since_line=True),
    Scene("gil", "Python's lock is never given back", "verdict", "lock_gil@{stage}:{step}:{process}",
          says=_OURS + ".*lets none of its threads run", bound=STEP + _LAST_WORD),
    Scene("missing", "a node does not come", "verdict", node="absent", verb="doctor",
          says="without process {process}", bound=_LOOK + JOIN),
    Scene("coordinator", "a node cannot reach process 0", "verdict", node="astray", verb="doctor",
          says="without process {process}", bound=_LOOK + JOIN),
    Scene("version", "another version of jax on a node", "verdict", node="version", verb="doctor",
          says=r"FAIL alike: +version of jax is \S+ in process 0, 0\.0\.1 in process {process}", code=2, bound=_LOOK),
    Scene("code", "other code on a node", "verdict", node="code", verb="doctor",
          says=r"FAIL alike: +code is \S+ in process 0, \S+ in process {process}", code=2, bound=_LOOK),
    Scene("data", "a data file that a node lacks", "verdict", node="data", verb="doctor",
          says=r"FAIL data: +process {process}: \./data/\S+ is not there", code=3, bound=_LOOK),
    # These are played when they are asked for.
    Scene("segfault", "a library crashes", "resumed", "sigsegv@{stage}:{step}:{process}"),
    Scene("spin", "a loop without end in Python", "verdict", "spin@{stage}:{step}:{process}",
          says=_OURS + r".* host code, for \d+ s; at faults\.py", bound=STEP + _LAST_WORD),
    Scene("configuration", "another configuration on a node", "verdict", node="configuration", verb="doctor",
          says=r"FAIL alike: +configuration is \S+ in process 0, \S+ in process {process}", code=2, bound=_LOOK),
    Scene("twice", "two nodes with one number", "verdict", node="twice", verb="doctor",
          says="--process-id: expected .* twice|expected a free port", code=2, bound=_LOOK),
)  # fmt: skip
SCENES = {scene.name: scene for scene in _SCENES}
USUAL = tuple(SCENES)[:20]


@dataclass(frozen=True)
class Cast:
    """A scene with the process that it happens to and the step; `seed` and the name alone decide them."""

    scene: Scene
    process: int
    step: int
    stage: str

    def filled(self, text: str) -> str:
        """A text of the scene, with what stands for process, step and stage."""
        facts = {"process": self.process, "step": self.step, "stage": self.stage, "saved": _SAVED}
        return re.sub(r"\{(process|step|stage|saved)\}", lambda found: str(facts[found[1]]), text)


def cast(scene: Scene, seed: int, nodes: int, stage: str) -> Cast:
    """Who is hit, and when."""
    draw = random.Random(f"{scene.name} {seed}")
    process = 0 if scene.who == "first" else draw.randrange(1, nodes)
    return Cast(scene, process, draw.choice(_STEPS), stage)


def chosen(words: str | None) -> list[Scene]:
    """The scenes that `a,b` names, `all` of them, or the usual twenty. Raises ConfigError for an unknown name."""
    if words is None:
        return [SCENES[name] for name in USUAL]
    names = list(SCENES) if words == "all" else [word.strip() for word in words.split(",") if word.strip()]
    for name in names:
        if name not in SCENES:
            near = difflib.get_close_matches(name, SCENES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SCENES)}"
            raise ConfigError(f"--faults: expected names of faults, got {name!r}; {hint}")
    return [SCENES[name] for name in dict.fromkeys(names)]


def says(cast: Cast, lines: Sequence[str]) -> str | None:
    """The first of the lines that says what the scene is to say."""
    if not cast.scene.says:
        return None
    return next((line for line in lines if re.search(cast.filled(cast.scene.says), line)), None)


def since(line: str | None) -> float | None:
    """Seconds that a line of a hang speaks of."""
    found = re.search(r" (?:since|for) (\d+) s\b", line or "")
    return float(found[1]) if found else None
