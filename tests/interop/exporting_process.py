"""What each of two processes does for tests/interop/test_shared_work.py: `python FILE COORDINATOR INDEX FOLDER`."""

import sys
import traceback
from pathlib import Path

import jax
import numpy as np
from tiny import params_of

from rlhfjax.host.processes import Place, barrier, started
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.sharding import put, replicated, state_shardings
from rlhfjax.sharding.mesh import make_mesh
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.checkpoint import Checkpoints, meta_of
from rlhfjax.transfer import export_checkpoint, import_model

SETTINGS = {"item": None, "dtype": "bfloat16", "shard_size": 30_000, "force": False}


def model():
    sizes = {"vocab_size": 304, "layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "context": 64}
    return LanguageModel(decoder_config("llama", **sizes))


def params():
    return jax.tree.map(lambda leaf: leaf / 4, params_of(model()))


def failed(error):
    traceback.print_exception(error)
    return 1


def main(coordinator, index, folder):
    """Save on a mesh over both processes, export, and import again."""
    place = Place(coordinator, 2, index, coordinator)
    with started(place, heartbeat=60, timeout=600, say=print, failed=failed):
        mesh, host = make_mesh(1, 4, 1, 2), params()
        laid = jax.tree.map(put, jax.tree.map(np.asarray, host), state_shardings(mesh, host))
        tokenizer = Tokenizer.train(["a good movie, a bad one"], 300)
        checkpoints = Checkpoints(folder / "sft" / "checkpoints", keep=1)
        checkpoints.save(
            7, {"policy": laid}, (put(np.int32(7), replicated(mesh)),), meta_of("policy", model(), tokenizer)
        )
        checkpoints.close()
        barrier("saved")
        export_checkpoint(str(folder / "sft"), folder / "two" / "made", **SETTINGS)
        import_model(
            str(folder / "two" / "made"), folder / "imported", dtype="float32", force=False, report=lambda _: None
        )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
