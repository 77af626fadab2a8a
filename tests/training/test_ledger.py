"""What each step read, written down: cut where metrics are cut, and with what a rollback passed over."""

import json
import stat

import numpy as np
import pytest

from rlhfjax.data.numbering import Listed
from rlhfjax.errors import ConfigError
from rlhfjax.training.ledger import FILE, Ledger, Taken, ranges
from rlhfjax.training.metrics import MetricsWriter


class Order:
    """Two sources of three and two rows, one after the other again and again; row 1 of the first is not read."""

    rows = 4
    listed = (Listed("a", 3, np.array([0, 2])), Listed("b", 2, np.array([0, 1])))
    cycle = (0, 2, 3, 4)

    def numbers(self, first, count):
        return np.array([self.cycle[place % 4] for place in range(first, first + count)], np.int64)


class Places:
    """A source whose rows are too many to be told."""

    rows = 10
    listed = ()

    def numbers(self, first, count):
        raise AssertionError("nobody asks")


HEADING = {
    "step": 0,
    "format": 1,
    "place": 0,
    "epoch": 4,
    "sources": [
        {"name": "a", "count": 3, "kept": [[0, 1], [2, 3]]},
        {"name": "b", "count": 2, "kept": [[0, 2]]},
    ],
}


def lines(directory):
    return [json.loads(line) for line in (directory / FILE).read_text(encoding="utf-8").splitlines()]


def written(directory, start, steps, order=None, said=print):
    """A ledger from `start` on with a line for each (step, first place, count)."""
    ledger = Ledger(directory, start, order or Order(), said)
    for step, first, count in steps:
        ledger.write(step, Taken(first, count))
    ledger.close()


def test_a_line_a_step_says_the_rows(tmp_path):
    written(tmp_path, 0, [(1, 0, 3), (2, 3, 3)])
    assert lines(tmp_path) == [
        HEADING,
        {"step": 1, "first": 0, "rows": [0, 2, 3]},
        {"step": 2, "first": 3, "rows": [4, 0, 2]},
    ]
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_places_alone_where_rows_have_no_numbers(tmp_path):
    written(tmp_path, 0, [(1, 0, 8), (2, 24, 8)], Places())
    assert lines(tmp_path) == [
        {"step": 0, "format": 1, "place": 0, "epoch": 10},
        {"step": 1, "first": 0, "count": 8},
        {"step": 2, "first": 24, "count": 8, "left_out": 16},
    ]


def test_what_a_killed_process_wrote_after_its_last_checkpoint_goes(tmp_path):
    written(tmp_path, 0, [(1, 0, 2), (2, 2, 2), (3, 4, 2)])
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"step":4,"fir')
    written(tmp_path, 1, [(2, 2, 2)])
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    written(tmp_path, 2, [(3, 4, 2)])
    assert lines(tmp_path)[-1] == {"step": 3, "first": 4, "rows": [0, 2]}


def test_half_a_line_goes(tmp_path):
    """Also where the half could be read as a whole, and where no step is to be dropped."""
    written(tmp_path, 0, [(1, 0, 2)])
    whole = (tmp_path / FILE).read_bytes()
    for half in (b'{"step":2,"fir', b'{"step":1,"first":0,"rows":[0,2]}'):
        (tmp_path / FILE).write_bytes(whole + half)
        written(tmp_path, 2, [])
        assert (tmp_path / FILE).read_bytes() == whole


def test_what_a_rollback_passes_over_stands_in_the_next_line(tmp_path):
    """Back from step 3 to step 1: the places of steps 2 and 3 are left out; once more, and those of the new 2, too."""
    written(tmp_path, 0, [(1, 0, 2), (2, 2, 2), (3, 4, 2)])
    written(tmp_path, 1, [(2, 6, 2)])
    assert lines(tmp_path)[-1] == {"step": 2, "first": 6, "rows": [3, 4], "left_out": [3, 4, 0, 2]}
    written(tmp_path, 1, [(2, 8, 2)])
    assert lines(tmp_path)[-1] == {"step": 2, "first": 8, "rows": [0, 2], "left_out": [3, 4, 0, 2, 3, 4]}


def test_a_stage_that_an_older_version_began(tmp_path):
    """It says where it begins, and how much of each source was read before."""
    written(tmp_path, 5, [(6, 10, 2)])
    heading, line = lines(tmp_path)
    assert (heading["step"], heading["place"]) == (5, 10)
    assert [source["passed"] for source in heading["sources"]] == [6, 4]
    assert line == {"step": 6, "first": 10, "rows": [3, 4]}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([], []), ([0], [[0, 1]]), ([0, 1, 2], [[0, 3]]), ([1, 2, 5, 7, 8], [[1, 3], [5, 6], [7, 9]])],
)
def test_ranges(rows, expected):
    assert ranges(np.array(rows, np.int64)) == expected


def test_it_goes_back_with_the_metrics(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False, order=Order())
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0}, Taken(2 * step - 2, 2))
    writer.back_to(1)
    writer.write(2, {"loss": 1.0}, Taken(6, 2))
    told = writer.facts()
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    assert lines(tmp_path)[-1]["left_out"] == [3, 4, 0, 2]
    assert len(told["ledger_sha256"]) == 64


def test_a_ledger_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(ConfigError, match=r"ledger\.jsonl: cannot be written"):
        MetricsWriter(tmp_path, 0, tensorboard=False, order=Order())
