"""`rlhfjax verify`: whether what lies on a disk is what was written there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from rlhfjax import stores
from rlhfjax.cli.datasets import DataDir
from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.integrity import MANIFEST, check
from rlhfjax.places import expanded
from rlhfjax.terminal import printable, say

_SIGNS = ("ledger.jsonl", "*/ledger.jsonl", "complete.json", "*/complete.json")  # of what stages leave behind

NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Read checkpoints and data without comparing them with their digests.")
]


def verify(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH…", help="Checkpoints, stages, runs, exports, datasets or their names.")
    ],
    data_dir: DataDir = None,
) -> None:
    """Compare files with the digests that were written beside them. Exit code 4 names each that differs.

    Of runs and stages the ledgers are checked, too: that every row of an epoch was read once, and at which step.

    \b
    Example:
      rlhfjax verify runs/quickstart
    """
    bad = 0
    for path in paths:
        found = list(_directories(path, data_dir))
        ledgers = _ledgers(expanded(stores.here(path)))
        bad += sum(map(_is_wrong, ledgers))
        if not found and not ledgers:
            raise ConfigError(
                f"{path}: expected a checkpoint, stage, run, export or prepared dataset, got nothing with a "
                f"{MANIFEST}; what an older version wrote has none"
            )
        bad += sum(_differences(directory) for directory in found)
    if bad:
        raise IntegrityError(f"{bad} {'file is' if bad == 1 else 'files are'} not what was written, named above")


def _differences(directory: Path) -> int:
    """Say what was found in one directory; how many of its files differ."""
    try:
        stores.need(directory)
        checked = check(directory)
    except IntegrityError as error:
        typer.echo(printable(stores.named(str(error))))
        return 1
    for difference in checked.differences:
        typer.echo(printable(stores.named(f"{directory}/{difference}")))
    if not checked.differences:
        told = f"{directory}: {checked.files} files, {checked.bytes:,} bytes, all as written"
        typer.echo(printable(stores.named(told)))
    return len(checked.differences)


def _ledgers(root: Path) -> list[Path]:
    """The stages whose ledgers there are to check."""
    if not root.is_dir() or not any(any(root.glob(name)) for name in _SIGNS):
        return []
    from rlhfjax.runs.ledger import stages_with_ledgers

    return stages_with_ledgers(root)


def _is_wrong(stage: Path) -> bool:
    """Say what a ledger says, or what is wrong with it."""
    from rlhfjax.runs.ledger import require_right

    try:
        typer.echo(printable(stores.named(require_right(stage))))
    except IntegrityError as error:
        typer.echo(printable(stores.named(str(error))))
        return True
    return False


def _directories(path: str, data_dir: Path | None) -> Iterator[Path]:
    """What there is to compare: a directory itself, or those below it; a step without a manifest among them."""
    root = expanded(stores.here(path))
    if not root.is_dir():
        yield from _data_set(path, data_dir)
        return
    if (root / MANIFEST).exists():
        yield root
        return
    for step in sorted(_steps(root)):
        if (step / MANIFEST).exists() or not _older(step):
            yield step
        else:
            say(f"{step}: no digest, since an older version wrote it")
    steps = list(_steps(root))
    yield from sorted(
        folder.parent
        for folder in root.rglob(MANIFEST)
        if not any(folder.is_relative_to(step) for step in steps)
        and not any(part.endswith(".damaged") for part in folder.parts)  # set aside by a run that went on without it
        and not any((above / MANIFEST).exists() for above in folder.parent.parents if above.is_relative_to(root))
    )


def _steps(root: Path) -> Iterator[Path]:
    if root.parent.name == "checkpoints" and root.name.isdigit():
        yield root
    for folder in root.rglob("checkpoints") if root.name != "checkpoints" else [root]:
        yield from (step for step in folder.iterdir() if step.name.isdigit() and step.is_dir())


def _older(step: Path) -> bool:
    try:
        return int(json.loads((step / "meta" / "metadata").read_text(encoding="utf-8")).get("format", 1)) == 1
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _data_set(name: str, data_dir: Path | None) -> Iterator[Path]:
    from rlhfjax.data.datasets import default_data_dir

    where = expanded(data_dir or default_data_dir())
    plain, _, version = name.partition(":")
    if not plain or plain.startswith(("/", ".")) or ".." in Path(plain).parts:
        return
    pattern = f"{plain}/{version}" if version else plain
    if (where / pattern).is_dir():
        yield from sorted(file.parent for file in (where / pattern).rglob(MANIFEST))
