"""Programs for TPUs, compiled where there is none: libtpu knows the chips. Without it these are skipped."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhfjax.config import schema
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.layout import laid_out_by
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.models.attention import Scoring, attend
from rlhfjax.models.experts import dropless, route
from rlhfjax.planning.hlo import Program
from rlhfjax.sharding import make_mesh, state_shardings
from rlhfjax.sharding.activations import layout_of
from rlhfjax.sharding.sampling import sampling_layout, sampling_on
from rlhfjax.stages.objectives import training_loss
from rlhfjax.target import building_for, target_of
from rlhfjax.training.optimizer import make_optimizer
from rlhfjax.training.update import offline_step
from rlhfjax.types import PromptBatch, TokenBatch, TrainState

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'rlhfjax[tpu]'"
)
KERNEL = 'custom_call_target="tpu_custom_call"'


@pytest.fixture
def mesh(monkeypatch):
    """Four chips of TPU v5e that are not here; in bfloat16 Flax's norms widen types by themselves."""
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    with jax.numpy_dtype_promotion("standard"):
        yield make_mesh(data=2, tensor=2, devices=chips)


def compiled(mesh, length, size, heads=8, scoring=None, shared=False):
    """Splash attention forward and backward of four rows, tokens and heads split as a mesh of training splits them."""
    spec = PartitionSpec("data", "sequence", "tensor")
    query, key = (
        jax.ShapeDtypeStruct((4, length, h, size), jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for h in (heads, 2)
    )
    ids = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(*spec[:2])))

    def gradients(query, key, value, segments, prefixes):
        how = {"scoring": scoring or Scoring(), "prefixes": prefixes if shared else None, "implementation": "splash"}
        program = partial(attend, segments=segments, local=True, **how)
        return jax.vjp(program, query, key, value)[1](query)

    with laid_out_by(layout_of(mesh)):
        return jax.jit(gradients).lower(query, key, key, ids, ids).compile()


@pytest.mark.parametrize(
    ("length", "size", "how"),
    [
        (200, 64, {}),
        (512, 128, {"scoring": Scoring(window=100, softcap=30.0)}),
        (384, 256, {}),
        (1024, 128, {"shared": True}),
    ],
)
def test_splash_attention_compiles_forward_and_backward(mesh, length, size, how):
    text = compiled(mesh, length, size, **how).as_text()
    assert text.count(KERNEL) == 3  # forward, and two of the backward pass


# 16 heads of 32 thousand tokens, or two of which each device has half of the queries
@pytest.mark.parametrize(("heads", "shared"), [(16, False), (2, False), (2, True)])
def test_splash_attention_compiles_where_tokens_are_split(mesh, heads, shared):
    length = 4096 if shared else 32768
    mesh = make_mesh(data=1, sequence=4, devices=list(mesh.devices.flat))
    program = compiled(mesh, length, 128, heads=heads, shared=shared)
    text = program.as_text()
    assert text.count(KERNEL) == 3
    assert f"[4,{length},{heads},128]" not in text  # all tokens of all heads
    assert program.memory_analysis().temp_size_in_bytes < 2**30


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_whole_step_of_training_compiles_with_it(mesh, remat):
    shape = {"vocab_size": 512, "layers": 2, "width": 256, "heads": 4, "kv_heads": 2, "context": 512}
    model = LanguageModel(decoder_config("llama", **shape, dtype="bfloat16", remat=remat, attention="splash"))
    optimizer = make_optimizer(schema.Optimizer(lr=1e-3), 10)

    def fresh(key):
        params = model.init(key)
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    def placed(shapes, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    state = jax.eval_shape(fresh, jax.random.key(0))
    state = placed(state, state_shardings(mesh, state))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    ids, marks = (jax.ShapeDtypeStruct((4, 512), dtype, sharding=rows) for dtype in (jnp.int32, jnp.bool_))
    step = partial(offline_step, training_loss(model), optimizer)
    with building_for(target_of(mesh)), laid_out_by(layout_of(mesh)):
        key = jax.eval_shape(lambda: jax.random.key(0))
        compiled = jax.jit(step, donate_argnums=0).lower(state, TokenBatch(ids, ids, ids, marks), key).compile()
    text = compiled.as_text()
    assert text.count(KERNEL) == (3 if remat == "none" else 4)
    assert "512,512]" not in text  # no matrix of scores


@pytest.mark.parametrize("way", ["tokens travel", "assignments travel"])
def test_each_device_computes_its_own_experts(mesh, way):
    # Forward three products of an assignment, backward two of these again and six more; there is room for 1.25 of them.
    rows, length, width, inner, experts, per_token = 8, 256, 256, 128, 16, {"tokens travel": 4}.get(way, 2)
    mesh = make_mesh(expert=4, devices=list(mesh.devices.flat))
    split = partial(NamedSharding, mesh)
    x = jax.ShapeDtypeStruct((rows, length, width), jnp.bfloat16, sharding=split(PartitionSpec("expert")))
    logits = jax.ShapeDtypeStruct((rows, length, experts), jnp.float32, sharding=x.sharding)
    shapes = [(experts, width, inner), (experts, width, inner), (experts, inner, width)]
    kernels = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split(PartitionSpec("expert"))) for shape in shapes]

    def both_ways(x, logits, kernels):
        def out(x, kernels):
            return dropless(x, *route(logits, per_token, True), tuple(kernels))

        made, back = jax.vjp(out, x, kernels)
        return back(made)

    with building_for(target_of(mesh)), laid_out_by(layout_of(mesh)):
        compiled = jax.jit(both_ways).lower(x, logits, kernels).compile()
    share = rows * length * per_token // 4
    needed = 2 * share * width * inner * (3 + 2 + 6)
    assert needed < Program(compiled.as_text()).walked().total("flops") < 1.3 * needed


def outside_fusions(text):
    """The lines of computations that are no fusion's."""
    fused = False
    for line in text.splitlines():
        if line.endswith("{"):
            fused = "fused_computation" in line.split("(")[0]
        if not fused:
            yield line


def test_a_rollout_copies_no_layer_of_its_cache_and_moves_no_weight(mesh):
    shape = {"vocab_size": 512, "layers": 3, "width": 512, "heads": 4, "kv_heads": 2, "head_dim": 128, "context": 1024}
    model = LanguageModel(decoder_config("llama", **shape, dtype="bfloat16"))
    sampling = SamplingParams(max_new_tokens=128, stop_id=1, pad_id=0)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with building_for(target_of(mesh)):
        params, devices = jax.eval_shape(model.init, jax.random.key(0)), sampling_layout(mesh)
        weights = jax.eval_shape(sampling_on(mesh, model.arrange), params)
        lies = devices.weight_shardings(weights)
        weights = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), weights, lies)
        ids, marks = (jax.ShapeDtypeStruct((16, 128), dtype, sharding=rows) for dtype in (jnp.int32, jnp.bool_))
        prompts = PromptBatch(ids, marks, jax.ShapeDtypeStruct((16,), jnp.int32, sharding=rows))
        run = jax.jit(sampling_on(mesh, lambda *of: generate(model, *of, sampling)))
        text = run.lower(weights, prompts, jax.eval_shape(lambda: jax.random.key(0))).compile().as_text()
    assert KERNEL in text  # splash attention reads the prompts
    assert "all-gather" not in text
    # A layer's slots of the rows and the head of a device are read inside the products, never written elsewhere.
    assert not re.search(r"= bf16\[8,(1,)?256,128\]\S* (fusion|copy|dynamic-slice)\(", "\n".join(outside_fusions(text)))
