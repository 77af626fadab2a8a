"""Fresh parameters: a run of an earlier version that is done again begins with the same."""

import jax
import numpy as np
import pytest
from tiny import VOCAB, tiny

from rlhfjax.models import EncoderDecoder, EncoderDecoderConfig

ENCODER_DECODER = EncoderDecoder(EncoderDecoderConfig(VOCAB, 2, 16, 4, 24, 32, 1))

# Read off version 3e50ab7, jax 0.10.2.
FIRST = {
    "decoder": {
        ("blocks", "attention", "query", "kernel"): (-0.01841129, 0.01812554),
        ("blocks", "mlp", "down", "kernel"): (-0.01046713, -0.00719367),
        ("embed", "embedding"): (-0.01252266, 0.01274076),
    },
    "encoder-decoder": {
        ("decoder", "blocks", "attention", "key", "kernel"): (-0.16348875, -0.23764294),
        ("decoder", "blocks", "attention", "query", "kernel"): (0.19460993, -0.31618053),
    },
}


@pytest.mark.parametrize(("kind", "model"), [("decoder", tiny()), ("encoder-decoder", ENCODER_DECODER)])
def test_fresh_parameters_are_those_of_earlier_versions(kind, model):
    # fails if flax does not look for what a loop over layers broadcasts, on which the noise depends: seen
    params = model.init(jax.random.key(0))
    for path, first in FIRST[kind].items():
        leaf = params
        for name in path:
            leaf = leaf[name]
        np.testing.assert_allclose(np.asarray(leaf).ravel()[:2], first, rtol=1e-5)  # printed to eight digits
