"""Experts in MXFP4: numbers worked by hand, and a directory as gpt-oss is published."""

import json

import jax
import numpy as np
import pytest

from interop.published import golden, publish, tensors_of
from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.interop import mxfp4
from rlhfjax.interop.huggingface import open_directory
from rlhfjax.interop.mxfp4 import dequantize
from rlhfjax.interop.pretrained import Imported, load_parameters
from rlhfjax.leaves import read

# E2M1 with the sign in the highest bit: 1 bit of mantissa, exponent bias 1, 0 and 0.5 below the normal numbers.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
QUANTISED = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def test_a_block_worked_by_hand():
    # octets hold the first of two numbers in their lower half: 1.5 and -6, then 0.5 and 2, scaled by 2^(129 - 127)
    blocks = np.zeros((1, 1, 1, 16), np.uint8)
    blocks[0, 0, 0, :2] = 0xF3, 0x41
    got = dequantize(blocks, np.full((1, 1, 1), 129, np.uint8))
    assert got.shape == (1, 32, 1)
    assert got[0, :5, 0].tolist() == [6.0, -24.0, 2.0, 8.0, 0.0]


def packed(rng, shape):
    """Random octets of a matrix [experts, inputs, outputs], and its numbers one by one."""
    experts, inputs, outputs = shape
    codes = rng.integers(0, 16, (experts, outputs, inputs // 32, 32))
    scales = rng.integers(120, 126, codes.shape[:3])
    numbers = np.zeros(shape, np.float32)
    for e, o, b, i in np.ndindex(codes.shape):
        sign = -1.0 if codes[e, o, b, i] & 8 else 1.0
        numbers[e, 32 * b + i, o] = sign * E2M1[codes[e, o, b, i] & 7] * 2.0 ** (scales[e, o, b] - 127)
    octets = codes[..., 0::2] | codes[..., 1::2] << 4
    return {"_blocks": octets.astype(np.uint8), "_scales": scales.astype(np.uint8)}, numbers


@pytest.fixture
def directories(tmp_path):
    """The same model with its experts packed, and in float32."""
    rng, sizes = np.random.default_rng(0), {"intermediate_size": 32, "num_hidden_layers": 1}
    described = golden("gpt_oss")[1] | sizes | {"layer_types": ["full_attention"]}
    whole, small = tensors_of(described), {}
    for name in [name for name in whole if name.endswith("_proj") and "experts" in name]:
        parts, whole[name] = packed(rng, whole[name].shape)
        small |= {name + ending: octets for ending, octets in parts.items()}
    small |= {name: array for name, array in whole.items() if name + "_blocks" not in small}
    settings = sizes | {"layer_types": ["full_attention"]}
    plain = publish(tmp_path / "plain", "gpt_oss", whole, **settings)
    return publish(tmp_path / "packed", "gpt_oss", small, **settings, quantization_config=QUANTISED), plain


def test_a_directory_is_read_as_the_numbers_that_it_stands_for(directories):
    small, plain = (open_directory(directory) for directory in directories)
    assert [note for note in small.notes if "MXFP4" in note]
    jax.tree.map(np.testing.assert_array_equal, load_parameters(small), load_parameters(plain))


def test_a_part_is_read_as_it_is_in_the_whole_and_nothing_else_is(directories, monkeypatch):
    # parts begin inside a block of 32 and at odd outputs, of which gate and up take turns
    small, plain = (Imported(open_directory(directory)) for directory in directories)
    rng, octets = np.random.default_rng(1), []
    seen = mxfp4.dequantize
    monkeypatch.setattr(mxfp4, "dequantize", lambda *parts: octets.append(parts[0].size) or seen(*parts))
    for name in ("gate", "up", "down"):
        path = f"blocks/experts/{name}/kernel"
        whole = read(plain, path)
        assert np.prod(whole.shape[1:]) > 32
        for _ in range(20):
            ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in whole.shape]
            region = tuple(slice(int(start), int(stop)) for start, stop in ends)
            np.testing.assert_array_equal(read(small, path, region), whole[region])
    octets.clear()
    read(small, "blocks/experts/gate/kernel", (slice(0, 1), slice(1, 2), slice(0, 32), slice(3, 7)))
    assert sum(octets) == 4 * 16  # of four outputs of gate, a block each


def test_what_does_not_fit_or_is_quantised_otherwise_is_refused(directories):
    described = json.loads((directories[0] / "config.json").read_text())
    (directories[1] / "config.json").write_text(
        json.dumps(described | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(ConfigError, match="quantization_config of 'fp8'"):
        open_directory(directories[1])
    (directories[0] / "config.json").write_text(json.dumps(described | {"intermediate_size": 64}))
    with pytest.raises(IntegrityError, match=r"as config\.json says"):
        open_directory(directories[0])
