"""Keys that have another place than they had: a file or an override with the old one means the new one."""

from typing import Any

from rlhfjax.config.overrides import apply_override
from rlhfjax.config.reading import Path, dotted
from rlhfjax.errors import ConfigError

MOVED: dict[Path, Path] = {
    ("stages", "ppo", "clip"): ("stages", "ppo", "loss", "clip"),
    ("stages", "ppo", "entropy_coef"): ("stages", "ppo", "loss", "entropy_coef"),
}


def place_of(key: Path) -> Path:
    """Where a key belongs now."""
    return MOVED.get(key, key)


def moved(tree: Any) -> Any:
    """The tree of a configuration with every key in its place. Raises ConfigError where both places are given."""
    for old, new in MOVED.items():
        section = _at(tree, old[:-1])
        if not isinstance(section, dict) or old[-1] not in section:
            continue
        if _at(tree, new) is not None:
            raise ConfigError(f"{dotted(old)} is {dotted(new)} now, and both are given; remove {dotted(old)}")
        rest = {name: value for name, value in section.items() if name != old[-1]}
        tree = apply_override(apply_override(tree, old[:-1], rest), new, section[old[-1]])
    return tree


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
