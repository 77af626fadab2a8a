"""Makes tests/golden/tokenizers/exported.json: what transformers makes of tokenizers as an export writes them.

From the root of the repository; each PYTHON is an interpreter with a version of transformers:

    python -m tests.golden.make_exported_tokenizers PYTHON PYTHON
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.golden.exported_tokenizers import HERE, SOURCES, digest, exported_files, question, shortened


def main() -> None:
    script = Path(__file__).with_name("ask_tokenizer.py")
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "question.json"
        asked.write_text(json.dumps([question(name, Path(folder) / name) for name in SOURCES]))
        answers = [
            json.loads(subprocess.run([python, script, asked], capture_output=True, check=True).stdout.splitlines()[-1])
            for python in sys.argv[1:]
        ]
    made = {
        name: {"files": digest(exported_files(name)), "answers": [shortened(answer[place]) for answer in answers]}
        for place, name in enumerate(SOURCES)
    }
    (HERE / "exported.json").write_text(json.dumps(made, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
