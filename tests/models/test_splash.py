"""Which blocks splash attention computes: those that jax's own masks name, and with shared prompts those by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as theirs
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from rlhfjax.models import splash

SIDE = 128


def steps(info):
    """The steps that compute something: (block of queries, block of keys) in turn, by rows of the grid."""
    blocks, used = np.asarray(info.data_next[0]), np.asarray(info.block_mask[0]) > 0
    return blocks, used


# fails with a window one token wider or narrower, and with blocks of keys named by queries: seen
@pytest.mark.parametrize("window", [None, 1, 128, 129, 130, 300, 5000])
def test_blocks_are_those_of_masks_that_look_at_each_pair(window):
    length, sizes = 1024, ("q", "kv", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    square = (length, length)
    mask = masks.CausalMask(square) if window is None else masks.LocalMask(square, (window - 1, 0), 0)
    wanted = theirs.make_splash_mha(
        masks.MultiHeadMask([mask]),
        block_sizes=theirs.BlockSizes(**{f"block_{name}": SIDE for name in sizes}),
        head_shards=1,
        q_seq_shards=1,
    )
    places = np.arange(length, dtype=np.int32)
    seen = splash.causal_blocks(places, length // SIDE, window, SIDE)
    got = splash.kernel_of(seen, places, splash.Earlier(window), side=SIDE, softcap=None)
    for name in ("fwd_mask_info", "dq_mask_info"):
        (mine, used), (others, wanted_used) = (steps(getattr(kernel, name)) for kernel in (got, wanted))
        for row in range(len(mine)):
            assert mine[row][used[row]].tolist() == others[row][wanted_used[row]].tolist()
        assert mine.shape == others.shape  # as many steps
    (mine, used), (others, wanted_used) = (steps(kernel.dkv_mask_info) for kernel in (got, wanted))
    for column in range(mine.shape[1]):
        assert mine[used[:, column], column].tolist() == others[wanted_used[:, column], column].tolist()
    assert mine.shape == others.shape
    pairs = np.subtract.outer(places, places)
    by_pairs = (pairs >= 0) & (pairs < (window or length))
    np.testing.assert_array_equal(got.kwargs["mask_function"](places[:, None], places[None, :]), by_pairs)


def test_blocks_of_a_row_of_128k_tokens_are_found_at_once():
    # masks of jax evaluate 17 billion pairs
    places = np.arange(2**17, dtype=np.int32)
    seen = splash.causal_blocks(places, 256, None, 512)
    assert seen.sum() == 256 * 257 // 2
    assert splash.causal_blocks(places, 256, 4096, 512).sum(axis=1).max() == 9


def shared(*groups):
    """Segments and prefixes of a row: for each group the tokens of its prompt, and of each response."""
    segments, prefixes, name = [], [], 1
    for prompt, *responses in groups:
        for i, count in enumerate((prompt, *responses)):
            segments += [name + i] * count
            prefixes += [name] * count
        name += 1 + len(responses)
    return np.asarray(segments, np.int32), np.asarray(prefixes, np.int32)


@pytest.mark.parametrize(
    "groups", [[(256, 128, 128, 256, 256)], [(300, 200, 12), (1, 70, 70, 71, 300)], [(0, 500, 24), (100, 200, 200)]]
)
def test_blocks_of_shared_prompts_are_those_in_which_a_query_sees_a_key(groups):
    segments, prefixes = shared(*groups)
    length = len(segments)
    rows = SIDE * -(-length // SIDE)
    segments, prefixes = (np.pad(x, (0, rows - length)) for x in (segments, prefixes))
    places = np.arange(rows)
    earlier = places[None, :] <= places[:, None]
    own = earlier & (segments[:, None] == segments[None, :])
    before = earlier & (prefixes[:, None] == segments[None, :]) & (segments[:, None] != segments[None, :])

    def blocks(pairs):
        return pairs.reshape(rows // SIDE, SIDE, rows // SIDE, SIDE).any(axis=(1, 3))

    found = jax.jit(lambda *ids: splash.shared_blocks(places.astype(np.int32), SIDE, *ids))
    seen, codes, prompt = map(np.asarray, found(jnp.asarray(segments), jnp.asarray(prefixes)))
    wanted = np.concatenate([blocks(before), blocks(own)], axis=1)
    assert not (wanted & ~seen).any()
    assert seen.sum() <= wanted.sum() + 2  # a block of two prompts is taken for both
    pairs = splash.OwnOrShared(rows)(codes[:, None], np.arange(2 * rows)[None, :])
    pairs &= prefixes[:, None] == np.concatenate([prompt, prefixes])[None, :]
    real = segments > 0
    np.testing.assert_array_equal(pairs[real], np.concatenate([before, own], axis=1)[real])
