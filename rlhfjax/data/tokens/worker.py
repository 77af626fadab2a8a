"""A process that makes shards: the numbers of parts come in, a line each, and what became of them goes out as JSON."""

import json
import os
import queue
import sys
import threading
from pathlib import Path

from rlhfjax.data.tokens.folder import read_plan, tokenizer_of
from rlhfjax.data.tokens.shards import make_shard
from rlhfjax.errors import RlhfjaxError


def main(folder: Path) -> None:
    """Answers until nothing more can come."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    plan = read_plan(folder)
    tokenizer = tokenizer_of(folder, plan)
    parts: queue.Queue[int] = queue.Queue()
    threading.Thread(target=_listen, args=(parts,), daemon=True).start()
    while True:
        number = parts.get()
        try:
            answer = {"shard": make_shard(folder, plan, tokenizer, number).to_json()}
        except RlhfjaxError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _listen(parts: queue.Queue[int]) -> None:
    for line in sys.stdin:
        parts.put(int(line))
    os._exit(0)  # whoever asked is gone, in whatever way, or has all that was wanted
