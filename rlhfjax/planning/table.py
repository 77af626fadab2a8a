"""A plan as people read it."""

from collections.abc import Iterator, Mapping
from typing import Any

from rlhfjax.planning.chips import GIB

_COLUMNS = ("program", "needs", "beside", "free", "FLOPs", "moved", "sent", "expected", "least – most", "use")


def table(plan: Mapping[str, Any]) -> str:
    """The verdict, a line for each program, the whole of the recipe, and what to change."""
    return "\n".join(_lines(plan))


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    chip, steps = plan["chip"], plan["steps"]
    yield (
        f"{plan['name']} on {plan['topology']}: {plan['devices']:,} devices of {chip['memory'] / GIB:.1f} GiB, "
        f"{plan['hosts']:,} {'host' if plan['hosts'] == 1 else 'hosts'}"
    )
    yield ""
    rows = [_COLUMNS, *(_row(name, step) for name, step in steps.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for name, *cells in rows:
        shown = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        yield "  ".join(shown).rstrip()
    yield ""
    yield from _links(steps)
    if "stages" in plan:
        yield from _whole(plan)
    yield from (f"warning: {line}" for line in plan["warnings"])
    yield "fits" if plan["fits"] else "does not fit"
    yield from (f"  {reason}" for reason in plan["reasons"])
    for remedy in plan["remedies"]:
        yield f"  change: {' '.join(remedy['overrides'])}  ({remedy['said']})"


def _row(name: str, step: Mapping[str, Any]) -> tuple[str, ...]:
    if "seconds" not in step:
        return (name, gib(step["peak"]) if "peak" in step else "–", *[""] * 8)
    seconds = step["seconds"]
    sent = sum(row["bytes"] for row in step["collectives"])
    return (
        name,
        gib(step["peak"]),
        gib(step["beside"]),
        f"{step['spare']:.0%}",
        f"{step['flops']:.2e}".replace("e+", "e"),
        gib(step["moved"]),
        gib(sent),
        duration(seconds["expected"]),
        f"{duration(seconds['least'])} – {duration(seconds['most'])}",
        f"{step['mfu']:.0%}" if step.get("model_flops") and step.get("mfu") else "",
    )


def _links(steps: Mapping[str, Any]) -> Iterator[str]:
    """The collectives of each program, the largest first, and its largest arguments and buffers."""
    for name, step in steps.items():
        if sent := [row for row in step.get("collectives", ()) if row["bytes"] >= 2**20][:4]:
            shown = "; ".join(
                f"{row['kind']} {gib(row['bytes'])} in {row['times']:,.0f} over {row['group']}" for row in sent
            )
            between = f"; between slices {gib(step['between'])}" if step["between"] else ""
            yield f"{name} sends: {shown}{between}"
        if not step["fits"] and "leaves" in step:
            yield from (f"  argument {gib(size)} {what} {shape}" for size, shape, what in step["leaves"][:4])
            yield from (f"  buffer {gib(size)} {shape} {what}" for size, shape, what in step["buffers"][:4])


def _whole(plan: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    for stage, found in plan["stages"].items():
        steps = "steps unknown (--assume rows)" if found["steps"] is None else f"{found['steps']:,} steps"
        one, whole = found["step_seconds"], found["seconds"]
        yield (
            f"{stage}: {steps} of {duration(one['expected'])}, {span(whole)}; peak {gib(found['peak'])}, "
            f"holds {gib(found['held'])} a device, saves {gib(found['saved'])}"
        )
    hours = plan["device_hours"]
    yield (
        f"all: {span(plan['seconds'])}, {hours['expected']:,.0f} device-hours "
        f"({hours['least']:,.0f} – {hours['most']:,.0f})"
    )
    save, host, costs = plan["save"], plan["host_memory"], plan["costs"]
    yield (
        f"a save: {gib(save['bytes'])}, {duration(save['seconds'])} on the disks, training waits "
        f"{duration(save['blocks_s'])}; a host needs {gib(host['bytes'])} of {gib(host['of'])}"
    )
    yield (
        f"device-hours lost at most: to a preemption {costs['preemption_device_hours']:,.1f}, to a failure "
        f"{costs['failure_device_hours']:,.1f}, to a hang {costs['hang_device_hours']:,.1f}; grace "
        f"{plan['needs']['grace_s']:,} s"
    )


def gib(size: float) -> str:
    """Bytes in binary units."""
    for unit, scale in (("TiB", 2**40), ("GiB", GIB), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 2**10:.1f} KiB" if size else "0"


def duration(seconds: float) -> str:
    """Seconds in the unit that one would say."""
    for unit, scale in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def span(seconds: Mapping[str, float]) -> str:
    return f"{duration(seconds['expected'])} ({duration(seconds['least'])} – {duration(seconds['most'])})"
