"""Every family against transformers: logits, cached greedy decoding, scores, configurations and tensors both ways.

`golden/make_families.py` made the numbers; tensors are drawn by name there and here.
"""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny import stored

from rlhfjax.errors import ConfigError
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.interop.families import config_of, hf_config, weights
from rlhfjax.interop.tensors import tensor_of
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.types import PromptBatch

GOLDEN = Path(__file__).parent.parent / "golden" / "families"
SCORED = sorted(path.stem for path in GOLDEN.glob("*_score.npz"))
FAMILIES = sorted({path.stem for path in GOLDEN.glob("*.npz")} - set(SCORED))
# Of all ways to place and to see tokens one each decodes in every run; test_decoder.py has all of them, cached and not.
DECODED = {"gpt2", "llama3", "gemma2", "gemma3", "gpt_neox", "gpt_oss", "olmo3", "phi3_long", "smollm3"}


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    return np.random.default_rng(zlib.crc32(name.encode())).normal(mean, 0.25, shape).astype(np.float32)


def golden(family):
    data = stored(GOLDEN / f"{family}.npz")
    return data, json.loads(str(data["config"]))


def configuration(name, described):
    """The decoder; that of phi3_long reads rows beyond the context of pretraining, as an import never does."""
    config = config_of(described)
    return replace(config, context=described["max_position_embeddings"]) if name == "phi3_long" else config


def params_of(config, scalar=False):
    """Our parameters from tensors of transformers' names."""
    tree: dict = {}
    for weight in weights(config, scalar):
        layers = range(config.layers) if "{layer}" in weight.name else [None]
        leaves = [weight.look(tensor(weight.name.format(layer=i), weight.shape)) for i in layers]
        *way, last = weight.path.split("/")
        node = tree
        for name in way:
            node = node.setdefault(name, {})
        node[last] = jnp.asarray(leaves[0] if layers == [None] else np.stack(leaves))
    return tree


def padded(rows, side):
    width = max(map(len, rows))
    tokens, mask = np.full((len(rows), width), 3, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        here = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, here], mask[i, here] = row, True
    return tokens, mask


def assert_same_logits(got, wanted):
    """Equal to 1e-5 of the largest logit, which is what float32 has.

    With all arithmetic in float64 both sides differ by at most 4e-14, and by 4e-12 where a constant of GELU has ten
    digits. In float32 each is as far from its own float64 as the two are from each other: 3e-5 for Gemma, whose logits
    go up to 8.4 and whose scales of 1 + w are around 2; 1.7e-5 for Phi-3 with long factors, up to 5.0; 1.5e-5 and less
    for the others.
    """
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    data, described = golden(request.param)
    return request.param, data, configuration(request.param, described), params_of(config_of(described))


def test_logits_equal_transformers_whatever_the_padding(family):
    # fails with a window of one more, all layers global, the local theta or a scaling of RoPE left out, a soft cap or
    # the scalar of the query left out, a scale of w for 1 + w: seen
    _, data, config, params = family
    model, rows = LanguageModel(config), [data["row0"], data["row1"]]
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    sides = [padded(rows, side) for side in ("right", "left")]
    tokens, mask = (np.concatenate(parts) for parts in zip(*sides, strict=True))
    got = np.asarray(jax.jit(model.logits)(params, tokens, mask))
    assert data["logits0"].std() > 1
    for i in range(4):
        assert_same_logits(got[i][mask[i]], data[f"logits{i % 2}"])


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in DECODED else pytest.mark.slow) for name in FAMILIES],
    indirect=True,
)
def test_greedy_decoding_with_the_cache_equals_transformers_without(family):
    # Prompts of two lengths, padded on the left; 8 tokens run past every window of 4. Fails when only decoding has a
    # wider window: seen
    _, data, config, params = family
    tokens, mask = padded([data["row0"], data["row1"]], "left")
    batch = PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(2, dtype=jnp.int32))
    sampling = SamplingParams(data["greedy"].shape[1], stop_id=-1, pad_id=0, temperature=0.0)
    model = LanguageModel(config)
    drawn = jax.jit(lambda p: generate(model, p, batch, jax.random.key(0), sampling))(params)
    np.testing.assert_array_equal(drawn.response, data["greedy"])


@pytest.mark.parametrize("name", SCORED)
def test_scores_equal_those_of_classifiers_with_one_label(name):
    data, described = golden(name)
    config = config_of(described)
    head = {"kernel": jnp.asarray(tensor("score.weight", (1, config.width))[0]), "bias": jnp.zeros(())}
    params = {"decoder": params_of(config, scalar=True), "head": head}
    tokens, mask = padded([data["row0"], data["row1"]], "right")
    got = jax.jit(LanguageModel(config).scores)(params, tokens, mask)
    np.testing.assert_allclose(got, data["scores"], atol=1e-4)


def test_a_written_configuration_is_read_as_the_same_decoder(family):
    name = family[0]
    config = config_of(golden(name)[1])
    written = json.loads(json.dumps(hf_config(config)))
    assert config_of(written) == config
    assert written["architectures"] == golden(name)[1]["architectures"]


@pytest.mark.parametrize("name", FAMILIES)
def test_configurations_of_transformers_4_are_read_alike(name):
    _, described = golden(name)
    older = {key: value for key, value in described.items() if key not in {"rope_parameters", "dtype", "layer_types"}}
    older["torch_dtype"] = "float32"
    rope = described.get("rope_parameters") or {}
    if "sliding_attention" in rope:
        local, rope = rope["sliding_attention"]["rope_theta"], rope["full_attention"]
        older |= {"layer_types": described["layer_types"]} if name == "olmo3" else {"rope_local_base_freq": local}
    if name == "gemma3":
        older |= {"sliding_window_pattern": 2, "_sliding_window_pattern": 2}
    if rope:
        rope = dict(rope)
        theta, fraction = (
            ("rotary_emb_base", "rotary_pct") if "neox" in name else ("rope_theta", "partial_rotary_factor")
        )
        older[theta] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            older[fraction] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type")
        older["rope_scaling"] = None if kind == "default" else {"type": kind} | rope
    assert config_of(older) == config_of(described)


def test_rope_scaling_takes_the_place_of_rope_parameters():
    # as in transformers 5, which make_families.py holds to it; what it would lose in silence is refused here
    described = golden("llama_linear")[1]
    linear, plain = {"rope_type": "linear", "factor": 3.0}, {"rope_type": "default", "rope_theta": 500.0}
    both = described | {"rope_parameters": plain, "rope_scaling": linear}
    wanted = replace(config_of(described), rope_theta=500.0)
    assert config_of(both | {"rope_theta": 500.0}) == wanted
    assert config_of(both | {"rope_scaling": linear | {"rope_theta": 500.0}}) == wanted
    assert config_of(described | {"rope_parameters": plain, "rope_theta": 7.0}).rope_theta == 500.0
    with pytest.raises(ConfigError, match=r"rope_theta 500.0 of rope_parameters in rope_scaling too.* got 10000.0"):
        config_of(both)
    with pytest.raises(ConfigError, match="expected full_attention and sliding_attention in rope_parameters"):
        config_of(golden("gemma3")[1] | {"rope_parameters": plain})
    # of two kinds of layers it is added to what the global ones have
    assert config_of(golden("olmo3")[1] | {"rope_scaling": {"factor": 8.0}}).rope_factor == 8.0


def test_tensors_go_there_and_back_in_any_type(family):
    # a parameter is looked at in their tensor, so what is written into it is there
    together: dict[str, list] = {}
    for weight in weights(config_of(golden(family[0])[1])):
        together.setdefault(weight.name, []).append(weight)
    for name, parts in together.items():
        theirs = tensor(name, parts[0].shape).astype(ml_dtypes.bfloat16)
        ours = [weight.look(theirs) for weight in parts]
        assert all(np.shares_memory(own, theirs) and own.dtype == theirs.dtype for own in ours)
        assert sum(own.size for own in ours) == theirs.size
        assert [weight.shared for weight in parts] == [len(parts) > 1] * len(parts)
        np.testing.assert_array_equal(tensor_of(parts, [own.copy() for own in ours]), theirs)


def llama_like(architecture, vocab, width, inner, layers, heads, kv_heads, **more):
    sizes = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 8192}
    return {"architectures": [architecture], "torch_dtype": "bfloat16", **sizes} | more


GPT_SIZES = {"n_embd": 768, "n_layer": 12, "n_head": 12}
TIED = {"tie_word_embeddings": True}
# Published models as their files of transformers 4 describe them, and the parameters that are published with them.
PUBLISHED = {
    116_534_784: GPT_SIZES
    | {"architectures": ["OpenAIGPTLMHeadModel"], "vocab_size": 40478, "n_positions": 512, "afn": "gelu"},
    124_439_808: GPT_SIZES
    | {"architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024, "n_ctx": 1024},
    134_515_008: llama_like("LlamaForCausalLM", 49152, 576, 1536, 30, 9, 3, rope_interleaved=False, **TIED),
    1_235_814_400: llama_like("LlamaForCausalLM", 128256, 2048, 8192, 16, 32, 8, head_dim=64, mlp_bias=False, **TIED),
    7_241_732_096: llama_like("MistralForCausalLM", 32000, 4096, 14336, 32, 32, 8, sliding_window=4096),
    494_032_768: llama_like("Qwen2ForCausalLM", 151936, 896, 4864, 24, 14, 2, use_sliding_window=False, **TIED),
    596_049_920: llama_like("Qwen3ForCausalLM", 151936, 1024, 3072, 28, 16, 8, head_dim=128, **TIED),
    2_614_341_888: llama_like("Gemma2ForCausalLM", 256000, 2304, 9216, 26, 8, 4, hidden_act="gelu_pytorch_tanh"),
    999_885_952: llama_like("Gemma3ForCausalLM", 262144, 1152, 6912, 26, 4, 1, cache_implementation="hybrid"),
}


@pytest.mark.parametrize("parameters", PUBLISHED)
def test_published_models_have_their_number_of_parameters(parameters):
    config = config_of(PUBLISHED[parameters])
    params = jax.eval_shape(LanguageModel(config).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    tensors = {
        weight.name: (weight.shape, config.layers if "{layer}" in weight.name else 1) for weight in weights(config)
    }
    assert sum(int(np.prod(shape)) * count for shape, count in tensors.values()) == parameters


def test_settings_that_would_change_the_numbers_are_refused_by_name():
    llama, gpt2, gemma = (golden(name)[1] for name in ("llama2", "gpt2", "gemma2"))
    for described, change, named in (
        (llama, {"rope_parameters": {"rope_type": "proportional", "factor": 4.0}}, "proportional"),
        (
            llama,
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}},
            "short_factor",
        ),
        (llama, {"rope_scaling": {"type": "longrope", "short_factor": ["1"], "long_factor": [1.0]}}, "short_factor"),
        (llama, {"rope_scaling": {"type": "yarn", "factor": 2.0, "attn_factor": 1.5}}, "attn_factor"),
        (
            llama,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}},
            "mrope_section",
        ),
        (llama, {"hidden_act": "gelu"}, "hidden_act"),
        (llama, {"attention_bias": True}, "attention_bias"),
        (llama, {"mlp_bias": True}, "mlp_bias"),
        (llama, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (llama, {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        (llama, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (llama, {"some_new_setting": 1}, "some_new_setting"),
        (llama, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (llama, {"hidden_size": "32"}, "hidden_size"),
        (llama, {"num_hidden_layers": True}, "num_hidden_layers"),
        (llama, {"num_hidden_layers": 0}, "num_hidden_layers"),
        (llama, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        (llama, {"vocab_size": None}, "vocab_size"),
        (llama, {"architectures": ["PhiForCausalLM"]}, "PhiForCausalLM"),
        (llama, {"architectures": None, "model_type": "phi"}, "phi"),
        (llama, {"architectures": ["Gemma3ForConditionalGeneration"]}, "pictures"),
        (
            llama,
            {"architectures": ["Mistral3Model"], "text_config": {"model_type": "mistral"}},
            "'mistral', which reads",
        ),
        (gpt2, {"activation_function": "relu"}, "activation_function"),
        (gpt2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (gpt2, {"n_head": 5}, "heads"),
        (gemma, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (gemma, {"layer_types": ["sliding_attention", "chunked_attention", "full_attention"]}, "layer_types"),
    ):
        with pytest.raises(ConfigError, match=named):
            config_of(described | change)


def test_fresh_families_are_written_as_their_architecture_or_not_at_all():
    shape = {"vocab_size": 8, "layers": 6, "width": 16, "heads": 4, "context": 8}
    stems = {name: name.title() for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")}
    for family, known in (stems | {"gpt1": "OpenAIGPT", "gpt2": "GPT2"}).items():
        config = decoder_config(family, **shape)
        written = hf_config(config)
        assert written["architectures"][0].startswith(known)
        assert config_of(written).local_layers == config.local_layers
        assert hf_config(config, scalar=True)["architectures"][0].endswith("ForSequenceClassification")
    later = {"gemma": "Gemma", "olmo2": "Olmo2", "olmo3": "Olmo3", "phi3": "Phi3", "smollm3": "SmolLM3"}
    for family, known in (later | {"gpt_neox": "GPTNeoX", "granite": "Granite", "gpt_oss": "GptOss"}).items():
        config = decoder_config(family, **(shape | {"width": 32}))
        written = hf_config(config)
        assert written["architectures"] == [f"{known}ForCausalLM"]
        assert replace(config_of(written), attention_multiplier=config.attention_multiplier) == config
    with pytest.raises(ConfigError, match="transformers has no GraniteForSequenceClassification"):
        hf_config(decoder_config("granite", **shape), scalar=True)
    # checkpoints from before `family` was kept say llama
    assert hf_config(replace(decoder_config("gpt2", **shape), family="llama"))["model_type"] == "gpt2"
    for family, change in (("gpt2", {"kv_heads": 2}), ("llama", {"positions": "learned"}), ("gpt1", {"mlp_width": 24})):
        with pytest.raises(ConfigError, match="transformers has under some name"):
            hf_config(decoder_config(family, **shape, **change))


@pytest.mark.live
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_as_installed_reads_what_is_written(name):
    # its own model, made from our configuration, has our tensors, and computes our logits
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    data, described = golden(name)
    config = config_of(described)
    written = json.loads(json.dumps(hf_config(config)))
    kind = getattr(transformers, written["architectures"][0])
    theirs = kind(kind.config_class.from_dict(written)).eval()
    own = {key: key.replace("lm_head", "embed_out") if "neox" in name else key for key, _ in theirs.named_parameters()}
    shapes = {own[key]: tuple(value.shape) for key, value in theirs.named_parameters()}
    ours = {w.name.format(layer=i): w.shape for w in weights(config) for i in range(config.layers)}
    assert shapes == ours
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            parameter.copy_(torch.from_numpy(tensor(own[key], shapes[own[key]])))
        logits = theirs(torch.from_numpy(data["row0"])[None]).logits[0].numpy()
    assert_same_logits(logits, data["logits0"])
