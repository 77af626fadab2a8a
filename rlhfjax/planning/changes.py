"""A recipe with some of its keys changed, as the overrides of a command line change them."""

from pydantic import ValidationError

from rlhfjax.config import Run, resolved
from rlhfjax.config.overrides import apply_override, parse_override
from rlhfjax.errors import ConfigError

Overrides = tuple[str, ...]


def changed_by(run: Run, overrides: Overrides) -> Run:
    """A recipe with values at dotted keys. Raises ConfigError for what makes no recipe."""
    tree = resolved(run)
    for path, value in map(parse_override, overrides):
        tree = apply_override(tree, path, value)
    try:
        return Run.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{' '.join(overrides)}: {error.errors()[0]['msg']}") from None
