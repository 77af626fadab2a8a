"""Preparing tokens: parts are handed to processes, and what earlier ones made is kept."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhfjax import errors
from rlhfjax.data.reading import RECOGNISE, Reading
from rlhfjax.data.tokens.folder import INDEX, begin, claimed, read_index, seal, token_folder, write_index
from rlhfjax.data.tokens.plan import Plan, Rows, plan_of
from rlhfjax.data.tokens.shards import Shard, made_already, make_shard
from rlhfjax.errors import DataError
from rlhfjax.integrity import MANIFEST
from rlhfjax.places import expanded
from rlhfjax.text.loading import AnyTokenizer

Report = Callable[[str], None]
_BOOT = """import json, sys
from pathlib import Path
sys.path[:] = json.loads(sys.argv[2])
from rlhfjax.data.tokens.worker import main
main(Path(sys.argv[1]))
"""
_TELL_SECONDS = 5.0


def prepare_tokens(
    source: str,
    rows: Rows,
    tokenizer: AnyTokenizer,
    data_dir: Path,
    *,
    split: str = "train",
    reading: Reading = RECOGNISE,
    to: Path | None = None,
    processes: int = 1,
    step: int | None = None,
    report: Report = lambda text: None,
) -> Path:
    """Write a source as rows of tokens, and return their folder: `to`, or one in the data directory.

    The folder holds the same whatever number of processes makes it. After a kill the same call goes on: shards that
    are finished are kept. `step` bytes of a file, or rows of a dataset, make a shard.

    Raises DataError for what is wrong in the source, naming the place, and for a folder that holds something else.
    """
    if token_folder(source, data_dir):
        raise DataError(f"{source}: expected records, got rows of tokens, which were made already")
    plan = plan_of(source, split, rows, tokenizer, data_dir, reading, step)
    folder = to or expanded(data_dir) / f"tokens_{rows.kind}_{plan.identity[:24]}"
    with claimed(folder):
        begin(folder, plan, tokenizer)
        if not (folder / MANIFEST).is_file():
            if not (folder / INDEX).is_file():
                write_index(folder, plan, _made(folder, plan, tokenizer, processes, report))
            seal(folder)
    return folder


def what_was_made(folder: Path) -> Iterator[str]:
    """In words: the rows, and what to do next."""
    index = read_index(folder)
    counts = index["counts"]
    yield from index["notes"]
    filled = f", {counts['tokens'] / (counts['rows'] * index['length']):.1%} full" if index["packed"] else ""
    yield (
        f"{counts['records']:,} {index['kind']} records: {counts['rows']:,} rows{filled}, {counts['tokens']:,} tokens, "
        f"{len(index['shards']):,} shards"
    )
    yield f"next: {{source: {folder}}} in a configuration"


def _made(
    folder: Path, plan: Plan, tokenizer: AnyTokenizer, processes: int, report: Callable[[str], None]
) -> list[Shard]:
    """All shards, in their order: those that are there, and the others made."""
    count = len(plan.parts)
    shards = {number: shard for number in range(count) if (shard := made_already(folder, number, count))}
    missing = [number for number in range(count) if number not in shards]
    if shards:
        report(f"{len(shards):,} of {count:,} shards are there already")
    several = min(processes, len(missing))
    made = _by_processes(folder, missing, several) if several > 1 else _here(folder, plan, tokenizer, missing)
    told = time.monotonic()
    for shard in made:
        shards[shard.number] = shard
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            report(f"{len(shards):,} of {count:,} shards")
    return [shards[number] for number in range(count)]


def _here(folder: Path, plan: Plan, tokenizer: AnyTokenizer, missing: list[int]) -> Iterator[Shard]:
    for number in missing:
        yield make_shard(folder, plan, tokenizer, number)


def _by_processes(folder: Path, missing: list[int], count: int) -> Iterator[Shard]:
    """Shards as they are finished, by `count` processes that take a part after the other."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in missing:
        waiting.put(number)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with _started(folder, count) as workers:
        for worker in workers:
            threading.Thread(target=_feed, args=(worker, waiting, answers), daemon=True).start()
        for _ in missing:
            answer = answers.get()
            if "error" in answer:
                raise getattr(errors, answer["error"])(answer["text"])
            yield Shard.from_json(answer["shard"])


def _feed(worker: subprocess.Popen[str], waiting: queue.SimpleQueue[int], answers: queue.SimpleQueue[Any]) -> None:
    """Hand parts to a process as long as there are any; what it answers goes on."""
    assert worker.stdin
    assert worker.stdout
    try:
        while True:
            number = waiting.get_nowait()
            worker.stdin.write(f"{number}\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                raise BrokenPipeError
            answers.put(json.loads(line))
    except queue.Empty:
        return
    except (OSError, ValueError):  # its end of the pipe is closed, or ours, where nobody waits any more
        code = worker.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        text = f"a process that made shards ended with {how}; run the same command again, which goes on"
        answers.put({"error": "DataError", "text": text})


@contextmanager
def _started(folder: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes, which end with this one, however it ends: nothing more can come to them then."""
    command = [sys.executable, "-P", "-c", _BOOT, str(folder), json.dumps(sys.path)]
    alone = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    workers = []
    try:
        for _ in range(count):
            workers.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone)
            )
        yield workers
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            with worker:
                pass
