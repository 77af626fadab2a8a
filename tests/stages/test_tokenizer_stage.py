"""The stage `tokenizer` takes a tokenizer of either kind, from a directory or from the model to start from."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from tiny import params_of, tiny

from rlhfjax.errors import ConfigError
from rlhfjax.stages.tokenizer import shares
from rlhfjax.stages.tokenizer import tokenizer as tokenizer_stage
from rlhfjax.text.loading import load_tokenizer
from rlhfjax.training.checkpoint import Checkpoints, meta_of

PUBLISHED = Path(__file__).parents[1] / "golden" / "tokenizers" / "byte_level"


def job(folder, *, path=None, checkpoint=None):
    run = SimpleNamespace(tokenizer=SimpleNamespace(path=path), model=SimpleNamespace(checkpoint=checkpoint), seed=0)
    return SimpleNamespace(run=run, dir=folder / "tokenizer")


def test_from_a_hugging_face_directory(tmp_path):
    facts = tokenizer_stage(job(tmp_path, path=str(PUBLISHED)))
    made = load_tokenizer(tmp_path / "tokenizer")
    assert facts == {"vocab_size": made.vocab_size, "fingerprint": load_tokenizer(PUBLISHED).fingerprint}
    assert made.fingerprint == facts["fingerprint"]


def test_from_a_checkpoint_with_one_and_without(tmp_path):
    model = tiny()
    for name, tokenizer in (("with", load_tokenizer(PUBLISHED)), ("without", None)):
        checkpoints = Checkpoints(tmp_path / name / "checkpoints", keep=1)
        checkpoints.save(1, {"policy": params_of(model)}, (jnp.int32(1),), meta_of("policy", model, tokenizer))
        checkpoints.close()
        (tmp_path / name / "complete.json").write_text(json.dumps({"step": 1}))
    facts = tokenizer_stage(job(tmp_path, checkpoint=str(tmp_path / "with")))
    assert facts["fingerprint"] == load_tokenizer(PUBLISHED).fingerprint
    with pytest.raises(ConfigError, match="expected a model with a tokenizer"):
        tokenizer_stage(job(tmp_path, checkpoint=str(tmp_path / "without")))


@pytest.mark.parametrize(
    ("sizes", "total", "given"),
    [([5], 9, [5]), ([5], 3, [3]), ([9, 9, 9], 9, [3, 3, 3]), ([9, 1, 9], 9, [4, 1, 4]), ([2, 7, 1], 6, [2, 3, 1])],
)
def test_every_source_gives_its_share_of_the_documents(sizes, total, given):
    # meant to catch a first source that is large enough for all of them
    assert shares(sizes, total) == given
