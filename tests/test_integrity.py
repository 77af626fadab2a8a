"""A directory is what was written to the last bit, or every file that is not is named."""

import hashlib
import json
import os
import shutil

import pytest

from rlhfjax import integrity
from rlhfjax.errors import IntegrityError
from rlhfjax.integrity import MANIFEST, check, read_manifest, require_intact, verified_once, write_manifest

FILES = {"meta/metadata": b'{"step": 7}', "policy/d/0123": bytes(range(256)) * 40, "policy/empty": b"", "top": b"x"}


@pytest.fixture
def directory(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "held" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    write_manifest(tmp_path / "held", leaves={"policy": {"a": "float32[1]:00"}})
    return tmp_path / "held"


def found(directory, **settings):
    return [(difference.file, difference.problem) for difference in check(directory, **settings).differences]


def test_the_manifest_has_sizes_digests_and_facts(directory):
    held = read_manifest(directory)
    assert set(held["files"]) == set(FILES)
    for name, content in FILES.items():
        assert held["files"][name] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert held["leaves"] == {"policy": {"a": "float32[1]:00"}}
    checked = check(directory)
    assert (checked.files, checked.bytes, checked.differences) == (5, sum(map(len, FILES.values())), ())
    assert sorted(os.listdir(directory)) == [MANIFEST, "meta", "policy", "top"]


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_one_bit_of_a_file(directory, name):
    # fails when sizes alone are compared: seen
    for bit in (0, 7, 8 * len(FILES[name]) - 1):
        content = bytearray(FILES[name])
        content[bit // 8] ^= 1 << bit % 8
        (directory / name).write_bytes(content)
        assert found(directory) == [(name, "digest")]
        with pytest.raises(IntegrityError, match=f"{name}: expected digest SHA-256 .*; put it back"):
            require_intact(directory, "put it back")
    (directory / name).write_bytes(FILES[name])
    assert found(directory) == []


def test_every_bit_of_the_manifest_itself(directory):
    # fails without the digest that the manifest has of itself: seen
    path = directory / MANIFEST
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match=MANIFEST):
            read_manifest(directory)


def test_truncated_missing_and_extra_files_are_named(directory):
    (directory / "top").unlink()
    (directory / "policy" / "d" / "0123").write_bytes(FILES["policy/d/0123"][:-1])
    (directory / "policy" / "d" / "more").write_bytes(b"")
    shutil.rmtree(directory / "meta")
    assert found(directory) == [
        ("meta/metadata", "missing"),
        ("top", "missing"),
        ("policy/d/more", "extra"),
        ("policy/d/0123", "size"),
    ]
    with pytest.raises(IntegrityError, match=r"is missing; .*does not belong there and 1 more; fetch it"):
        require_intact(directory, "fetch it")


def test_a_link_in_the_place_of_a_file_or_folder_is_not_it(directory, tmp_path):
    shutil.copytree(directory / "policy", tmp_path / "elsewhere")
    shutil.rmtree(directory / "policy")
    (directory / "policy").symlink_to(tmp_path / "elsewhere")
    assert ("policy/d/0123", "missing") in found(directory)


def test_without_digests_only_small_files_are_read(directory):
    for name in ("meta/metadata", "policy/d/0123"):
        path = directory / name
        path.write_bytes(bytes(len(FILES[name])))
    assert found(directory, digests=False) == []
    assert found(directory, digests=False, small=20) == [("meta/metadata", "digest")]


def test_a_manifest_inside_covers_its_folder(tmp_path):
    step = tmp_path / "root" / "checkpoints" / "0"
    step.mkdir(parents=True)
    (step / "array").write_bytes(b"abc")
    write_manifest(step)
    (tmp_path / "root" / "complete.json").write_text("{}")
    write_manifest(tmp_path / "root")
    assert set(read_manifest(tmp_path / "root")["files"]) == {"complete.json", f"checkpoints/0/{MANIFEST}"}
    assert (check(tmp_path / "root").files, check(tmp_path / "root").bytes) >= (4, 5)
    (step / "array").write_bytes(b"abd")
    assert found(tmp_path / "root") == [("checkpoints/0/array", "digest")]
    (step / "more").write_bytes(b"")
    assert ("checkpoints/0/more", "extra") in found(tmp_path / "root")


def test_no_manifest(directory):
    (directory / MANIFEST).unlink()
    assert read_manifest(directory) is None
    with pytest.raises(IntegrityError, match=f"expected {MANIFEST} in it, got none"):
        check(directory)


def test_files_are_synced_before_the_manifest_and_it_before_its_name(directory, monkeypatch):
    # fails when the manifest takes its name before it is on the disk: seen
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.readlink(f"/proc/self/fd/{file}")), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write_manifest(directory)
    place = calls.index("replace")
    assert calls[place - 1] == str(directory / f"{MANIFEST}.part")
    folders = {directory / "meta", directory / "policy", directory / "policy" / "d"}
    assert set(calls[: place - 1]) == {str(path) for path in {directory / name for name in FILES} | folders}
    assert calls[place + 1 :] == [str(directory)]


def test_once_in_a_process_and_again_when_it_was_replaced(directory, monkeypatch):
    read = []
    real = integrity.check
    monkeypatch.setattr(integrity, "check", lambda *given, **more: (read.append(1), real(*given, **more))[1])
    verified_once(directory, "")
    verified_once(directory, "")
    assert len(read) == 1
    (directory / "top").write_bytes(b"y")
    write_manifest(directory)
    verified_once(directory, "")
    assert len(read) == 2


def test_nothing_is_compared_inside_unverified(directory):
    (directory / "top").write_bytes(b"y")
    with integrity.unverified():
        verified_once(directory, "")
        assert not integrity.verifying()
    with integrity.unverified(False), pytest.raises(IntegrityError):
        verified_once(directory, "")


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", json.dumps({"format": 1, "files": {}}), "[" * 10_000])
def test_something_else_in_the_place_of_a_manifest(directory, text):
    (directory / MANIFEST).write_text(text)
    with pytest.raises(IntegrityError, match=MANIFEST):
        check(directory)


@pytest.mark.parametrize(
    "held",
    [
        {"format": 1},
        {"format": 2, "files": {}},
        {"format": 1, "files": {"top": 3}},
        {"format": 1, "files": {"../top": {"size": "1", "sha256": ""}}},
        {"format": 1, "files": {}, "leaves": []},
        {"format": 1, "files": {}, "leaves": {"policy": {"a": 1}}},
    ],
)
def test_a_manifest_that_is_whole_but_makes_no_sense(directory, held):
    # fails without the check of its parts, with a KeyError or worse: meant
    (directory / MANIFEST).write_text(integrity._text(held), encoding="utf-8")
    with pytest.raises(IntegrityError, match=MANIFEST):
        check(directory)


def test_names_that_lead_out_of_the_directory_are_not_followed(directory, tmp_path):
    (tmp_path / "secret").write_text("s")
    entry = {"size": 1, "sha256": hashlib.sha256(b"s").hexdigest()}
    held = {"format": 1, "files": {"../secret": entry, "/etc/hostname": entry}}
    (directory / MANIFEST).write_text(integrity._text(held), encoding="utf-8")
    assert [(name, problem) for name, problem in found(directory) if problem != "extra"] == [
        ("../secret", "missing"),
        ("/etc/hostname", "missing"),
    ]
