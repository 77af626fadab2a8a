"""GGUF files that the package `gguf` writes, with its own names of tensors and keys, read back."""

import json
import re
import struct
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.errors import ConfigError, IntegrityError, RlhfjaxError
from rlhfjax.interop import gguf_files
from rlhfjax.interop.families import config_of, weights
from rlhfjax.interop.gguf import open_gguf
from rlhfjax.interop.gguf_files import open_file
from rlhfjax.interop.gguf_tokenizer import tokenizer_of_metadata
from rlhfjax.interop.pretrained import load_parameters, names_of
from rlhfjax.interop.tensors import tensor_of
from rlhfjax.models import LanguageModel
from rlhfjax.text.chat import encode_prompt
from rlhfjax.text.sentencepiece_json import read_model, tokenizer_json
from tests.tiny import params_of

TOKENIZERS = Path(__file__).parents[1] / "golden" / "tokenizers"
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
    "tie_word_embeddings": True,
}
GEMMA = SHAPE | {"query_pre_attn_scalar": 16, "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh"}
MODELS = {
    "llama": {"architectures": ["LlamaForCausalLM"], **SHAPE},
    "llama-untied": {"architectures": ["LlamaForCausalLM"], **SHAPE, "tie_word_embeddings": False, "head_dim": 8},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], **SHAPE},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], **SHAPE, "head_dim": 32},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        **GEMMA,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope_theta": 1e4,
    },
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], **GEMMA, "rope_theta": 1e6},
    "gemma": {"architectures": ["GemmaForCausalLM"], **SHAPE},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], **SHAPE},
    "phi3": {"architectures": ["Phi3ForCausalLM"], **SHAPE, "sliding_window": 8, "partial_rotary_factor": 0.5},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], **SHAPE},
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        **SHAPE,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.0625,
        "logits_scaling": 8.0,
    },
    "gptneox": {
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "rotary_pct": 0.25,
        "use_parallel_residual": False,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 64,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "n_inner": 96,
    },
}
F32 = gguf.GGMLQuantizationType.F32


def at(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return np.asarray(tree)


def as_llama_cpp(tensor, name, kind, config):
    """What the converter of llama.cpp does to a tensor of transformers."""
    if kind in ("llama", "granite", "smollm3") and (".q_proj." in name or ".k_proj." in name):
        heads = config.heads if ".q_proj." in name else config.kv_heads
        return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if kind == "gptneox" and "query_key_value" in name:
        heads = np.split(tensor, config.heads)
        return np.concatenate([np.split(head, 3)[i] for i in range(3) for head in heads])
    if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T
    return tensor


def write(path, model, hf, params, quantise=F32, metadata=()):
    """A file of a model, with the package's own writer and its map from transformers' names."""
    kind, config = model.split("-")[0], config_of(hf)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    if kind in ("gpt2", "gptneox"):
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_head_count_kv(config.kv_heads)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_key_length(config.head_dim)
    if kind in ("gptneox", "phi3"):
        writer.add_rope_dimension_count(config.rotated_size)
    if kind == "gptneox":
        writer.add_parallel_residual(config.parallel)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logit_divisor)
    if kind in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.window)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attention_softcap)
        writer.add_final_logit_softcapping(config.logit_softcap)
    for add, *values in metadata:
        getattr(writer, add)(*values)
    architecture = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names, whole = gguf.get_tensor_name_map(architecture, config.layers), {}
    for weight in weights(config):
        for place, name in names_of(weight, config):
            whole.setdefault(name, []).append((weight, at(params, weight.path)[place]))
    for name, parts in whole.items():
        tensor = tensor_of(*zip(*parts, strict=True))
        tensor = np.ascontiguousarray(as_llama_cpp(tensor, name, kind, config), np.float32)
        stored = quantise if tensor.ndim == 2 else F32
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(there, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_params(hf):
    return params_of(LanguageModel(config_of(hf)), seed=1)


@pytest.mark.parametrize("model", MODELS)
def test_configuration_and_weights_come_back(model, tmp_path):
    # fails without the order of rotary pairs (Llama), the transpose (GPT-2), or the 1 of Gemma's norms: all seen
    hf = MODELS[model]
    params = random_params(hf)
    opened = open_gguf(write(tmp_path / "m.gguf", model, hf, params))
    assert opened.config == config_of(hf)
    assert opened.tokenizer is None
    assert "takes ids only" in opened.notes[0]
    loaded = load_parameters(opened)
    close = {"rtol": 0, "atol": 3e-7 if "gemma" in model else 0}  # 1 + w − 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), loaded, params)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantisations(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "_AT_ONCE", 256)  # a few rows
    hf, stored = MODELS["llama"], gguf.GGMLQuantizationType[kind]
    params = random_params(hf)
    opened = open_gguf(write(tmp_path / "m.gguf", "llama", hf, params, stored))
    embedding = np.asarray(params["embed"]["embedding"])
    expected = gguf.quants.dequantize(gguf.quants.quantize(embedding, stored), stored)
    loaded = load_parameters(opened)
    np.testing.assert_array_equal(loaded["embed"]["embedding"], expected)
    assert not np.array_equal(expected, embedding)
    difference = np.abs(np.asarray(loaded["blocks"]["attention"]["query"]["kernel"]))
    original = np.abs(np.asarray(params["blocks"]["attention"]["query"]["kernel"]))
    np.testing.assert_allclose(difference, original, atol=0.15)


def test_a_quantisation_that_is_not_known(tmp_path):
    path = write(tmp_path / "m.gguf", "llama", MODELS["llama"], random_params(MODELS["llama"]))
    data = bytearray(path.read_bytes())
    place = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    data[place : place + 4] = struct.pack("<I", 4)  # Q4_2, which was removed
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="known type, got number 4"):
        open_gguf(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a whole file with a tokenizer in it."""
    hf = MODELS["llama"] | {"vocab_size": 423}
    path = tmp_path_factory.mktemp("small") / "m.gguf"
    return write(path, "llama", hf, random_params(hf), metadata=byte_level_metadata()).read_bytes()


def test_cut_files(small, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(small)
    assert open_gguf(path).tokenizer.kind == "huggingface"
    for size in [*range(1, 400, 7), *range(400, len(small), len(small) // 60), len(small) - 1]:
        path.write_bytes(small[:size])
        with pytest.raises(IntegrityError):
            open_gguf(path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="an empty file"):
        open_gguf(path)
    with pytest.raises(ConfigError, match="No such file"):
        open_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("place", "form", "value", "expected"),
    [
        (0, "<I", 1, "begins otherwise"),
        (4, "<I", 1, "version 2 or 3"),
        (4, "<I", 3 << 24, "version 2 or 3"),  # big-endian
        (8, "<Q", 2**60, "tensors in what is left"),
        (16, "<Q", 2**63, "metadata entries in what is left"),
        (24, "<Q", 2**40, "text of at most"),
    ],
)
def test_absurd_headers(small, tmp_path, place, form, value, expected):
    data = bytearray(small)
    struct.pack_into(form, data, place, value)
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(RlhfjaxError, match=expected):
        open_file(tmp_path / "m.gguf")


def test_absurd_arrays_shapes_and_offsets(small, tmp_path):
    # fails (a tensor out of the file) without the comparison of sizes: seen
    tokens = small.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    tensor = small.index(b"output_norm.weight") + len(b"output_norm.weight")
    for place, value in ((tokens, 2**60), (tensor + 4, 2**62), (tensor + 16, 2**62), (tensor + 16, 1)):
        data = bytearray(small)
        struct.pack_into("<Q", data, place, value)
        (tmp_path / "m.gguf").write_bytes(data)
        with pytest.raises(IntegrityError):
            open_file(tmp_path / "m.gguf")


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 20_000), st.integers(0, 255))
def test_any_broken_byte_is_an_expected_error_or_nothing(small, tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "broken.gguf"
    data = bytearray(small)
    data[place] = value
    path.write_bytes(data)
    try:
        open_gguf(path)
    except RlhfjaxError as error:
        assert str(error)  # noqa: PT017  (no error is as good)


def test_what_the_file_says_must_fit(tmp_path):
    hf = MODELS["llama"]
    params = random_params(hf)
    with pytest.raises(ConfigError, match="got architecture 'mamba'"):
        open_gguf(_only_header(tmp_path, "mamba"))
    with pytest.raises(IntegrityError, match=r"token_embd\.weight, got none"):
        open_gguf(_only_header(tmp_path, "llama"))
    more = [("add_rope_scaling_type", gguf.RopeScalingType.YARN)]
    with pytest.raises(ConfigError, match="without scaling"):
        open_gguf(write(tmp_path / "m.gguf", "llama", hf, params, metadata=more))
    with pytest.raises(ConfigError, match="got experts"):
        open_gguf(write(tmp_path / "m.gguf", "llama", hf, params, metadata=[("add_expert_count", 4)]))
    extra = [("add_tensor", "rope_other.weight", np.zeros(8, np.float32))]
    with pytest.raises(ConfigError, match="no tensor 'rope"):
        open_gguf(write(tmp_path / "m.gguf", "llama", hf, params, metadata=extra))


def _only_header(folder, architecture):
    writer = gguf.GGUFWriter(folder / "header.gguf", architecture)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "header.gguf"


def byte_level_metadata(pre="smollm"):
    """The tokenizer of tests/golden/tokenizers/byte_level, as llama.cpp keeps one."""
    made = json.loads((TOKENIZERS / "byte_level" / "tokenizer.json").read_text())
    config = json.loads((TOKENIZERS / "byte_level" / "tokenizer_config.json").read_text())
    vocab = made["model"]["vocab"] | {token["content"]: token["id"] for token in made["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    special = {token["content"]: token["special"] for token in made["added_tokens"]}
    kinds = [gguf.TokenType.NORMAL if t not in special else 3 if special[t] else 4 for t in tokens]
    return [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", pre),
        ("add_token_list", tokens),
        ("add_token_types", kinds),
        ("add_token_merges", [" ".join(pair) for pair in made["model"]["merges"]]),
        ("add_bos_token_id", 1),
        ("add_eos_token_id", 2),
        ("add_unk_token_id", 0),
        ("add_add_bos_token", False),
        ("add_chat_template", config["chat_template"]),
    ]


def sentence_piece_metadata():
    pieces, _ = read_model((TOKENIZERS / "sentence_piece" / "tokenizer.model").read_bytes())
    return [
        ("add_tokenizer_model", "llama"),
        ("add_tokenizer_pre", "default"),
        ("add_token_list", [piece.text for piece in pieces]),
        ("add_token_scores", [piece.score for piece in pieces]),
        ("add_token_types", [piece.kind for piece in pieces]),
        ("add_bos_token_id", 1),
        ("add_eos_token_id", 2),
        ("add_unk_token_id", 0),
    ]


def metadata_of(tmp_path, entries):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    for add, *values in entries:
        getattr(writer, add)(*values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_file(tmp_path / "t.gguf").metadata


def test_byte_level_tokenizer_of_metadata(tmp_path):
    expected = json.loads((TOKENIZERS / "byte_level" / "expected.json").read_text())
    tokenizer, note = tokenizer_of_metadata(metadata_of(tmp_path, byte_level_metadata()))
    assert not note
    assert {line: tokenizer.encode(line) for line in expected["lines"]} == expected["lines"]
    for chat, ids in expected["chats"]:
        assert encode_prompt(tokenizer, {"messages": [{"role": r, "content": c} for r, c in chat]}) == ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (None, 2, 0)


def test_sentence_piece_tokenizer_of_metadata(tmp_path):
    expected = json.loads((TOKENIZERS / "sentence_piece" / "expected.json").read_text())
    tokenizer, _ = tokenizer_of_metadata(metadata_of(tmp_path, sentence_piece_metadata()))
    assert {line: tokenizer.encode(line) for line in expected["lines"]} == expected["lines"]
    assert encode_prompt(tokenizer, {"prompt": "a"}) == expected["beginning"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pre": "nonsuch"}, "the word splitter 'nonsuch'; rlhfjax knows a.x-4.0, .*, youtu; the model takes ids only"),
        ({"pre": None}, "no word splitter .*convert the model anew"),
        ({"model": "bert"}, r"a WordPiece \(BERT\), which rlhfjax does not rebuild"),
        ({"model": "t5"}, r"a unigram model \(T5\)"),
        ({"model": "nonsuch"}, "'nonsuch'; rlhfjax knows gpt2, llama, gemma4"),
        ({"model": None}, "is none; the model takes ids only"),
    ],
)
def test_tokenizers_that_are_not_rebuilt(tmp_path, changes, expected):
    metadata = metadata_of(tmp_path, byte_level_metadata())
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    tokenizer, note = tokenizer_of_metadata(changed)
    assert tokenizer is None
    assert re.search(expected, note)


def test_a_file_without_a_splitter_has_that_of_its_architecture(tmp_path):
    # NeoX cuts as GPT-2 does, and composes accents first (its published tokenizer.json)
    metadata = metadata_of(tmp_path, byte_level_metadata("gpt-2"))
    old = metadata | {"tokenizer.ggml.pre": None, "general.architecture": "gptneox"}
    tokenizer, _ = tokenizer_of_metadata(old)
    named, _ = tokenizer_of_metadata(metadata)
    assert tokenizer.encode("room 12 e\u0301") == named.encode("room 12 \u00e9")


def test_sentence_piece_without_a_space_before_text_and_with_pairs_of_its_own(tmp_path):
    # as Gemma's: add_space_prefix false, bytes, and from Gemma 4 on a list of pairs; SentencePiece has the ids
    import sentencepiece

    model = (TOKENIZERS / "sentence_piece" / "tokenizer.model").read_bytes()
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    bare = metadata_of(tmp_path, [*sentence_piece_metadata(), ("add_add_space_prefix", False)])
    pairs = tokenizer_json(read_model(model)[0], prefix="never")["model"]["merges"]
    listed = bare | {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
        "tokenizer.ggml.scores": None,
    }
    for metadata in (bare | {"general.architecture": "gemma2"}, listed):
        tokenizer, note = tokenizer_of_metadata(metadata)
        assert not note
        for text in (" begins", "the answer,\n\n  the  labeler\n", "\u6c34 \U0001f642\tx", "a <mark> b"):
            # SentencePiece puts a space before: a newline first takes the place of what it could join with
            assert tokenizer.encode(text) == own.encode("\n" + text)[2:]
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eos_token_id": 10**9}, "eos_token_id: expected an id in"),
        ({"token_type": [1]}, "each with a type"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "all different"),
        ({"merges": ["qqq zzz"]}, "parts of a tokenizer.json"),
    ],
)
def test_broken_tokenizers(tmp_path, changes, expected):
    metadata = metadata_of(tmp_path, byte_level_metadata())
    with pytest.raises(IntegrityError, match=expected):
        tokenizer_of_metadata(metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})
