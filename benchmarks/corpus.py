"""A corpus that no process holds: prepared by two processes and killed on the way, then opened by one, two and four.

    JAX_PLATFORMS=cpu python -m benchmarks.corpus [--documents 10000000] [--pack 2048] [--json FILE]

Writes short synthetic documents, makes rows of tokens of them with `rlhfjax data prepare`, killing it twice (SIGKILL),
and checks that shards which were finished are not made again. Then processes open the rows, and make batches by the
reader of the product, each its own rows. Told are the seconds until the first batch, and the memory of a process before
opening, after it, and after it has read; batches of one, two and four processes must be equal. Before that, each reads
rows by their number alone, which takes neither jax nor Grain. What it writes, some 120 bytes a document, is removed.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).with_name("results") / "corpus.json"
SIZE, STEPS = 64, (0, 1, 7, 10_001)  # rows of a batch, and the batches that are compared
READ = 50  # batches that every process reads while its memory is watched
KILLS = (0.25, 0.6)  # shares of the shards after which the preparation is killed
_RSS = ("VmRSS", "RssAnon")
_PSS = ("Pss",)  # what several processes have mapped counts in parts


def write_documents(path: Path, count: int) -> None:
    """Documents of a few words and a number that no other one has."""
    draw = random.Random(0)
    words = sorted(set(re.findall(r"[a-z]{2,}", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))))
    phrases = [" ".join(draw.choices(words, k=5)) for _ in range(20_000)]
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, count, 10_000):
            here = range(start, min(start + 10_000, count))
            begun = zip(draw.choices(phrases, k=len(here)), here, strict=True)
            file.write("".join(f'{{"text": "{phrase} {i}."}}\n' for phrase, i in begun))  # nothing in it to escape


def prepare(source: Path, folder: Path, tokenizer: Path, pack: int) -> list[dict[str, Any]]:
    """What each start of the preparation did, until it is finished."""
    options = ["--kind", "document", "--tokenizer", str(tokenizer), "--pack", str(pack), "--processes", "2"]
    words = [sys.executable, "-m", "rlhfjax.cli", "data", "prepare", str(source), *options, "--to", str(folder)]
    count = len(range(0, source.stat().st_size, 64 << 20))
    starts, kept = [], {}
    for share in (*KILLS, None):
        began, process = time.monotonic(), subprocess.Popen(words, cwd=ROOT)
        wanted = count + 1 if share is None else max(int(share * count), len(kept) + 1)
        while process.poll() is None and len(list(folder.glob("rows-*.json"))) < wanted:
            time.sleep(0.2)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        held = {path.name: path.stat().st_ino for path in folder.glob("rows-*.arrayrecord")}
        assert kept.items() <= held.items(), "a finished shard was made again"
        starts.append({"code": code, "seconds": round(time.monotonic() - began, 1), "found": len(kept), "of": count})
        kept = held
    assert starts[-1]["code"] == 0, starts
    return starts


def memory() -> dict[str, float]:
    """Megabytes of this process that are in memory, all of them and those that no file holds."""
    found = {}
    for place, names in (("status", _RSS), ("smaps_rollup", _PSS)):
        text = Path("/proc/self", place).read_text("utf-8")
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        found |= {name: round(int(lines[name].split()[0]) / 1024, 1) for name in names}
    return found


def opened(folder: Path, pack: int, index: int, count: int) -> dict[str, Any]:
    """What process `index` of `count` needs to open the rows, and digests of its rows of some batches."""
    by_number = rows_by_number(folder, pack)
    from rlhfjax.config import schema
    from rlhfjax.data.pipeline import Reader
    from rlhfjax.text.loading import load_tokenizer

    tokenizer = load_tokenizer(folder / "tokenizer")
    before, began = memory(), time.monotonic()
    share = SIZE // count
    reader = Reader(tokenizer, folder, 0, local=lambda _: range(index * share, (index + 1) * share))
    batches = reader.documents([schema.Data(source=str(folder))], schema.Batch(size=SIZE, length=pack))
    batches[0]
    seconds, after = time.monotonic() - began, memory()
    rows = [[_digest(batches[step], row) for row in range(share)] for step in STEPS]
    for step in range(READ):
        batches[1000 + step]
    read = {"memory_before": before, "memory_opened": after, "memory_read": memory(), "by_number": by_number}
    return {"seconds": round(seconds, 3), "rows": rows, "of_an_epoch": batches.rows} | read


def rows_by_number(folder: Path, pack: int) -> dict[str, Any]:
    """The memory of a process that opens the rows and reads some of them by their number."""
    from rlhfjax.data.tokens.items import PackedShards
    from rlhfjax.data.tokens.opening import TokenShards

    before, began = memory(), time.monotonic()
    rows = PackedShards(TokenShards(folder), pack, 0)
    rows[0]
    seconds = time.monotonic() - began
    for i in range(0, len(rows), max(len(rows) // (SIZE * READ), 1)):
        rows[i]
    return {"seconds": round(seconds, 3), "memory_before": before, "memory_read": memory()}


def _digest(batch: Any, row: int) -> str:
    leaves = (batch.tokens, batch.segments, batch.positions, batch.loss_mask)
    return hashlib.sha256(b"".join(leaf[row].tobytes() for leaf in leaves)).hexdigest()


def by_processes(folder: Path, pack: int, count: int) -> list[dict[str, Any]]:
    """`opened` in so many processes at once."""
    words = [sys.executable, "-m", "benchmarks.corpus", "--pack", str(pack), "--opened", str(folder)]
    started = [
        subprocess.Popen([*words, str(index), str(count)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for index in range(count)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def batches_of(told: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of each batch that was compared, in their order, of all processes together."""
    return [[row for each in told for row in each["rows"][step]] for step in range(len(STEPS))]


def run(documents: int, pack: int) -> dict[str, Any]:
    """All of it, in a folder that is gone afterwards."""
    from rlhfjax.text.tokenizer import Tokenizer

    work = Path(tempfile.mkdtemp(prefix="corpus_"))
    os.environ["RLHFJAX_DATA_DIR"] = str(work / "data")
    try:
        source, folder = work / "documents.jsonl", work / "rows"
        write_documents(source, documents)
        with source.open(encoding="utf-8") as file:
            texts = [json.loads(next(file))["text"] for _ in range(min(documents, 20_000))]
        Tokenizer.train(texts, 1024).save(work / "tokenizer")
        starts = prepare(source, folder, work / "tokenizer", pack)
        index = json.loads((folder / "tokens.json").read_text("utf-8"))
        size = sum(shard["size"] for shard in index["shards"])
        told = {count: by_processes(folder, pack, count) for count in (1, 2, 4)}
        assert batches_of(told[1]) == batches_of(told[2]) == batches_of(told[4]), "batches differ"
        return {
            "documents": documents,
            "source_megabytes": round(source.stat().st_size / 1e6, 1),
            "rows_megabytes": round(size / 1e6, 1),
            "counts": {name: index["counts"][name] for name in ("records", "rows", "tokens")},
            "filled": round(index["counts"]["tokens"] / (index["counts"]["rows"] * pack), 4),
            "shards": len(index["shards"]),
            "starts": starts,
            "opened": {
                str(count): [{name: each[name] for name in each if name != "rows"} for each in processes]
                for count, processes in told.items()
            },
            "batches_equal": True,
            "load_average": round(os.getloadavg()[0], 1),
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corpus", description="A corpus as rows of tokens.")
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--pack", type=int, default=2048)
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--opened", nargs=3, metavar=("FOLDER", "INDEX", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.opened:
        folder, index, count = given.opened
        print(json.dumps(opened(Path(folder), given.pack, int(index), int(count))))
        return
    result = run(given.documents, given.pack)
    given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
