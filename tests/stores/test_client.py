"""Objects of S3, by moto's server, and of Google Cloud Storage, by a stand-in: written whole, once, listed, deleted."""

import pytest

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.stores import client
from rlhfjax.stores.client import BucketStore, Unreachable
from rlhfjax.stores.lease import Lease
from stores.stand_ins import BUCKET, Network, free_port, variables

# Of sessions that their packages close when they are collected, in another thread than their loop's.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def test_objects_are_written_read_listed_and_deleted(address, tmp_path):
    store, other = BucketStore(address), BucketStore(f"{address}2")
    assert store.sizes() == {}
    store.write("a/b", b"one")
    store.write("a/b", b"three")
    (tmp_path / "file").write_bytes(bytes(range(256)) * 1000)
    store.send("a/c/file", tmp_path / "file")
    store.write("a2", b"")
    other.write("a/foreign", b"x")
    assert store.sizes() == {"a/b": 5, "a/c/file": 256_000, "a2": 0}
    assert store.sizes("a") == {"a/b": 5, "a/c/file": 256_000}
    assert store.sizes("nothing") == {}
    assert store.read("a/b") == b"three"
    store.fetch("a/c/file", tmp_path / "deep" / "got")
    assert (tmp_path / "deep" / "got").read_bytes() == (tmp_path / "file").read_bytes()
    store.delete(["a/b", "not there"])
    assert store.sizes("a") == {"a/c/file": 256_000}
    for reading in (lambda: store.read("a/b"), lambda: store.fetch("a/b", tmp_path / "no")):
        with pytest.raises(FileNotFoundError):
            reading()


def test_listings_have_more_than_one_page(address):
    store = BucketStore(address)
    client.in_parallel(lambda i: store.write(f"many/{i:03d}", b"x"), range(120))
    assert sorted(store.sizes("many")) == [f"many/{i:03d}" for i in range(120)]


def test_one_of_twelve_creates_an_object(address):
    store, got = BucketStore(address), []
    client.in_parallel(lambda i: got.append((store.create("lock", b"%d" % i), i)), range(12))
    winners = [i for created, i in got if created]
    assert len(winners) == 1
    assert store.read("lock") == b"%d" % winners[0]
    assert store.create("lock", store.read("lock"))  # as after an answer that was lost


def test_a_lock_is_held_by_one_and_given_back(address):
    lease = Lease(BucketStore(address))
    with pytest.raises(ConfigError, match="is in use by process"):
        Lease(BucketStore(address))
    lease.release()
    second = Lease(BucketStore(address))
    assert (second.before, second.number) == (1, 2)
    second.release()


def test_a_bucket_that_is_not_there_is_named(address):
    wrong = address.replace(BUCKET, "buckett")
    with pytest.raises(DataError, match=r"expected a bucket, got no 'buckett' there; create it") as caught:
        BucketStore(wrong)
    assert caught.value.exit_code == 3


def test_missing_credentials_say_what_to_set(s3, monkeypatch, tmp_path):
    for name, value in variables(s3, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match=r"expected credentials .* set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        BucketStore(f"s3://{BUCKET}/run")


def test_credentials_that_google_refuses_say_what_to_set(gcs, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.url)
    gcs.denied = True
    with pytest.raises(DataError, match=r"expected credentials .* GOOGLE_APPLICATION_CREDENTIALS"):
        BucketStore(f"gs://{BUCKET}/run")


def test_lost_connections_are_made_again(s3, monkeypatch, tmp_path, caplog):
    network = Network(s3)
    for name, value in variables(network.port, tmp_path).items():
        monkeypatch.setenv(name, value)
    store = BucketStore(f"s3://{BUCKET}/{tmp_path.name}")
    (tmp_path / "file").write_bytes(bytes(1_000_000))
    network.at, network.then = network.changes + 1, lambda: network.lose(0.5)
    store.send("file", tmp_path / "file")
    network.lose(0.5)
    store.fetch("file", tmp_path / "got")
    (tmp_path / "small").write_bytes(bytes(50_000))
    network.at, network.then = network.changes + 10, lambda: network.lose(0.5)
    client.in_parallel(lambda i: store.send(f"many/{i}", tmp_path / "small"), range(40))
    assert set(store.sizes("many").values()) == {50_000}
    assert len(store.sizes("many")) == 40
    assert network.lost == 3
    assert [record for record in caplog.records if record.name == "asyncio"] == []  # and nobody is told a page of it
    assert (tmp_path / "got").read_bytes() == bytes(1_000_000)
    network.close()


def test_a_store_that_does_not_answer_is_an_error_in_one_line(s3, monkeypatch, tmp_path):
    for name, value in variables(free_port(), tmp_path).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unreachable) as caught:
        BucketStore(f"s3://{BUCKET}/run", patience=0.5)
    assert caught.value.strerror.startswith(f"s3://{BUCKET}/run did not answer for 0 s: Could not connect")


@pytest.mark.parametrize(("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_package_that_is_not_installed_is_named_with_its_extra(scheme, package, extra, monkeypatch):
    def missing(name):
        raise ImportError(name=package)

    monkeypatch.setattr(client.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=rf"\({package}\): pip install 'rlhfjax\[{extra}\]'"):
        BucketStore(f"{scheme}://{BUCKET}/run")
