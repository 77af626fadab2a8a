"""Launch files: one run on SLURM, Kubernetes, TPU machines and others, each ending in the same `rlhfjax run`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import jinja2

from rlhfjax.errors import ConfigError
from rlhfjax.launch.needs import Needs, slice_of
from rlhfjax.launch.words import FILTERS, image_name, is_shared, job_name, plain, words

PORT = 8476  # of process 0, where pods and machines have addresses of their own
_MOUNTED = "/config/config.yaml"  # a configuration of this machine, in a pod


@dataclass(frozen=True)
class Target:
    """A way to launch: its template, the devices that it is for, and what it cannot do without."""

    template: str
    devices: tuple[str, ...]
    image: bool  # whether it runs an image
    shared: bool  # whether its machines have no directory in common
    mounts: bool = False  # whether it takes a configuration file of this machine with it


TARGETS: Mapping[str, Target] = {
    "slurm": Target("slurm.sbatch.j2", ("gpu", "cpu"), image=False, shared=False),
    "jobset-tpu": Target("jobset.yaml.j2", ("tpu",), image=True, shared=True, mounts=True),
    "jobset-gpu": Target("jobset.yaml.j2", ("gpu",), image=True, shared=True, mounts=True),
    "xpk": Target("xpk.sh.j2", ("tpu",), image=True, shared=True),
    "gcluster": Target("gcluster.sh.j2", ("tpu",), image=True, shared=True),
    "sky": Target("sky.yaml.j2", ("gpu",), image=False, shared=True),
    "dstack": Target("dstack.yml.j2", ("gpu",), image=True, shared=True),
    "tpu-vm": Target("tpu_vm.sh.j2", ("tpu",), image=False, shared=True),
}
TOPOLOGIES = {"tpu": "v5p:2x2x2", "gpu": "h100:8"}  # where none is given


@dataclass(frozen=True)
class Order:
    """A run to launch: the words of its command, where it is, what it needs, and the command that renders it.

    `text` is the configuration where that is a file of this machine, and not one that rlhfjax ships.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    run_dir: str
    needs: Needs
    command: str
    image: str | None = None
    text: str | None = None


def render(target: str, order: Order) -> str:
    """The launch file. Raises ConfigError for what the target cannot do, and for words that no file can hold."""
    facts, needs = TARGETS[target], order.needs
    if needs.platform not in facts.devices:
        raise ConfigError(f"{target}: expected {' or '.join(facts.devices)}, got {needs.platform} ({needs.topology})")
    if facts.image and order.image is None:
        raise ConfigError(f"--image: {target} runs an image; expected one with rlhfjax in it, such as of launch/docker")
    if facts.shared and not is_shared(order.run_dir):
        raise ConfigError(
            f"--run-dir: expected gs://… or s3://…, since machines of {target} share no directory, got {order.run_dir}"
        )
    if target == "tpu-vm" and needs.slices > 1:
        raise ConfigError(f"--slices: expected 1, which a script can watch, got {needs.slices}; use jobset-tpu or xpk")
    mounted = order.text is not None and facts.mounts
    config = _MOUNTED if mounted else plain("CONFIG", order.config)
    run_dir = plain("--run-dir", order.run_dir)
    overrides = [plain("KEY=VALUE", each) for each in order.overrides]
    doctor, run = (["rlhfjax", verb, config, *overrides, "--run-dir", run_dir] for verb in ("doctor", "run"))
    if target == "dstack" and any("${{" in word for word in run):
        raise ConfigError("dstack: expected no ${{ in CONFIG, --run-dir and KEY=VALUE; it would put something in")
    return (
        _environment()
        .get_template(facts.template)
        .render(
            _devices(needs),
            name=job_name(order.name),
            command=plain("the command", order.command),
            image=None if order.image is None else image_name(order.image),
            needs=needs,
            doctor=doctor,
            run=run,
            inside=f"{words(doctor)} && exec {words(run)}",  # what a shell of the container is given
            text=order.text if mounted else None,
            port=PORT,
        )
    )


def _devices(needs: Needs) -> dict[str, object]:
    """What schedulers call the devices, and memory and disk in their units, rounded up; 0 where nobody knows."""
    found: dict[str, object] = {
        "memory_mb": -(-needs.host_memory_bytes // 10**6),
        "memory_gb": -(-needs.host_memory_bytes // 10**9),
        "disk_gb": -(-needs.disk_bytes // 10**9),
        "gpu_kind": needs.topology.partition(":")[0],
        "resource": {"tpu": "google.com/tpu"}.get(needs.platform, "nvidia.com/gpu"),
    }
    if needs.platform == "tpu":
        chip, _ = slice_of(needs.topology)
        found |= {
            "gke_accelerator": chip.gke,
            "gke_topology": needs.topology.partition(":")[2],
            "runtime": chip.runtime,
        }
    return found


@cache
def _environment() -> jinja2.Environment:
    # No template is HTML: what is put in goes through the filter of its place.
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("rlhfjax.launch"),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters.update(FILTERS)
    return found
