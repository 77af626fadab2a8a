"""Parts of a GGUF file, wherever they begin: as the package `gguf` dequantises the whole, and nothing else is read."""

import gguf
import numpy as np
import pytest

from interop.test_gguf import MODELS, as_llama_cpp, at, random_params, write
from rlhfjax.errors import IntegrityError
from rlhfjax.interop import gguf_files
from rlhfjax.interop.families import config_of, weights
from rlhfjax.interop.gguf import open_gguf
from rlhfjax.interop.gguf_files import open_file
from rlhfjax.interop.pretrained import Imported, load_parameters, names_of
from rlhfjax.interop.tensors import tensor_of
from rlhfjax.leaves import read

Q8_0 = gguf.GGMLQuantizationType.Q8_0
KINDS = [kind for kind in gguf.GGML_QUANT_SIZES if kind in gguf.quants._type_traits]


def ranges(rng, shape):
    """A region of an array, at random."""
    ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in shape]
    return tuple(slice(int(start), int(stop)) for start, stop in ends)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_any_rows_and_columns_of_every_quantisation(kind, tmp_path, monkeypatch):
    # random bits, infinities and NaN among them; compared as bits
    monkeypatch.setattr(gguf_files, "_AT_ONCE", 1024)  # a row or two
    rng = np.random.default_rng(0)
    block, width = gguf.GGML_QUANT_SIZES[kind]
    stored = rng.integers(0, 256, (6, 3 * width), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("t", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_file(tmp_path / "t.gguf")
    with np.errstate(all="ignore"):
        whole = gguf.quants.dequantize(stored, kind).view(np.uint32)
        assert whole.shape == (6, 3 * block)
        for _ in range(10):
            rows, columns = ranges(rng, whole.shape)
            np.testing.assert_array_equal(file.read("t", rows, columns).view(np.uint32), whole[rows, columns])
        order = np.array([5, 0, 3])
        got = np.ascontiguousarray(file.read("t", order, slice(1, 3 * block, 2)))
    np.testing.assert_array_equal(got.view(np.uint32), whole[order, 1::2])


def rounded(model, hf, params):
    """Our parameters as they are after Q8_0, by path: each tensor dequantised as a whole, and then looked at."""
    config, parts, found = config_of(hf), {}, {}
    for weight in weights(config):
        for place, name in names_of(weight, config):
            parts.setdefault(name, []).append((weight, place))
    for name, inside in parts.items():
        tensor = tensor_of([w for w, _ in inside], [at(params, w.path)[place] for w, place in inside])
        if tensor.ndim == 2:
            across = model == "gpt2" and as_llama_cpp(tensor, name, model, config).base is not None
            rows = np.ascontiguousarray(tensor.T if across else tensor)
            rows = gguf.quants.dequantize(gguf.quants.quantize(rows, Q8_0), Q8_0)
            tensor = rows.T if across else rows
        for weight, place in inside:
            ours = found.setdefault(weight.path, np.empty(at(params, weight.path).shape, np.float32))
            ours[place] = weight.look(tensor)
    return found


@pytest.mark.parametrize("model", ["llama", "gptneox", "gpt2", "phi3"])
def test_any_region_of_a_parameter(model, tmp_path):
    # rows in another order (Llama, NeoX), matrices the other way round (GPT-2), several in one tensor (Phi-3)
    hf, rng = MODELS[model], np.random.default_rng(0)
    params = random_params(hf)
    leaves = Imported(open_gguf(write(tmp_path / "m.gguf", model, hf, params, Q8_0)))
    for path, whole in rounded(model, hf, params).items():
        for _ in range(6):
            region = ranges(rng, whole.shape)
            np.testing.assert_array_equal(read(leaves, path, region), whole[region])


def test_a_quarter_of_a_matrix_takes_a_quarter_of_its_blocks(tmp_path, monkeypatch):
    leaves = Imported(
        open_gguf(write(tmp_path / "m.gguf", "llama", MODELS["llama"], random_params(MODELS["llama"]), Q8_0))
    )
    octets, undone = [], gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda rows, kind: octets.append(rows.size) or undone(rows, kind))
    read(leaves, "blocks/mlp/up/kernel", (slice(1, 2), slice(32, 64), slice(48, 96)))  # of 64 inputs and 96 outputs
    read(leaves, "blocks/attention/query/kernel", (slice(0, 1), slice(0, 64), slice(3, 4), slice(0, 16)))  # a head of 4
    assert octets == [48 * 34, 16 * 2 * 34]  # a block is 34 octets of 32 numbers


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    params = random_params(MODELS["llama"])
    params["blocks"]["mlp"]["up"]["kernel"] = params["blocks"]["mlp"]["up"]["kernel"].at[1, 2, 3].set(np.inf)
    opened = open_gguf(write(tmp_path / "m.gguf", "llama", MODELS["llama"], params))
    with pytest.raises(
        IntegrityError, match=r"m\.gguf: expected finite numbers in tensor 'model\.layers\.1\.mlp\.up_proj"
    ):
        load_parameters(opened)
