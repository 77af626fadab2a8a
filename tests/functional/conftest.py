"""Every test here runs with strict promotion: no silent widening of types, no silent broadcasting of ranks."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
