"""A batch token by token: masks, positions, segments, and the place where the score is read."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from rlhfjax.config import Run
from rlhfjax.data.pipeline import Reader
from rlhfjax.errors import ConfigError
from rlhfjax.runs.checks import make_jobs
from rlhfjax.runs.manifest import read_attempts
from rlhfjax.stages.batches import open_batches
from rlhfjax.stages.chat_settings import date_of
from rlhfjax.stages.tokenizer import given_tokenizer
from rlhfjax.types import PromptBatch, RankedBatch, TokenBatch


def inspect_batch(
    run: Run, stage: str, run_dir: Path, index: int = 0, report: Callable[[str], None] = lambda text: None
) -> Iterator[str]:
    """Lines of text that show row `index` of the stage's data in training order; what is left out is reported.

    Raises ConfigError for a stage without batches, or when there is no tokenizer: none trained yet, and none given.
    """
    if stage in ("tokenizer",) or getattr(run.stages, stage, None) is None:
        raise ConfigError(f"data inspect: expected a stage of {run.name} that reads batches, got {stage!r}")
    made = (run_dir / "tokenizer" / "complete.json").exists()
    given = None if made else given_tokenizer(run)
    if not made and given is None:
        raise ConfigError(
            f"data inspect: {run_dir} has no tokenizer yet; `rlhfjax run CONFIG --only tokenizer` makes it"
        )
    date = date_of(run, read_attempts(run_dir))
    job = make_jobs(run, run_dir, [stage], report, date)[0]
    if given:
        job.shared["reader"] = Reader(given, job.data_dir, run.seed, report)
    batches = open_batches(job)["train"]
    step, row = divmod(index, batches.size)
    yield f"{stage}: {batches.rows} rows an epoch, batches of {batches.size}; row {index} is row {row} of step {step}"
    if getattr(job.tokenizer, "chat_template", None):
        yield f"chat template: date {date}, variables {dict(job.tokenizer.chat.kwargs)}"
    item = jax.tree.map(lambda x: x[row], batches[step])
    show = {TokenBatch: _packed, RankedBatch: _ranked, PromptBatch: _prompt}[type(item)]
    yield from show(job.tokenizer, item)


def _packed(tokenizer: Any, item: TokenBatch) -> Iterator[str]:
    yield f"{'slot':>5} {'segment':>7} {'position':>8} {'target':>6} {'id':>7}  piece"
    pieces = tokenizer.pieces(item.tokens.tolist())
    for i, piece in enumerate(pieces):
        target = "yes" if item.loss_mask[i] and item.positions[i] > 0 else "-"
        yield f"{i:>5} {item.segments[i]:>7} {item.positions[i]:>8} {target:>6} {item.tokens[i]:>7}  {piece}"


def _ranked(tokenizer: Any, item: RankedBatch) -> Iterator[str]:
    for candidate in range(len(item.ranks)):
        if not item.mask[candidate]:
            continue
        ids = item.tokens[candidate][item.token_mask[candidate]].tolist()
        pieces = tokenizer.pieces(ids)
        yield f"candidate {candidate}, rank {item.ranks[candidate]}, {len(ids)} tokens, score read at {pieces[-1]}"
        yield "  " + " ".join(pieces)


def _prompt(tokenizer: Any, item: PromptBatch) -> Iterator[str]:
    ids = item.tokens[item.mask].tolist()
    yield f"{len(item.tokens) - len(ids)} slots of padding on the left, then {len(ids)} tokens"
    yield "  " + " ".join(tokenizer.pieces(ids))
