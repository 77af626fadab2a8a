"""Looks before a run whether this host and this configuration are fit for it, and whether all processes are alike."""

import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from rlhfjax import config as configuration
from rlhfjax import stores
from rlhfjax.config import Run, config_hash
from rlhfjax.config.recipe import NAMES, entries_of
from rlhfjax.errors import DataError
from rlhfjax.host import health
from rlhfjax.host.environment import package_versions
from rlhfjax.host.examination import Meeting, Told
from rlhfjax.host.health import FAIL, OK, WARN, Finding
from rlhfjax.host.rendezvous import Place
from rlhfjax.runs.code import package_digests

_DEVICES_S, _INPUTS_S = 8.0, 6.0  # seconds that devices and data may take
_SKEW_S = 1.0
_SHOWN = 4


def examine(run: Run | None, run_dir: Path | None, place: Place | None, wait: float, say: Callable[[str], None]) -> int:
    """Say a line for each check, of all processes at process 0; the exit code that comes of them.

    That is 0, or of what is wrong the highest: 2 (host, configuration), 3 (data), 4 (integrity). `wait` seconds are
    waited for the other processes. Raises Stopped for those that do not come, ConfigError where they do not fit.
    """
    several = place is not None and place.count > 1
    found, devices = findings(run, run_dir, place)
    own = Told([finding.told() for finding in found], facts(run, devices))
    if place is None or not several:
        return _said(found, say)
    meeting = Meeting(place, own, wait)
    if place.index:
        return meeting.heard()
    told = meeting.told
    table = merged({index: [Finding(**each) for each in one.findings] for index, one in told.items()})
    table += across({index: one.facts for index, one in told.items()})
    table.append(clocks({index: one.skew for index, one in told.items()}))
    table.append(Finding(OK, "coordinator", f"{place.coordinator}: {place.count} processes came to it"))
    if run is not None:
        table += fits(run, sum(int(one.facts["devices"]) for one in told.values()))
    code = _said(table, say)
    meeting.end({"code": code})
    return code


def facts(run: Run | None, devices: int) -> dict[str, str]:
    """What all processes must have alike (`host` and `devices` apart)."""
    told = {f"version of {name}": version for name, version in package_versions().items()}
    told |= {"code": package_digests()["sha256"][:12], "python": platform.python_version()}
    told |= {"host": platform.node(), "devices": str(devices)}
    return told | ({"configuration": config_hash(run)[:12]} if run else {})


def findings(run: Run | None, run_dir: Path | None, place: Place | None) -> tuple[list[Finding], int]:
    """The checks of this host, in seconds, and how many devices it has."""
    found = health.guarded("gpu", health.gpus)
    late = "is another process using them? end it, or look at the driver"
    found += (devices := health.within(_DEVICES_S, "devices", health.devices, late))
    count = 0 if devices[0].level == FAIL else health.device_count()
    places = {"temporary files": Path(tempfile.gettempdir())}
    if run_dir is not None:
        places = {"run directory": stores.place_of(run_dir)} | places
    if run is not None and run.checkpoints.local.dir:
        places |= {"local steps": Path(run.checkpoints.local.dir)}
    for name, where in places.items():
        found += health.guarded(name, lambda name=name, where=where: health.disk(name, where))
    found += health.guarded("limits", health.limits)
    found += health.proxies(os.environ, place is not None and place.count > 1)
    versions = package_versions()
    versions, code = package_versions(), package_digests()["sha256"][:12]
    found.append(Finding(OK, "software", f"rlhfjax {versions['rlhfjax']}, jax {versions['jax']}, code {code}"))
    if run is not None:
        found += health.within(_INPUTS_S, "inputs", lambda: inputs(run), "see whether its disk answers")
    if run is not None and (place is None or place.count == 1):
        found += fits(run, count)
    return found, count


def inputs(run: Run) -> Iterable[Finding]:
    """Data files and checkpoints that the configuration names."""
    sources = {entry.source for stage in NAMES for entry, _ in entries_of(run, stage)}
    files, read = sorted(source for source in sources if is_path(source)), True
    for source in files:
        if not os.access(source, os.R_OK):
            why = "cannot be read" if os.path.exists(source) else "is not there"
            text = f"{source} {why} (data of the configuration: put it there, or correct the path)"
            yield Finding(FAIL, "data", text, DataError.exit_code)
            read = False
    if read:
        yield Finding(OK, "data", f"{len(files)} files and folders, {len(sources) - len(files)} by name or address")
    if given := _checkpoints(run):
        yield Finding(OK, "checkpoints", f"{', '.join(given)} can be read")


def is_path(source: str) -> bool:
    """Whether a source is said as a path; a name of a dataset and an address of a store are not."""
    return not stores.is_url(source) and (source.startswith(("/", "./", "../", "~")) or os.path.exists(source))


def _checkpoints(run: Run) -> list[str]:
    """The keys of what the configuration starts from; raises what reading it would. jax is imported here."""
    if not (run.model.checkpoint or run.tokenizer.path or (run.stages.sft and run.stages.sft.reward_model)):
        return []
    from rlhfjax.runs.checks import given

    return list(given(run))


def fits(run: Run, devices: int) -> list[Finding]:
    """Whether the mesh fits so many devices."""

    def check() -> Iterable[Finding]:
        configuration.check(run, devices)
        yield Finding(OK, "mesh", f"fits {devices} devices")

    return health.guarded("mesh", check) if devices else []


def merged(found: Mapping[int, list[Finding]]) -> list[Finding]:
    """The checks of all processes: what is well once, as process 0 has it, what is not for each that has it."""
    names = dict.fromkeys(finding.name for each in found.values() for finding in each)
    table = []
    for name in names:
        of = [(index, each) for index, one in found.items() for each in one if each.name == name]
        bad: dict[Finding, list[int]] = {}
        for index, each in of:
            if each.level != OK:
                bad.setdefault(each, []).append(index)
        for each, indices in bad.items():
            table.append(replace(each, text=f"{_processes(indices)}: {each.text}"))
        if not bad:
            index, first = of[0]
            processes = len({index for index, _ in of})
            others = f" (process {index}; well in {processes})" if processes > 1 else ""
            table.append(replace(first, text=first.text + others))
    return table


def across(facts: Mapping[int, Mapping[str, str]]) -> list[Finding]:
    """Facts that processes have otherwise than process 0."""
    found = []
    for key in dict.fromkeys(key for told in facts.values() for key in told):
        if key in ("host", "devices"):
            continue
        ours = facts[0].get(key, "nothing")
        if others := [index for index, told in facts.items() if told.get(key, "nothing") != ours]:
            theirs = facts[others[0]].get(key, "nothing")
            text = f"{key} is {ours} in process 0, {theirs} in {_processes(others)} (install the same everywhere)"
            found.append(Finding(FAIL, "alike", text))
    hosts = len({told.get("host") for told in facts.values()})
    return found or [Finding(OK, "alike", f"{len(facts)} processes on {hosts} hosts have the same versions and code")]


def clocks(skews: Mapping[int, float]) -> Finding:
    """The clocks of the processes against that of process 0."""
    index = max(skews, key=lambda each: abs(skews[each]))
    text = f"at most {abs(skews[index]):.2f} s apart" if skews[index] else "alike"
    if abs(skews[index]) > _SKEW_S:
        return Finding(WARN, "clock", f"{text}: process {index} (let a time service set it)")
    return Finding(OK, "clock", text)


def _processes(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:_SHOWN])) + (" …" if len(indices) > _SHOWN else "")
    return f"process {shown}"


def _said(table: list[Finding], say: Callable[[str], None]) -> int:
    width = max(len(finding.name) for finding in table)
    for finding in table:
        say(f"{finding.level:<4} {finding.name + ':':<{width + 1}} {finding.text}")
    codes = [finding.code for finding in table if finding.level == FAIL]
    return max((code for code in codes if code in (2, 3, 4)), default=2 if codes else 0)
