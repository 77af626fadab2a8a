"""Files of the library safetensors are read, it reads ours, and no header is believed."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.interop.safetensors_files import DTYPES, cast, read_header, read_tensor, write_file

RANDOM = np.random.default_rng(0)
TENSORS = {
    "a": RANDOM.standard_normal((3, 4)),
    "b.weight": RANDOM.standard_normal((2, 1, 5)).astype(np.float32),
    "c": RANDOM.standard_normal(7).astype(np.float16),
    "d": RANDOM.standard_normal((2, 2)).astype(ml_dtypes.bfloat16),
    "scalar": np.array(2.5, np.float32),
    "none": np.zeros((0, 3), np.float32),
}


def raw(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        assert got[name].tobytes() == array.tobytes()


def test_what_the_library_writes_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(TENSORS, path, metadata={"format": "pt"})
    assert_same({name: read_tensor(tensor, name) for name, tensor in read_header(path).items()}, TENSORS)


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "model.safetensors"
    names = {dtype: name for name, dtype in DTYPES.items()}
    write_file(path, {n: (names[a.dtype], a.shape) for n, a in TENSORS.items()}, TENSORS.items())
    assert_same(safetensors.numpy.load_file(path), TENSORS)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it
    assert path.stat().st_mode & 0o777 == 0o600


def test_tensors_of_another_shape_or_type_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="expected tensor a F32"):
        write_file(tmp_path / "x", {"a": ("F32", (2,))}, [("a", np.zeros(2))])


BROKEN = {
    "a terabyte": lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"),
    "short": lambda path: path.write_bytes(b"\x01\x00"),
    "no JSON": lambda path: raw(path, b"{{{{"),
    "nested": lambda path: raw(path, b"[" * 200_000),
    "a list": lambda path: raw(path, []),
    "no dtype": lambda path: raw(path, {"a": {"shape": [2], "data_offsets": [0, 8]}}, b"0" * 8),
    "dtype a list": lambda path: raw(path, {"a": entry([])}, b"0" * 8),
    "negative shape": lambda path: raw(path, {"a": entry(shape=(-2, -1))}, b"0" * 8),
    "huge shape": lambda path: raw(path, {"a": entry(shape=(1 << 61, 1 << 61))}, b"0" * 8),
    "shape of floats": lambda path: raw(path, {"a": entry(shape=(2.0,))}, b"0" * 8),
    "shape of bools": lambda path: raw(path, {"a": entry(shape=(True, 2))}, b"0" * 8),
    "too many bytes": lambda path: raw(path, {"a": entry(offsets=(0, 12))}, b"0" * 12),
    "over the end": lambda path: raw(path, {"a": entry(), "b": entry(offsets=(8, 16))}, b"0" * 8),
    "before the start": lambda path: raw(path, {"a": entry(offsets=(-8, 0))}, b"0" * 8),
    "backwards": lambda path: raw(path, {"a": entry(offsets=(8, 0))}, b"0" * 8),
    "overlap": lambda path: raw(path, {"a": entry(), "b": entry(offsets=(4, 12))}, b"0" * 12),
    "same place": lambda path: raw(path, {"a": entry(), "b": entry()}, b"0" * 8),
    "a hole": lambda path: raw(path, {"a": entry(), "b": entry(offsets=(12, 20))}, b"0" * 20),
    "bytes left over": lambda path: raw(path, {"a": entry()}, b"0" * 9),
    "twice": lambda path: raw(path, b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"0" * 8),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_header_is_an_integrity_error(tmp_path, broken):
    path = tmp_path / "model.safetensors"
    BROKEN[broken](path)
    with pytest.raises(IntegrityError, match=r"model\.safetensors: expected a whole safetensors file"):
        read_header(path)


def test_types_that_are_not_known_are_named(tmp_path):
    path = raw(tmp_path / "model.safetensors", {"w": entry("F8_E4M3", (8,))}, b"0" * 8)
    with pytest.raises(ConfigError, match="got 'w' of 'F8_E4M3'"):
        read_header(path)


@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_numbers_that_are_none_are_an_integrity_error(tmp_path, number, dtype):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"w": np.array([1, number]).astype(dtype)}, path)
    with pytest.raises(IntegrityError, match="tensor 'w' with numbers that are infinite"):
        read_tensor(read_header(path)["w"], "w")


def test_a_file_that_became_shorter_is_an_integrity_error(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"w": np.ones(1000)}, path)
    tensor = read_header(path)["w"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(IntegrityError, match="an end of the file within tensor 'w'"):
        read_tensor(tensor, "w")


def test_numbers_that_do_not_fit_are_an_error():
    assert cast(np.float32([65504]), "F16", "w") == 65504
    with pytest.raises(ConfigError, match=r"tensor w: expected numbers that fit F16"):
        cast(np.float32([1e6]), "F16", "w")
