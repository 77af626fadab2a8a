"""A whole rehearsal of three processes: killed and resumed, frozen and named, refused before it began."""

import json

import pytest
from stages.conftest import command, environment, start  # noqa: F401
from stages.tiny_recipe import recipe, write_files

pytestmark = pytest.mark.faults
FAULTS = ("kill", "preempt", "torn", "stop", "version", "data")


def test_each_fault_ends_as_expected(command, tmp_path):  # noqa: F811
    whole = recipe(write_files(tmp_path))
    whole["stages"] = {"pretrain": whole["stages"]["pretrain"]}
    (tmp_path / "tiny.yaml").write_text(json.dumps(whole))
    words = [
        "--nodes",
        3,
        "--faults",
        ",".join(FAULTS),
        "--dir",
        tmp_path / "played",
        "--json",
        tmp_path / "table.json",
    ]
    code, out, err = command("rehearse", tmp_path / "tiny.yaml", *words)
    assert code == 0, out + err
    result = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in result["rows"]] == list(FAULTS)
    assert "6 of 6 as expected; 3 processes" in out
