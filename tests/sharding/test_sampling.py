"""A cache on eight devices: split as the rules say, and the tokens of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import left_mask, params_of, random_tokens, tiny

from rlhfjax.generation import SamplingParams, generate
from rlhfjax.sharding import make_mesh, place_batch, state_shardings
from rlhfjax.sharding.sampling import ShardedSampler, cache_spec
from rlhfjax.types import PromptBatch

BATCH = ("data", "fsdp", "expert")
SAMPLING = SamplingParams(max_new_tokens=5, stop_id=1, pad_id=0, stop_ids=(2, 3))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


def test_rows_go_over_the_batch_axes_and_heads_over_tensor(mesh):
    assert cache_spec(mesh, (8, 2, 16, 32)) == PartitionSpec(BATCH, "tensor", None, None)
    assert cache_spec(mesh, (2, 8, 32, 4, 16)) == PartitionSpec(None, BATCH, None, "tensor", None)
    assert cache_spec(mesh, (8,)) == PartitionSpec(BATCH)
    assert cache_spec(mesh, (6, 3, 16, 32)) == PartitionSpec(None, None, None, None)  # 6 rows for 4, 3 heads for 2


@pytest.mark.parametrize("slots", [None, 4])
def test_a_split_cache_draws_the_tokens_of_one_device(mesh, slots):
    model, sampling = tiny("llama-gqa", layers=1), SamplingParams(**vars(SAMPLING) | {"slots": slots})
    params, uid = params_of(model), jnp.arange(8, dtype=jnp.int32)
    prompts = PromptBatch(random_tokens(8, 6), left_mask([6, 1, 3, 2, 5, 3, 4, 6], 6), uid)
    wanted = jax.jit(lambda p, b, k: generate(model, p, b, k, SAMPLING))(params, prompts, jax.random.key(3))
    sampler, seen = ShardedSampler(model, mesh), []

    def run(params, prompts, key):
        cache = sampler.prefill(params, prompts.tokens, prompts.mask, 2)[1]
        jax.debug.inspect_array_sharding(cache.keys[0], callback=seen.append)
        return generate(sampler, params, prompts, key, sampling)

    laid = jax.device_put(params, state_shardings(mesh, params)), place_batch(mesh, prompts)
    made = jax.jit(run)(*laid, jax.random.key(3))
    np.testing.assert_array_equal(made.response, wanted.response)
    np.testing.assert_array_equal(made.response_mask, wanted.response_mask)
    rows, heads = len(prompts.tokens), model.config.kv_heads
    assert seen[0].shard_shape((rows, heads, 8, 8)) == (rows // 4, heads // 2, 8, 8)
