"""Rematerialisation: what a layer keeps for its backward pass; the rest is computed again (Chen et al. 2016)."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"  # what a linear layer gives, which a rule of its own for gradients hides from jax
_KEPT, _HALFWAY = "attention", "halfway"

POLICIES: dict[str, Any] = {
    "full": None,  # nothing but the layer's input
    # And what comes after attention, which on several devices of `tensor` takes a sum over them to find again.
    "halves": jax.checkpoint_policies.save_only_these_names(_HALFWAY),
    "dots": jax.checkpoint_policies.save_from_both_policies(  # products with weights
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    # Queries, keys, values and what attention gives: norms and the feed-forward block, the largest part, come twice.
    "attention": jax.checkpoint_policies.save_only_these_names(_KEPT),
    # The same, kept in the host's memory until the backward pass.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_KEPT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def keep(*arrays: Any) -> Any:
    """The same arrays, marked as what the policies `attention` and `offload` keep."""
    kept = tuple(checkpoint_name(array, _KEPT) for array in arrays)
    return kept[0] if len(kept) == 1 else kept


def halfway(x: Any) -> Any:
    """The residual stream between attention and the feed-forward block, marked as what the policy `halves` keeps."""
    return checkpoint_name(x, _HALFWAY)


def again(function: Any) -> Any:
    """`function`, of which only the inputs are kept for the backward pass whatever the policy: for what is cheap."""
    return jax.checkpoint(function, prevent_cse=False)
