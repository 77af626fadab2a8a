"""Shapes and parameter counts from the configuration alone, against the model itself and published sizes."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhfjax.config.model import Architecture, Attention, Embedding, Experts, Model
from rlhfjax.config.shape import active_count, linears, model_shape, parameter_count
from rlhfjax.models import LanguageModel, lora
from rlhfjax.models.decoder import FAMILIES
from rlhfjax.stages.models import new_model

MODELS = [
    Model(layers=2, width=24, heads=4, context=10),
    Model(layers=1, width=24, heads=4, kv_heads=2, mlp_width=20, context=10),
    Model(family="gpt2", layers=3, width=16, heads=2, context=12),
    Model(family="gpt2", layers=1, width=16, heads=2, kv_heads=1, context=12, architecture=Architecture(tied=False)),
    Model(layers=1, width=16, heads=2, context=8, architecture=Architecture(biases=True, norm="layer", head_dim=6)),
    Model(layers=2, width=16, heads=2, context=8, architecture=Architecture(activation="gelu", positions="learned")),
    Model(
        layers=1,
        width=16,
        heads=2,
        context=8,
        architecture=Architecture(attention=Attention(qk_norm=True), norm="layer"),
    ),
    Model(layers=2, width=16, heads=2, context=8, architecture=Architecture(experts=Experts(count=2, per_token=1))),
    Model(layers=1, width=16, heads=2, context=8, architecture=Architecture(embedding=Embedding(mtp_heads=3))),
    *(Model(family=family, layers=2, width=24, heads=4, kv_heads=2, context=10) for family in FAMILIES),
]


@pytest.mark.parametrize("model", MODELS)
def test_agrees_with_the_decoder(model):
    config = new_model(model, 11).config
    ours = dataclasses.asdict(model_shape(model))
    assert ours == {name: getattr(config, name) for name in ours}
    params = jax.eval_shape(LanguageModel(config).init, jax.random.key(0))
    counted = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    assert parameter_count(model_shape(model), 11) == counted


def test_agrees_with_the_encoder_decoder():
    model = Model(family="transformer_2017", layers=3, width=24, heads=4, context=10)
    params = jax.eval_shape(new_model(model, 11, 1).init, jax.random.key(0))
    counted = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    assert parameter_count(model_shape(model), 11) == counted
    found = lora.linears(params)
    assert set(linears(model_shape(model))) == set(found)


def test_the_base_transformer_has_its_published_size():
    # Vaswani et al. 2017, table 3: 65 M parameters, with a vocabulary of about 37,000
    model = Model(family="transformer_2017", layers=6, width=512, heads=8, context=1024)
    assert parameter_count(model_shape(model), 37_000) == pytest.approx(65e6, rel=0.05)


def test_gpt2_small_has_its_published_size():
    # Radford et al. 2019; the released checkpoint holds 124,439,808 parameters.
    model = Model(family="gpt2", layers=12, width=768, heads=12, context=1024)
    assert parameter_count(model_shape(model), 50257) == 124_439_808


def test_tinyllama_has_its_published_size():
    # TinyLlama 1.1B: 1,100,048,384 parameters, output matrix not tied.
    model = Model(
        layers=22, width=2048, heads=32, kv_heads=4, mlp_width=5632, context=2048, architecture=Architecture(tied=False)
    )
    assert parameter_count(model_shape(model), 32000) == 1_100_048_384


def test_mixtral_has_its_published_size():
    # Mixtral 8x7B: 46,702,792,704 parameters in the released files; "13B active" (Jiang et al. 2024, abstract).
    model = Model(family="mixtral", layers=32, width=4096, heads=32, kv_heads=8, mlp_width=14336, context=32768)
    assert parameter_count(model_shape(model), 32000) == 46_702_792_704
    assert active_count(model_shape(model), 32000) == pytest.approx(12.9e9, rel=0.005)


def test_qwen3_30b_a3b_has_its_published_size():
    # 30.5B parameters, 3.3B of them active (model card); the released files hold 30,532,122,624.
    architecture = Architecture(head_dim=128)
    model = Model(
        family="qwen3_moe", layers=48, width=2048, heads=32, kv_heads=4, mlp_width=768, architecture=architecture
    )
    assert parameter_count(model_shape(model), 151936) == 30_532_122_624
    assert active_count(model_shape(model), 151936) == pytest.approx(3.3e9, rel=0.02)
