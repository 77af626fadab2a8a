"""A rehearsal from a configuration to a table: what is made tiny, what is played, and how each scene ended."""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhfjax.config import Run
from rlhfjax.config.recipe import FACTS, TOKENIZER, stages_of
from rlhfjax.errors import ConfigError, RlhfjaxError, Stopped
from rlhfjax.files import write_json
from rlhfjax.rehearsal.scenes import Cast, Scene, cast, says, since
from rlhfjax.rehearsal.shrinking import Made, devices_per_node, tiny
from rlhfjax.rehearsal.theatre import DATA, FIRST, PLAYED, Played, Theatre, opened, write_launch
from rlhfjax.rehearsal.tiny_data import said, write_data
from rlhfjax.runs.comparison import first_differences

REPORT = "rehearsal.json"


@dataclass(frozen=True)
class Row:
    """How a scene ended; `after_s`, of a verdict, is from the fault to the end of all processes that it did not hit."""

    name: str
    fault: str
    expected: str
    happened: str
    well: bool
    starts: int
    code: int
    seconds: float
    after_s: float | None


@dataclass(frozen=True)
class Wanted:
    """What is asked: nodes, devices of each (None: the fewest), the stage that is hit (None: the first that trains)."""

    nodes: int
    devices: int | None = None
    stage: str | None = None
    seed: int = 0
    side: int = 2


def rehearse(
    run: Run,
    family: str,
    data_dir: Path,
    folder: Path,
    wanted: Wanted,
    scenes: Sequence[Scene],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Play the run without faults and then each scene in `folder`; the rows, also in its rehearsal.json.

    Raises ConfigError for what cannot be rehearsed, Stopped where the run without faults does not end well.
    """
    stage = stage_of(run, wanted.stage)
    each = devices_per_node(run, wanted.nodes, wanted.devices)
    empty(folder)
    (folder / DATA).mkdir()
    files, absent = write_data(run, folder / DATA, data_dir)
    if absent:
        say(said(absent))
    sources = {kind: f"./{DATA}/{path.name}" for kind, path in files.items()}
    made = tiny(run, wanted.nodes, each, Made(family, sources, str(folder / "prepared"), not absent))
    write_launch(folder, made, wanted.nodes, each)
    say(f"{wanted.nodes} processes x {each} devices of this CPU, {len(scenes)} faults in {stage}; in {folder}")
    began = time.monotonic()
    with opened(folder, wanted.nodes, each, stage) as theatre:
        clean = theatre.play("clean")
        if clean.code:
            lines = [line for line in clean.lines if "error" in line or "FAIL" in line]
            raise Stopped(
                f"the run without faults ended with {clean.code}: {_short(lines)}; see {folder / PLAYED / 'clean'}"
            )
        say(f"clean: done in {clean.seconds:.0f} s")
        rows = _play_all(theatre, scenes, wanted, clean.run_dir, say)
    result = {"name": run.name, "nodes": wanted.nodes, "devices": each, "stage": stage, "seed": wanted.seed,
              "clean_s": round(clean.seconds, 1), "seconds": round(time.monotonic() - began, 1),
              "well": all(row.well for row in rows), "rows": [asdict(row) for row in rows]}  # fmt: skip
    write_json(folder / REPORT, result)
    return result


def stage_of(run: Run, given: str | None) -> str:
    """The stage that is hit: the one that was asked for, or the first that trains. Raises ConfigError."""
    there = [name for name in stages_of(run) if name != TOKENIZER and not FACTS[name].measures]
    if given is not None and given not in there:
        raise ConfigError(f"--stage: expected one that trains, {', '.join(there)}, got {given!r}")
    if not there:
        raise ConfigError(f"{run.name}: expected a stage that trains, got none")
    return given or there[0]


def empty(folder: Path) -> None:
    """Make the folder, and empty it where a rehearsal was in it. Raises ConfigError where something else is."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT).exists():
        raise ConfigError(f"--dir {folder}: expected an empty directory, or one of an earlier rehearsal; give another")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        write_json(folder / REPORT, {"well": False, "rows": []})
    except OSError as error:
        raise ConfigError(f"--dir {folder}: cannot be written to: {error.strerror}; give another") from None


def _play_all(
    theatre: Theatre, scenes: Sequence[Scene], wanted: Wanted, clean: Path, say: Callable[[str], None]
) -> list[Row]:
    """Each scene, `side` at a time; those of a damaged step go on from where the one that keeps its state ended."""
    casts = [cast(scene, wanted.seed, wanted.nodes, theatre.stage) for scene in scenes]
    done, lock = 0, threading.Lock()

    def play(one: Cast) -> Row:
        nonlocal done
        first = theatre.folder / PLAYED / "preempt" / FIRST
        stopped = first if one.scene.damage and first.exists() else None
        row = judged(one, theatre.play(one.scene.name, one, clean, stopped), clean, theatre.stage)
        with lock:
            done += 1
            say(
                f"{done}/{len(casts)} {'ok  ' if row.well else 'FAIL'} {row.name}: {row.happened} ({row.seconds:.0f} s)"
            )
        return row

    early = [play(one) for one in casts if one.scene.keeps]
    pool = ThreadPoolExecutor(wanted.side)
    try:
        others = list(pool.map(play, [one for one in casts if not one.scene.keeps]))
    except BaseException:
        theatre.end()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    found = {row.name: row for row in (*early, *others)}
    return [found[scene.name] for scene in scenes]


def judged(one: Cast, played: Played, clean: Path, stage: str) -> Row:
    """Whether a scene ended as it is to end."""
    scene, wrong, after = one.scene, [], 0.0
    line = says(one, played.lines)
    if scene.says and line is None:
        wrong.append(f"nobody said so: {_short([line for line in played.lines if 'error' in line])}")
    if scene.ends == "resumed":
        expected = f"resumed, {scene.starts} starts, equal bits"
        differences = [] if played.code else first_differences(clean, played.run_dir, [stage])
        wrong += [f"exit code {played.code}"] if played.code else [f"other bits: {each}" for each in differences]
        wrong += [f"{played.starts} starts"] if played.starts != scene.starts else []
        happened = f"resumed, {played.starts} starts, equal bits"
    else:
        expected = f"exit code {scene.code} and a line within {scene.bound:.0f} s"
        after = played.after_s
        if scene.since_line and (spoken := since(line)) is not None:
            after = spoken + (played.left_s or 0.0)
        after = played.seconds if after is None else after
        wrong += [f"exit code {played.code}"] if played.code != scene.code else []
        wrong += [f"after {after:.0f} s"] if after > scene.bound else []
        happened = f"exit code {played.code} after {after:.0f} s: {_short([line or ''])}"
    if wrong:
        happened = "; ".join(wrong)
    fault = f"{scene.text}, process {one.process}"
    after_s = round(after, 1) if scene.ends == "verdict" else None
    seconds = round(played.seconds, 1)
    return Row(scene.name, fault, expected, happened, not wrong, played.starts, played.code, seconds, after_s)


def _short(lines: Sequence[str]) -> str:
    return (lines[0] if lines else "nothing")[:160]


def table(result: dict[str, Any]) -> str:
    """The rows as people read them."""
    columns = [("", "fault", "expected", "happened", "s")]
    for row in result["rows"]:
        mark = "ok" if row["well"] else "FAIL"
        columns.append(
            (mark, f"{row['name']}: {row['fault']}", row["expected"], row["happened"], f"{row['seconds']:.0f}")
        )
    widths = [max(len(row[column]) for row in columns) for column in range(3)]
    lines = []
    for *shown, happened, seconds in columns:
        cells = [cell.ljust(width) for cell, width in zip(shown, widths, strict=True)]
        lines.append("  ".join([*cells, seconds.rjust(4), happened]))
    well = sum(row["well"] for row in result["rows"])
    lines.append(f"{well} of {len(result['rows'])} as expected; {result['nodes']} processes, {result['seconds']:.0f} s")
    return "\n".join(line.rstrip() for line in lines)


def family_of(run: Run) -> str:
    """The family of the model; of a checkpoint that is not here, llama."""
    if not run.model.checkpoint:
        return run.model.family
    from rlhfjax.training.checkpoint import find_checkpoint, read_meta

    try:
        return str(read_meta(find_checkpoint(run.model.checkpoint))["model"].get("family", "llama"))
    except (RlhfjaxError, OSError, KeyError):
        return "llama"
