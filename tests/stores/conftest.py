"""Stand-ins for the two kinds of stores. What they need is in no lock file; without it these tests are skipped."""

import pytest

from stores.gcs_stand_in import GcsStandIn
from stores.stand_ins import BUCKET, s3_server, variables


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """The port of moto's server."""
    for package in ("s3fs", "moto", "boto3"):
        pytest.importorskip(package)
    with s3_server(tmp_path_factory.mktemp("moto") / "log") as port:
        yield port


@pytest.fixture
def gcs():
    """A stand-in for Google's."""
    pytest.importorskip("gcsfs")
    with GcsStandIn(BUCKET) as server:
        yield server


@pytest.fixture(params=["s3", "gs"])
def address(request, monkeypatch, tmp_path):
    """An address of each kind, with the environment that leads to its stand-in."""
    if request.param == "s3":
        for name, value in variables(request.getfixturevalue("s3"), tmp_path / "scratch").items():
            monkeypatch.setenv(name, value)
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("gcs").url)
        monkeypatch.setenv("RLHFJAX_SCRATCH", str(tmp_path / "scratch"))
    return f"{request.param}://{BUCKET}/{tmp_path.name}"
