"""What commands find at an address, and put there: runs that are read, data files, exports."""

import json
from pathlib import Path

import pytest

from rlhfjax import stores
from rlhfjax.data.datasets import open_source
from rlhfjax.data.files import find_files
from rlhfjax.errors import ConfigError, DataError, Stopped
from rlhfjax.integrity import check, write_manifest
from rlhfjax.stores import sources, urls
from rlhfjax.stores.client import BucketStore, Unreachable
from rlhfjax.training.checkpoint import find_checkpoint
from rlhfjax.training.checkpoint.meta import verified_step
from stores.test_workshop import step_of

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def nothing_open(monkeypatch):
    """Each test is a process that has read nothing yet."""
    monkeypatch.setattr(stores, "_open", {})
    monkeypatch.setattr(stores, "_urls", {})
    monkeypatch.setattr(sources, "_fetched", {})


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        (Path("s3://bucket/a"), "s3://bucket/a"),  # which has a slash less by then
        ("gs://bucket", "gs://bucket"),
    ],
)
def test_an_address_is_known_also_as_a_path(path, url):
    assert stores.is_url(path)
    assert stores.address(Path(path)) == url


@pytest.mark.parametrize("path", ["/s3:/a", "s3", "runs/s3:/x", "file:///a", ".", "s3:relative"])
def test_a_local_path_is_none_and_stays_what_it_is(path):
    assert not stores.is_url(path)
    assert stores.place_of(Path(path)) == stores.here(path) == Path(path)
    with stores.delivered(Path(path)) as place, stores.working(Path(path), print):
        assert place == Path(path)
    stores.publish_step(Path(path)), stores.remove(Path(path)), stores.finish(Path(path))


@pytest.mark.parametrize("path", ["s3://", "s3:///a", "gs://bucket/../other", "s3://bucket/a/../../b"])
def test_an_address_without_a_bucket_or_that_goes_upwards_is_refused(path):
    with pytest.raises(ConfigError, match="expected s3://BUCKET/NAME"):
        urls.split(path)


def test_a_run_at_an_address_is_found_and_its_arrays_come_when_they_are_verified(address, tmp_path):
    path = Path(f"{address}/run")
    with stores.working(path, print):
        root = stores.place_of(path)
        stores.publish_step(step_of(root, 3, "a"))
        (root / "sft" / "complete.json").write_text(json.dumps({"stage": "sft", "step": 3}))
        stores.finish(root / "sft")
    for given in ("run", "run/sft", "run/sft/checkpoints/3"):
        stores._open.clear()
        step = find_checkpoint(f"{address}/{given}")
        assert step.name == "3"
        verified_step(step)
        assert not check(step).differences
    assert stores.named(f"{step}: x") == f"{address}/run/sft/checkpoints/3: x"
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(f"{address}/other")
    assert f"{address}/other holds no checkpoint" in stores.named(str(caught.value))


def test_a_copy_that_was_damaged_here_is_fetched_anew_before_anybody_calls_it_damaged(address):
    path = Path(f"{address}/run")
    with stores.working(path, print):
        step = step_of(stores.place_of(path), 3, "a")
        stores.publish_step(step)
        (step / "policy" / "d" / "a3").write_bytes(b"b" * 20_000)
        verified_step(step)
        assert not check(step).differences


def test_an_export_is_delivered_whole_and_replaces_nobodys_files(address):
    target, store = Path(f"{address}/made"), BucketStore(f"{address}/made")

    def make(text, force=False):
        with stores.delivered(target, force) as place:
            place.mkdir()
            (place / f"{text}.safetensors").write_text(text)
            write_manifest(place)
        assert not place.exists()

    make("one")
    assert sorted(store.sizes()) == ["MANIFEST.sha256.json", "one.safetensors"]
    with pytest.raises(ConfigError, match=f"{address}/made: exists already"):
        make("two")
    make("two", force=True)
    assert sorted(store.sizes()) == ["MANIFEST.sha256.json", "two.safetensors"]
    with pytest.raises(RuntimeError), stores.delivered(target, True):
        raise RuntimeError
    assert sorted(store.sizes()) == ["MANIFEST.sha256.json", "two.safetensors"]
    store.delete(["MANIFEST.sha256.json"])
    with pytest.raises(ConfigError, match=r"replaces only what rlhfjax wrote there"):
        make("three", force=True)
    store.write(".rlhfjax-delivery", b"")  # as a delivery that was killed leaves it
    make("three")
    assert sorted(store.sizes()) == ["MANIFEST.sha256.json", "three.safetensors"]


def test_data_files_are_fetched_once_and_again_when_they_change(address, monkeypatch):
    store, fetched = BucketStore(f"{address}/data"), []
    for name in ("a-train.jsonl", "b-train.jsonl", "deep/c-test.jsonl"):
        store.write(name, f'{{"text": "{name}"}}\n'.encode())
    real = BucketStore.fetch
    monkeypatch.setattr(BucketStore, "fetch", lambda self, key, path: (fetched.append(key), real(self, key, path)))

    def files(source):
        sources._fetched.clear()
        fetched.clear()
        return {split: [path.read_text() for path in paths] for split, paths in find_files(source).splits.items()}

    assert files(f"{address}/data/a-train.jsonl") == {"train": ['{"text": "a-train.jsonl"}\n']}
    assert len(fetched) == 1
    assert {split: len(texts) for split, texts in files(f"{address}/data").items()} == {"train": 2, "test": 1}
    assert len(fetched) == 2  # one was here
    store.write("a-train.jsonl", b'{"text": "now"}\n')
    assert files(f"{address}/data/*-train.jsonl")["train"][0] == '{"text": "now"}\n'
    assert len(fetched) == 1
    store.delete(["b-train.jsonl"])
    assert len(files(f"{address}/data")["train"]) == 1
    with pytest.raises(DataError, match=r"none.jsonl: expected a file or folder with data files, got nothing"):
        files(f"{address}/data/none.jsonl")


def test_prepared_data_are_on_a_disk(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match="data_dir: expected a directory of this machine, got s3://bucket/prepared"):
        open_source(str(tmp_path / "one.jsonl"), "train", Path("s3://bucket/prepared"), "document")


def test_a_store_that_goes_away_stops_the_run_which_keeps_what_it_has(address, monkeypatch):
    path = Path(f"{address}/run")

    def gone(self, do):
        raise Unreachable(0, "it did not answer for 300 s: reset")

    with stores.working(path, print):
        step = step_of(stores.place_of(path), 3, "a")
        with monkeypatch.context() as broken:
            broken.setattr(BucketStore, "_tried", gone)
            with pytest.raises(Stopped, match="it did not answer") as caught:
                stores.publish_step(step)
    assert caught.value.exit_code == 42
    said = []
    with stores.working(path, said.append):
        assert not check(step).differences
    assert "sft/checkpoints/3/MANIFEST.sha256.json" in BucketStore(str(path)).sizes()
