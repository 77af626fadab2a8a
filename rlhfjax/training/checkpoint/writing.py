"""How Orbax writes a step: as it lies in memory, in files of a size that few of them take little memory."""

import logging
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp

from rlhfjax.plain_json import plain
from rlhfjax.training.checkpoint.chunks import chunks_of

_FILE = 1 << 26  # bytes; a file is in memory until it is written


def saver() -> ocp.AsyncCheckpointer:
    """What writes steps. Weights and moments are noise, of which compression takes an eighth and much time."""
    items = ocp.PyTreeCheckpointHandler(use_compression=False)
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add(None, ocp.args.PyTreeSave, items)
    handlers.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    logging.getLogger("absl").addFilter(_not_about_small_chunks)
    immediately = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(handler_registry=handlers), async_options=immediately)


def arguments(items: Mapping[str, Any], meta: Mapping[str, Any]) -> ocp.args.Composite:
    """What to save: items and what the step says of itself."""
    args: dict[str, Any] = {
        name: ocp.args.PyTreeSave(tree, save_args=chunks_of(tree), ocdbt_target_data_file_size=_FILE)
        for name, tree in items.items()
    }
    return ocp.args.Composite(**args, meta=ocp.args.JsonSave(plain(dict(meta))))


def by_item(digests: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Digests by item and path, from those of all items together."""
    found: dict[str, dict[str, str]] = {}
    for name, digest in digests.items():
        item, _, path = name.partition("/")
        found.setdefault(item, {})[path] = digest
    return found


def _not_about_small_chunks(record: logging.LogRecord) -> bool:
    return "target_byte_size too small" not in record.getMessage()
