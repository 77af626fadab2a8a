"""What a process keeps of a step: copies on the host of what its devices hold, and of what another process's do."""

from collections.abc import Mapping
from typing import Any

import jax

from rlhfjax.training.local.file import Block
from rlhfjax.training.local.layout import Layout, travelling
from rlhfjax.training.local.moving import grouped, moved, on_the_host, pairs_of


def distinct(leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Each array once, and the names under which others are the same one."""
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(leaf), name) for name, leaf in leaves.items()}
    once = {name: leaf for name, leaf in leaves.items() if same[name] == name}
    return once, {name: other for name, other in same.items() if name != other}


def blocks_of(layout: Layout, leaves: Mapping[str, Any], shift: int) -> list[Block]:
    """On the host, what this process holds, and what it keeps for the one `shift` places before it."""
    own = jax.process_index()
    for leaf in leaves.values():
        for shard in leaf.addressable_shards:
            shard.data.copy_to_host_async()
    found = {}
    for name, leaf in leaves.items():
        parts = {shard.device: shard.data for shard in leaf.addressable_shards}
        for device, start in zip(layout.of(own), layout.starts(name, own), strict=True):
            if (name, start) not in found:
                found[name, start] = on_the_host(parts[device])
    if shift:
        count = len(layout.processes)
        before = (own - shift) % count
        pairs = pairs_of(layout, {process: (process + shift) % count for process in layout.processes})
        for group in grouped(layout, travelling(layout, shift)):
            given = [_parts(layout, leaves[name]) for name in group]
            for name, parts in zip(group, moved(layout.line, pairs, given), strict=True):
                for start, part in zip(layout.starts(name, before), parts, strict=True):
                    if (name, start) not in found:
                        found[name, start] = on_the_host(part)
    return [Block(name, start, data) for (name, start), data in found.items()]


def _parts(layout: Layout, leaf: jax.Array) -> list[jax.Array]:
    """Those of this process's devices, in the order of the line."""
    parts = {shard.device: shard.data for shard in leaf.addressable_shards}
    return [parts[device] for device in layout.of(jax.process_index())]
