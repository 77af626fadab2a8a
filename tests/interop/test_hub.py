"""OWNER/NAME of the hub: what its cache has is imported, and nothing is downloaded."""

import pytest
from typer.testing import CliRunner

import rlhfjax
from interop.published import publish
from rlhfjax.cli import app

REVISION = "a" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache as the hub's own tools lay it out, with one model: files in blobs, and links to them."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "models--someone--tiny"
    snapshot, blobs = folder / "snapshots" / REVISION, folder / "blobs"
    snapshot.mkdir(parents=True)
    publish(blobs, "gpt2")
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    return folder


def imported(source):
    return CliRunner().invoke(app, ["import", str(source), "made", "--force"])


def test_a_snapshot_in_the_cache_is_imported_and_named(hub):
    result = imported("someone/tiny")
    assert result.exit_code == 0, result.output
    assert f"someone/tiny: read from the hub's cache, {hub / 'snapshots' / REVISION}" in result.output.replace("\n", "")
    assert rlhfjax.load("made").config.family == "gpt2"
    assert imported(hub / "snapshots" / REVISION).exit_code == 0


def test_main_is_taken_where_there_are_several_snapshots(hub):
    older = hub / "snapshots" / ("b" * 40)
    older.mkdir()
    assert imported("someone/tiny").exit_code == 0
    (hub / "refs" / "main").unlink()
    result = imported("someone/tiny")
    assert result.exit_code == 2
    assert "expected one snapshot" in result.output


def test_nothing_is_downloaded_and_what_to_type_is_said(hub):
    result = imported("Qwen/Qwen3-0.6B")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "rlhfjax downloads nothing: hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B, and then" in said
    assert "rlhfjax import Qwen3-0.6B DST" in said


@pytest.mark.parametrize("case", ["another model", "anywhere", "no snapshot", "blobs a link"])
def test_links_that_leave_the_model_are_refused(hub, tmp_path, case):
    # meant to catch links that are followed because they are in a cache, or look like one
    link, elsewhere = hub / "snapshots" / REVISION / "model.safetensors", tmp_path / "elsewhere"
    if case == "blobs a link":
        (hub / "blobs").rename(elsewhere)
        (hub / "blobs").symlink_to(elsewhere)
    elif case == "no snapshot":
        (hub / "snapshots").rename(hub / "others")
        link = hub / "others" / REVISION / "model.safetensors"
    else:
        elsewhere = tmp_path / "home" / "hub" / "models--other--one" if case == "another model" else elsewhere
        (elsewhere / "blobs").mkdir(parents=True)
        link.resolve().rename(elsewhere / "blobs" / "model.safetensors")
        link.unlink()
        link.symlink_to(elsewhere / "blobs" / "model.safetensors")
    result = imported(link.parent)
    assert (result.exit_code, "a link out of it" in result.output) == (4, True), result.output
    assert not (tmp_path / "made").exists()
