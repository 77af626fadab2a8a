"""Writes a prepared dataset as the version that runs this stores it: `python tests/golden/make_dataset.py FOLDER`.

`datasets/version_1` was written by 0.1.0, whose messages held a role and a content alone. It is never made again.
"""

import json
import sys
import tempfile
from pathlib import Path

from rlhfjax.data.preparing import prepare_files

RECORD = {
    "messages": [{"role": "user", "content": "How warm is it?"}],
    "responses": ["21.", "Warm.", ""],
    "ranks": [1, 2, 2],
    "labeler_id": "anna",
    "source": "by hand",
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "comparisons.jsonl"
        path.write_text(json.dumps(RECORD) + "\n", encoding="utf-8")
        prepare_files({"train": path}, "comparison", "comparisons", sys.argv[1])
