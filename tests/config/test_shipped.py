"""The configurations that come with the package, from a checkout and from a wheel."""

import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rlhfjax.config import check, least_devices, load_config, shipped

ROOT = Path(__file__).parents[2]
NAMES = ("arithmetic", "instructgpt_175b", "instructgpt_1b3", "instructgpt_6b", "movies", "quickstart", "reversal")


def test_all_are_found_with_a_description():
    found = shipped()
    assert set(NAMES) <= set(found)
    for name, (path, description) in found.items():
        assert path.stem == name
        assert description
        assert "\n" not in description


@pytest.mark.parametrize("name", list(shipped()))
def test_each_is_valid_on_its_own_mesh(name):
    run = load_config(name)
    assert run.name == name
    check(run, least_devices(run.mesh))


@pytest.mark.parametrize(
    ("name", "layers", "width", "sft_size", "sft_lr", "value_lr"),
    [
        ("instructgpt_1b3", 24, 2048, 32, 5e-6, 9e-6),
        ("instructgpt_6b", 32, 4096, 32, 1.04e-5, 9e-6),
        ("instructgpt_175b", 96, 12288, 8, 2.45e-6, 5e-6),
    ],
)
def test_instructgpt_values_are_the_published_ones(name, layers, width, sft_size, sft_lr, value_lr):
    # Brown et al. 2020, table 2.1; Ouyang et al. 2022, appendices C.2 to C.4.
    run = load_config(name)
    sft, reward, ppo = run.stages.sft, run.stages.reward, run.stages.ppo
    assert (run.model.layers, run.model.width, run.model.context) == (layers, width, 2048)
    assert (sft.epochs, sft.batch.size, sft.optimizer.lr, sft.pretraining.fraction) == (2, sft_size, sft_lr, 0.1)
    assert (reward.epochs, reward.batch.size, reward.optimizer.lr, reward.batch.candidates) == (1, 64, 9e-6, 9)
    assert ppo.steps * ppo.batch.size == 256_000
    assert (ppo.batch.size, ppo.batch.minibatch, ppo.batch.epochs, ppo.loss.clip) == (512, 64, 1, 0.2)
    assert (ppo.kl.coef, ppo.sampling.temperature, ppo.returns.gamma, ppo.ptx.ratio) == (0.02, 1.0, 1.0, 8)
    assert (ppo.value.lr, ppo.optimizer.ema_decay) == (value_lr, 0.992)
    assert (ppo.optimizer.schedule, ppo.optimizer.warmup_steps, ppo.optimizer.warmup_from) == ("constant", 80, 0.1)
    for stage in (sft, reward, ppo):
        assert (stage.optimizer.b1, stage.optimizer.b2) == (0.9, 0.95)
    for stage in (sft, reward):
        assert (stage.optimizer.schedule, stage.optimizer.final) == ("cosine", 0.1)
    pretrain = run.stages.pretrain
    assert math.isclose(pretrain.steps * pretrain.batch.size * 2048, 300e9, rel_tol=1e-3)


def test_a_wheel_brings_them_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    for name in ("README.md", "LICENSE"):
        (source / name).touch()
    for name in ("rlhfjax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    wheel = next(tmp_path.glob("rlhfjax-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    for name in NAMES:
        inside = tmp_path / "installed" / "rlhfjax" / "configs" / f"{name}.yaml"
        assert inside.read_bytes() == (ROOT / "configs" / f"{name}.yaml").read_bytes()
    # Isolated from the checkout: the shipped names resolve inside what was installed.
    program = "import sys; sys.path.insert(0, sys.argv[1]); from rlhfjax.config import load_config, shipped; "
    program += "load_config('quickstart'); print(shipped()['quickstart'][0])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "installed")],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()) == tmp_path / "installed" / "rlhfjax" / "configs" / "quickstart.yaml"
