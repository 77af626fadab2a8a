"""The time of a profiled step, operation by operation: a table from the trace that jax.profiler writes."""

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

KINDS = (  # the first pattern that an operation's name matches names its kind
    ("attention", r"fmha|flash|cudnn.*attn|attention|softmax"),
    ("matrix products", r"gemm|cublas|dot|matmul|nvjet|cutlass|conv"),
    ("copies", r"copy|memcpy|transpose|concatenate|memset"),
    ("gather and scatter", r"gather|scatter|dynamic"),
    ("reductions", r"reduce"),
    ("communication", r"all-reduce|all-gather|nccl|collective"),
)
CONTAINERS = r"ThunkExecutor|while|call\b|conditional"  # what holds other operations of the same lane


def seconds_by_operation(folder: Path) -> dict[str, float]:
    """Seconds of each operation on the device, or on XLA's threads where the host is the device."""
    files = sorted(folder.rglob("*.trace.json.gz"))
    events = [event for path in files for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    lanes = _lanes(events)
    total: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("ph") != "X" or re.match(CONTAINERS, event["name"]):
            continue
        if (event["pid"], event.get("tid")) in lanes:
            total[event["name"]] += event.get("dur", 0) * 1e-6
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _lanes(events: list[dict[str, Any]]) -> set[tuple[int, int]]:
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event["name"] == "thread_name":
            threads[(event["pid"], event["tid"])] = event["args"]["name"]
    devices = {pid for pid, name in processes.items() if "/device:" in name}
    if devices:  # lanes of streams hold kernels; others repeat them as steps, modules and scopes
        return {lane for lane, name in threads.items() if lane[0] in devices and "stream" in name.lower()}
    return {lane for lane, name in threads.items() if re.search("xla|eigen|pjrt", name.lower())}


def kind_of(operation: str) -> str:
    """A coarse name for what an operation does."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, operation.lower())), "elementwise and other")


def split(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of each kind of operation, longest first."""
    kinds: dict[str, float] = defaultdict(float)
    for name, value in seconds.items():
        kinds[kind_of(name)] += value
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))
