"""The movies benchmark: real human ratings of review snippets as every stage of the recipe needs them.

A batch of 30 consecutive snippets was rated by one group of people, so a column of ratings inside a batch is one
anonymous labeler who ranks texts, as in Ouyang et al. 2022, section 3.4. Batches, never rows, are split, and every
fifth column is a held-out labeler. All choices are functions of names and numbers hashed with SHA-256: no generator
state, the same bytes on every machine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from rlhfjax.data.sets.benchmark import Benchmark, Records, Tables, configs_of
from rlhfjax.data.sets.movie_archives import CHAT_WHEEL, ELSEWHERE, RATINGS_SDIST, read_conversations, read_snippets
from rlhfjax.data.sets.movie_chat import split_conversations
from rlhfjax.data.sets.movie_tasks import (
    Ratings,
    across_rankings,
    demonstration,
    elsewhere_rankings,
    labeler_rankings,
    rated_texts,
)
from rlhfjax.fetch import PinnedFile

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


class Movies(Benchmark):
    """TFDS builder `movies`, one config per dataset."""

    name = "movies"
    VERSION: ClassVar = tfds.core.Version("1.1.0")
    KINDS: ClassVar = KINDS
    BUILDER_CONFIGS: ClassVar = configs_of(KINDS)

    @classmethod
    def sources(cls) -> tuple[PinnedFile, ...]:
        """The ratings and the conversations."""
        return RATINGS_SDIST, CHAT_WHEEL

    @classmethod
    def compute(cls, *paths: Path) -> Tables:
        """The tables of the two archives."""
        return movie_tables(*paths)


def movie_tables(ratings_sdist: Path, chat_wheel: Path) -> Tables:
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
            "judge": lambda: rated_texts(ratings.batches("judge")),
            "rm": lambda: rated_texts(fit),
            "rm_validation": lambda: rated_texts(check),
            "test": lambda: rated_texts(held_out_batches),
        },
    }
