"""Conditions of two attempts, compared: configuration, code, packages, flags, machine, devices, target and data."""

from collections.abc import Iterator, Mapping
from typing import Any

from rlhfjax.rewards import digests_of

_SHOWN_FILES = 5
_NONE = "nothing"
_FACTS_OF_DEVICES = ("platform", "capability")  # of a target; what else it has are sizes


def other_conditions(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each thing that may change a number and is not what it was; `then` and `now` are manifest lines."""
    return [
        *_code(then.get("code", {}), now["code"]),
        *_each("package", then.get("packages", {}), now["packages"]),
        *_value("Python", _minor(then.get("python")), _minor(now["python"])),
        *_each("flag", then.get("flags", {}), now["flags"]),
        *_each("setting", then.get("settings", {}), now["settings"]),
        *_devices(then, now),
        *_target(then.get("target", {}), now.get("target", {})),
        *(_each("chat settings of", then["chat"], now["chat"]) if "chat" in then and "chat" in now else ()),
        *_digests("data", then.get("data", {}), now.get("data", {}), now.get("changed_rows", {})),
        *_digests("", then.get("started_from", {}), now.get("started_from", {})),
        *_code_of_rewards(then, now),
    ]


def changed_keys(then: Any, now: Any, prefix: str = "") -> Iterator[str]:
    """`key: expected A, got B` for the keys of two resolved configurations that differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*then, *now]):
            yield from changed_keys(then.get(key), now.get(key), f"{prefix}{key}.")
    elif then != now:
        yield f"{prefix.rstrip('.')}: expected {then!r}, got {now!r}"


def _code(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if then.get("sha256") == now["sha256"]:
        return
    before, after = then.get("files", {}), now["files"]
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    more = f" and {len(changed) - _SHOWN_FILES} more" if len(changed) > _SHOWN_FILES else ""
    yield f"code of rlhfjax: {', '.join(changed[:_SHOWN_FILES])}{more} changed"


def _code_of_rewards(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for stage, facts in now.get("rewards", {}).items():
        yield from _digests(
            f"rewards of {stage}:", digests_of(then.get("rewards", {}).get(stage, {})), digests_of(facts)
        )


def _devices(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old, new = then.get("devices", []), now["devices"]
    yield from _value("devices", f"{len(old)} x {_kinds(old)}", f"{len(new)} x {_kinds(new)}")
    yield from _value("processes", (then.get("process") or [0, 1])[1], now["process"][1])
    if "mesh" in then and "mesh" in now:
        yield from _value("mesh", _axes(then["mesh"]), _axes(now["mesh"]))
        yield from _value("order of devices in the mesh", then["mesh"]["device_order"], now["mesh"]["device_order"])
        own = [facts.get("meshes", {}) for facts in (then, now)]
        for stage in sorted(own[0].keys() | own[1].keys()):
            of_stage = [facts.get(stage, facts_of["mesh"]) for facts, facts_of in zip(own, (then, now), strict=True)]
            yield from _value(f"mesh of {stage}", *map(_axes, of_stage))
            yield from _value(
                f"order of devices in the mesh of {stage}", *(facts["device_order"] for facts in of_stage)
            )
    machine, here = then.get("machine", {}), now["machine"]
    if now["backend"] == "cpu":  # XLA compiles for this processor, and shares sums out among its cores
        for name in ("architecture", "processor", "cores"):
            yield from _value(name, machine.get(name), here.get(name))
    else:
        yield from _value("platform", then.get("platform_version"), now["platform_version"])
        yield from _value("NVIDIA driver", machine.get("nvidia_driver"), here.get("nvidia_driver"))


def _target(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Platform and sizes that programs were built for, of which older versions noted none."""
    for name in (name for name in now if name in then):
        for line in _value(f"target {name}", then[name], now[name]):
            yield line if name in _FACTS_OF_DEVICES else f"{line}; reliability.sizes.{name} sets it"


def _each(what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(then.keys() | now.keys()):
        yield from _value(f"{what} {name}", then.get(name), now.get(name))


def _digests(
    what: str, then: Mapping[str, str], now: Mapping[str, str], changes: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Of what both know: a source that cannot be read is said by whoever tried, one that was added by the keys.

    `changes` say of some of them what is another.
    """
    for name in sorted(then.keys() & now.keys()):
        if then[name] != now[name]:
            said = f": {changes[name]}" if changes and name in changes else ""
            yield f"{what} {name}: expected SHA-256 {then[name][:12]}…, got {now[name][:12]}…{said}".strip()


def _value(name: str, then: Any, now: Any) -> Iterator[str]:
    if then != now:
        expected, got = (_NONE if value is None else value for value in (then, now))
        yield f"{name}: expected {expected}, got {got}"


def _minor(version: str | None) -> str | None:
    return version and ".".join(version.split(".")[:2])


def _kinds(devices: list[str]) -> str:
    return ", ".join(sorted(set(devices))) or _NONE


def _axes(mesh: Mapping[str, Any]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh["shape"].items())
