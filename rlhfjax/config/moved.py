"""Keys that have another place than they had, or than they are read at: one of them means the other."""

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
    if len(key) > 2 and (key[0], key[2]) == ("stages", "mesh"):
        return ("mesh", "stages", key[1], *key[3:])
    return MOVED.get(key, key)


def moved(tree: Any) -> Any:
    """The tree of a configuration with every key in its place. Raises ConfigError where both places are given."""
    stages = _at(tree, ("stages",))
    meshes = {
        ("stages", str(name), "mesh"): ("mesh", "stages", str(name))
        for name in (stages if isinstance(stages, dict) else ())
    }
    for old, new in (MOVED | meshes).items():
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
