"""Models written as GGUF: what comes back, what the package `gguf` reads of them, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.interop import gguf_export
from rlhfjax.interop.families import config_of
from rlhfjax.interop.gguf import open_gguf
from rlhfjax.interop.gguf_export import export_gguf
from rlhfjax.interop.gguf_vocabulary import PROBES, vocabulary_of
from rlhfjax.interop.pretrained import load_parameters
from rlhfjax.leaves import InMemory
from rlhfjax.models import LanguageModel
from rlhfjax.text.loading import load_tokenizer
from tests.interop.test_gguf import MODELS, random_params, write

TOKENIZERS = Path(__file__).parents[1] / "golden" / "tokenizers"


def exported(path, model, params, tokenizer=None, **settings):
    return export_gguf(path, LanguageModel(config_of(MODELS[model])), InMemory(params), tokenizer, **settings)


@pytest.mark.parametrize("model", ["llama-untied", "qwen2", "qwen3", "gemma2", "gemma3", "granite", "gptneox", "gpt2"])
def test_tensors_and_settings_are_those_of_llama_cpp_s_converter(model, tmp_path):
    # fails without the order of rotary pairs, the transpose or the 1 of Gemma's norms
    params = random_params(MODELS[model])
    said = exported(tmp_path / "ours.gguf", model, params)
    assert said["max_abs_logit_difference"] == 0
    theirs = gguf.GGUFReader(write(tmp_path / "theirs.gguf", model, MODELS[model], params))
    ours = gguf.GGUFReader(tmp_path / "ours.gguf")
    assert {tensor.name for tensor in ours.tensors} == {tensor.name for tensor in theirs.tensors}
    expected = {tensor.name: tensor.data for tensor in theirs.tensors}
    for tensor in ours.tensors:
        np.testing.assert_array_equal(tensor.data, expected[tensor.name])
    for key, field in theirs.fields.items():
        if not key.startswith(("GGUF.", "general.")):
            assert ours.fields[key].contents() == field.contents(), key


@pytest.mark.parametrize(("quantize", "kinds"), [("f16", {"F32", "F16"}), ("q8_0", {"F32", "Q8_0"})])
def test_types_round_as_the_package_rounds(quantize, kinds, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "_AT_ONCE", 256)  # a few rows at a time
    params = random_params(MODELS["llama"])
    exported(tmp_path / "m.gguf", "llama", params, quantize=quantize)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == kinds
    kind = gguf.GGMLQuantizationType[quantize.upper()]
    embedding = np.asarray(params["embed"]["embedding"])
    expected = gguf.quants.dequantize(gguf.quants.quantize(embedding, kind), kind)
    np.testing.assert_array_equal(load_parameters(open_gguf(tmp_path / "m.gguf"))["embed"]["embedding"], expected)


@pytest.mark.parametrize("name", ["own/own", "byte_level", "sentence_piece"])
def test_tokenizers_come_back_with_template_and_lineage(name, tmp_path):
    tokenizer = load_tokenizer(TOKENIZERS / name)
    hf = MODELS["llama"] | {"vocab_size": tokenizer.vocab_size + 5}
    model = LanguageModel(config_of(hf))
    lineage = {"Lineage": {"stage": "ppo", "step": 7}}
    export_gguf(tmp_path / "m.gguf", model, InMemory(random_params(hf)), tokenizer, lineage=lineage)
    again = open_gguf(tmp_path / "m.gguf").tokenizer
    for text in (*PROBES, "", "a", " a", "ends with a space "):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == hf["vocab_size"]
    assert json.loads(reader.fields["rlhfjax.lineage"].contents()) == lineage
    assert "assistant" in reader.fields["tokenizer.chat_template"].contents()


def test_a_tokenizer_that_comes_back_otherwise_is_refused():
    tokenizer = load_tokenizer(TOKENIZERS / "byte_level")
    described = json.loads(tokenizer.to_bytes())
    steps = described["tokenizer"]["pre_tokenizer"]["pretokenizers"]
    steps.insert(0, {"type": "Split", "pattern": {"Regex": "xyz"}, "behavior": "Isolated", "invert": False})
    with pytest.raises(ConfigError, match="cuts words as one"):
        vocabulary_of(type(tokenizer)(described), tokenizer.vocab_size)


def test_what_gguf_has_no_words_for_is_refused_and_nothing_is_left(tmp_path):
    params = random_params(MODELS["llama"])
    config = config_of(MODELS["llama"])
    stretched = replace(config, rope_scaling="linear", rope_factor=2.0)
    with pytest.raises(ConfigError, match="rope_scaling"):
        export_gguf(tmp_path / "m.gguf", LanguageModel(stretched), InMemory(params), None)
    with pytest.raises(ConfigError, match="--quantize: expected f32, f16, q8_0, got 'q4'"):
        exported(tmp_path / "m.gguf", "llama", params, quantize="q4")
    with pytest.raises(ConfigError, match="got a model of scores"):
        exported(tmp_path / "m.gguf", "llama", params | {"head": {"kernel": np.zeros(64), "bias": np.zeros(())}})
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        exported(tmp_path / "m.gguf", "llama", params)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_other_numbers_are_noticed(tmp_path, monkeypatch):
    tensor = gguf_export.as_in_file
    monkeypatch.setattr(gguf_export, "as_in_file", lambda x, *rest: tensor(x, *rest) * np.float32(1.0001))
    with pytest.raises(IntegrityError, match="as the checkpoint has it"):
        exported(tmp_path / "m.gguf", "llama", random_params(MODELS["llama"]))
    assert not list(tmp_path.iterdir())
