"""What released versions left behind is read, computes what it did, and can be continued."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import stored

import rlhfjax
from rlhfjax.integrity import MANIFEST
from rlhfjax.training.checkpoint import FORMAT, find_checkpoint, read_meta

KEPT = Path(__file__).parents[1] / "golden" / "checkpoints"
TOKENS = np.asarray([[5, 9, 33, 17], [40, 21, 8, 2]], np.int32)


@pytest.fixture(params=sorted(path.name for path in KEPT.iterdir()))
def kept(request, tmp_path, monkeypatch):
    """A copy, as the working directory: its configuration names its data without folders."""
    folder = Path(shutil.copytree(KEPT / request.param, tmp_path / request.param))
    monkeypatch.chdir(folder)
    return folder


def test_every_format_has_one():
    formats = {read_meta(find_checkpoint(path / "run"))["format"] for path in KEPT.iterdir()}
    assert formats == set(range(1, FORMAT + 1))


def test_it_computes_what_it_did(kept, caplog):
    expected = stored(kept / "expected.npz")
    model = rlhfjax.load("run")
    np.testing.assert_allclose(model.logits(TOKENS), expected["logits"], rtol=1e-4, atol=1e-5)
    [[completion]] = model.generate(["the film"], max_new_tokens=8, temperature=0.0)
    assert completion.text == str(expected["text"])
    older = not (find_checkpoint("run") / MANIFEST).exists()
    rlhfjax.load("run")
    assert [record.getMessage() for record in caplog.records].count(
        "run/pretrain/checkpoints/2: no digest, since an older version wrote it; what it holds cannot be checked"
    ) == int(older)  # once, however often it is read


def test_it_is_continued_as_it_would_have_been(kept, command):
    # meant to catch an optimizer that starts anew, and a training state that is read otherwise than it was written
    expected = stored(kept / "expected.npz")
    code, _, err = command("run", "recipe.yaml", "--run-dir", "run")
    assert code == 0, err
    assert ("no digest" in err) == (kept.name == "format_1")
    model = rlhfjax.load("run")
    assert model.step_dir == Path("run/pretrain/checkpoints/4")
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert {f"end/{path}" for path in found} == {name for name in expected if name.startswith("end/")}
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[f"end/{path}"], rtol=1e-4, atol=1e-5, err_msg=path)
