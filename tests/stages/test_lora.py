"""Adapters through SFT, reward model and PPO: what is trained, what is shared, and what a checkpoint holds.

`sharded` adapts what a pretraining left as `model.checkpoint`, on eight devices as 2 x 2 x 2; `adapted` is a run with
its own pretraining, on one device.
"""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import VOCAB, params_of, random_tokens, tiny

import rlhfjax
from rlhfjax.algorithms import restrict
from rlhfjax.config import load_config
from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.models.lora import init_lora, join, linears, split
from rlhfjax.runs import run_recipe
from rlhfjax.sharding import make_mesh
from rlhfjax.sharding.rules import path_name
from rlhfjax.stages import offline, online
from rlhfjax.stages.job import Job
from rlhfjax.stages.objectives import language_modelling
from rlhfjax.training.checkpoint import find_checkpoint, load_model, read_meta, save_model
from rlhfjax.training.update import offline_step
from rlhfjax.types import TokenBatch, TrainState
from stages.conftest import assert_same_bits, rows_of, saved
from stages.once import keeping, once
from stages.tiny_recipe import STEPS, recipe

LORA = {"rank": 2, "alpha": 8.0, "targets": ["attention/(query|value)", "mlp/up"]}
TRAINED = ("sft", "reward", "ppo")
MESH = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]


@pytest.fixture(scope="module")
def adapted(files, finished, command, tmp_path_factory):
    """The directory of a finished run on one device, over the pretraining of the run without adapters."""
    folder = tmp_path_factory.mktemp("adapted")
    settings = recipe(files)
    settings["model"]["lora"] = LORA
    (folder / "lora.yaml").write_text(json.dumps(settings), encoding="utf-8")
    pretrained(finished, folder / "run")
    code, _, err = command("run", folder / "lora.yaml", "--run-dir", folder / "run")
    assert code == 0, err
    return folder / "run"


def pretrained(finished, run_dir):
    """A run directory with what the finished run has before its SFT."""
    for stage in ("tokenizer", "pretrain"):
        shutil.copytree(finished / stage, run_dir / stage)
    return run_dir


@pytest.fixture(scope="module")
def sharded(files, finished, tmp_path_factory):
    """A run on eight devices: its directory, its configuration, its programs, and what was there when PPO sampled."""
    folder = tmp_path_factory.mktemp("sharded")
    settings = recipe(files) | {"model": {"checkpoint": str(finished / "pretrain"), "lora": LORA}}
    settings["checkpoints"]["keep"] = STEPS
    settings["stages"] |= {"pretrain": None, "evaluate": None}
    del settings["tokenizer"]
    (folder / "lora.yaml").write_text(json.dumps(settings), encoding="utf-8")
    run = load_config(str(folder / "lora.yaml"), MESH)
    held = jax.live_arrays()  # kept, so that no other array gets the id of one of them
    before = {id(array) for array in held}
    live, loop, programs = [], online.train_online, {}

    def watched(steps, state, *args, **kwargs):
        def rollout(*inputs):
            live.clear()  # of earlier iterations nothing is to be kept here
            live.append([array for array in jax.live_arrays() if id(array) not in before])
            return steps.rollout(*inputs)

        watching = SimpleNamespace(**vars(steps) | {"rollout": rollout})
        return loop(watching, state, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "train_online", watched)
        for module in (offline, online):
            patch.setattr(module, "Ahead", keeping(programs))
        run_recipe(run, folder / "run")
        buffers = {a.addressable_data(0).unsafe_buffer_pointer(): a for a in live[-1] if not a.is_deleted()}
    shapes = Counter((array.shape, array.dtype.name) for array in buffers.values())
    return SimpleNamespace(run=run, dir=folder / "run", shapes=shapes, programs=programs)


def leaves(tree):
    """Leaves by path."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def base_leaves(tree):
    """Of policy and scalar models alike: everything but adapters and head."""
    return {name.removeprefix("decoder/"): leaf for name, leaf in leaves(split(tree)[0]).items()}


@pytest.mark.parametrize("stage", TRAINED)
def test_the_base_stays_as_it_was_and_the_adapters_move(finished, sharded, stage):
    # meant to catch a base that a later stage moves, a base of another type, and a stage that begins anew
    base = leaves(rlhfjax.load(finished / "pretrain").params)
    model = rlhfjax.load(sharded.dir / stage)
    assert model.config.lora_alpha == LORA["alpha"]
    kept = base_leaves(model.params)
    assert kept.keys() == base.keys()
    for name in base:
        np.testing.assert_array_equal(kept[name], base[name])
    start = leaves(split(rlhfjax.load(sharded.dir / "sft").params)[1]) if stage != "sft" else {}
    for name, leaf in leaves(split(model.params)[1]).items():
        if "lora_" in name:
            assert np.abs(leaf).max() > 0
            if start:
                moved = np.abs(leaf - start[name.removeprefix("decoder/")]).max()
                assert 0 < moved < 0.1, name  # four small steps away from the SFT model's


@pytest.mark.parametrize(
    ("stage", "models"), [("sft", ["policy"]), ("reward", ["reward"]), ("ppo", ["policy", "value"])]
)
def test_a_checkpoint_holds_adapters_heads_and_their_moments(sharded, stage, models):
    step = sharded.dir / stage / "checkpoints" / str(STEPS)
    held = saved(step)
    items = Counter(name.split("[")[0] for name in held)
    adapters, head = 2 * len(LORA["targets"]) + 2, 2
    sizes = {"policy": adapters, "reward": adapters + head, "value": adapters + head}
    assert {name: items[name] for name in models} == {name: sizes[name] for name in models}
    trained = sum(sizes[name] for name in models)
    # two moments a leaf; the rest are counters and the KL coefficient
    assert sum(leaf.ndim > 0 for name, leaf in held.items() if name.startswith("training")) == 2 * (
        trained - sum(name in ("reward", "value") for name in models)
    )
    assert set(items) <= {*models, "training", "average"}
    assert items["average"] in (0, sizes[models[0]])
    meta = read_meta(step)
    assert meta["lora"] == LORA
    assert (step / meta["base"]["path"]).resolve() == find_checkpoint(sharded.dir / "base").resolve()
    facts = json.loads((sharded.dir / stage / "complete.json").read_text(encoding="utf-8"))
    if stage != "ppo":
        whole, part = (sum(leaf.size for leaf in jax.tree.leaves(t)) for t in _whole_and_trained(sharded.dir / stage))
        assert (facts["parameters"], facts["trainable_parameters"]) == (whole, part)


def _whole_and_trained(stage):
    params = rlhfjax.load(stage).params
    return params, split(params)[1]


@pytest.mark.slow  # `test_devices.py` has that of the whole recipe without them
@pytest.mark.parametrize("stage", TRAINED)
def test_the_numbers_are_those_of_one_device(adapted, sharded, stage):
    names = {
        "sft": ["loss/train", "loss/validation", "grad/norm"],
        "reward": ["train/rm/loss", "train/rm/accuracy", "eval/rm/accuracy", "grad/norm"],
        "ppo": ["objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "grad/policy_norm"],
    }[stage]
    many, one = (rows_of(run_dir / stage / "metrics.jsonl") for run_dir in (sharded.dir, adapted))
    assert len(many) == len(one) == STEPS
    for row, expected in zip(many, one, strict=True):
        wanted = {name: expected[name] for name in names if name in expected}
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)


def test_the_policy_starts_as_the_reference(sharded):
    # meant to catch a policy with fresh adapters beside a reference with those of SFT
    first, *_, last = rows_of(sharded.dir / "ppo" / "metrics.jsonl")
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert last["objective/kl"] != pytest.approx(0, abs=1e-5)


def test_ppo_holds_the_base_once(sharded):
    """Policy, reference, value model, reward model and average are five models over one base.

    Meant to catch a base in the state, a copy that a donation or a layout makes, and a base that is read twice. What
    sampling reads on a mesh are weights of their own, the table twice: to look words up, and for logits.
    """
    base = leaves(load_model(find_checkpoint(sharded.dir / "base"))[1])
    for name, leaf in base.items():
        alike = sum(other.shape == leaf.shape for other in base.values())
        assert sharded.shapes[leaf.shape, "float32"] <= alike + _others(name), name
    assert sharded.shapes[base["embed/embedding"].shape, "float32"] == 3
    assert sharded.shapes[base["blocks/mlp/down/kernel"].shape, "float32"] == 1


def _others(name):
    # vectors of the width: heads, their moments and the frozen reward model's, norms that sampling reads
    return 9 if "norm" in name else 2 if "embed" in name else 0


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_that_stopped_ends_the_same(sharded, monkeypatch, tmp_path, stage):
    for module in (offline, online):
        monkeypatch.setattr(module, "Ahead", once(sharded.programs))
    run_dir = tmp_path / "run"
    shutil.copytree(sharded.dir, run_dir)
    (run_dir / stage / "complete.json").unlink()
    for step in range(3, STEPS + 1):
        shutil.rmtree(run_dir / stage / "checkpoints" / str(step))
    run_recipe(sharded.run, run_dir, only=stage)
    assert_same_bits(*(saved(place / stage / "checkpoints" / str(STEPS)) for place in (run_dir, sharded.dir)))


def test_a_run_can_be_moved_and_a_stage_alone_cannot(sharded, tmp_path):
    shutil.copytree(sharded.dir, tmp_path / "moved")
    want = rlhfjax.load(sharded.dir).logits(jnp.ones((1, 4), jnp.int32))
    np.testing.assert_array_equal(rlhfjax.load(tmp_path / "moved").logits(jnp.ones((1, 4), jnp.int32)), want)
    shutil.copytree(sharded.dir / "sft", tmp_path / "alone" / "sft")
    with pytest.raises(IntegrityError, match=r"holds adapters of the model in .*alone/base.*not there"):
        rlhfjax.load(tmp_path / "alone" / "sft")


def test_adapters_may_be_chosen_anew_until_a_stage_has_trained_them(config, finished, sharded, tmp_path):
    with pytest.raises(ConfigError, match=r"another configuration: model\.lora\.rank 2 -> 4"):
        run_recipe(load_config(str(sharded.dir / "config.yaml"), ["model.lora.rank=4"]), sharded.dir)
    run_dir = pretrained(finished, tmp_path / "run")
    for rank in (2, 4):
        run = load_config(config, [f"model.lora={json.dumps(LORA | {'rank': rank})}"])
        run_recipe(run, run_dir, only="pretrain")  # is done, and has nothing to say against it
        assert load_config(str(run_dir / "config.yaml")) == run


def test_adapters_refuse_another_base(sharded, tmp_path):
    shutil.copytree(sharded.dir, tmp_path / "run")
    base = find_checkpoint(tmp_path / "run" / "base")
    _, params = load_model(base)
    save_model(base, "policy", jax.tree.map(lambda leaf: leaf + 1, params), read_meta(base))
    with pytest.raises(IntegrityError, match=r"expected the base with digest .* its adapters belong to another model"):
        rlhfjax.load(tmp_path / "run" / "ppo")


@pytest.mark.parametrize("lora", [None, LORA | {"rank": 3}])
def test_a_run_may_start_from_adapters(finished, sharded, tmp_path, lora):
    """They are merged into its base; the model that it starts from is the same one."""
    settings = sharded.run.model.model_copy(update={"checkpoint": str(sharded.dir / "sft")})
    settings = type(settings).model_validate(settings.model_dump(exclude_unset=True) | {"lora": lora})
    run, mesh = sharded.run.model_copy(update={"model": settings}), make_mesh(devices=jax.devices()[:1])
    shutil.copytree(finished / "tokenizer", tmp_path / "tokenizer")
    model, params = Job(run, "sft", tmp_path, tmp_path, mesh, print, {}).policy_from("pretrain")
    tokens = random_tokens(1, 6, high=300)
    want = rlhfjax.load(sharded.dir / "sft")
    assert np.abs(want.logits(tokens) - rlhfjax.load(finished / "pretrain").logits(tokens)).max() > 1e-3
    np.testing.assert_allclose(model.logits(params, tokens, jnp.ones((1, 6), bool)), want.logits(tokens), atol=1e-5)
    ranks = {leaf.shape[-1] for name, leaf in leaves(params).items() if name.endswith("lora_a")}
    assert ranks == ({3} if lora else set())


@pytest.mark.slow  # their gradients are in tests/models/test_lora.py
def test_of_full_rank_they_learn_what_all_weights_do():
    """Texts learnt by heart: adapters of full rank come as far as the matrices themselves, those of rank 1 do not."""
    model = tiny(width=16, heads=2)
    base = params_of(model, std=0.3)
    tokens = random_tokens(8, 16, seed=4)
    batch = TokenBatch(tokens, jnp.ones_like(tokens), jnp.tile(jnp.arange(16), (8, 1)), jnp.ones(tokens.shape, bool))
    algorithm = language_modelling(model)

    def loss_after(trained, whole, steps=300):
        optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps))
        step = jax.jit(lambda s, k: offline_step(restrict(algorithm, whole), optimizer, s, batch, k))
        state = TrainState(trained, optimizer.init(trained), jnp.int32(0))
        for _ in range(steps):
            state, metrics = step(state, jax.random.key(0))
        return float(metrics["loss/train"])

    def adapters(rank, *targets):
        fresh = init_lora(jax.random.key(1), base, rank, targets)
        return loss_after(fresh, lambda p: join(base, p))

    matrices = {name: {"kernel": kernel} for name, kernel in linears(base).items()}

    def with_matrices(p):
        whole = base
        for name, leaf in p.items():
            block, own = name.split("/")[1:]
            part = whole["blocks"][block]
            whole = whole | {"blocks": whole["blocks"] | {block: part | {own: part[own] | leaf}}}
        return whole

    full, high, low = loss_after(matrices, with_matrices), adapters(VOCAB, "."), adapters(1, "query")
    assert high < full + 0.15
    assert low > full + 0.5
