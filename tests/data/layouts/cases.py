"""What the tests of all layouts share: rows of a file recognised, read, and compared with records written by hand."""

from rlhfjax.data.layouts import recognise
from rlhfjax.data.records import parse_record

ASKED = "What colour is the sky at noon?"
GOOD, BAD = "Blue, where there are no clouds.", "Green."
USER = {"role": "user", "content": ASKED}
BRIEF = {"role": "system", "content": "Be brief."}


def said(text: str) -> dict:
    """An answer as a message."""
    return {"role": "assistant", "content": text}


def read(rows: list[dict], kind: str, layout=None) -> list[dict]:
    """The canonical records of a file that holds these rows."""
    layout = layout or recognise(rows, kind)
    given = [(f"file:{line}", row) for line, row in enumerate(rows, 1)]
    return [
        parse_record(kind, obj, where) for where, row in layout.gathered(given) for obj in layout.rows(kind, row, where)
    ]


def bare(records: list[dict]) -> list[dict]:
    """Without what was kept beside."""
    return [{name: value for name, value in record.items() if name != "extra"} for record in records]
