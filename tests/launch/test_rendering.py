"""Launch files for any run: words stay words in every one of them, and what cannot work is refused."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.errors import ConfigError
from rlhfjax.launch.needs import Needs, of_topology
from rlhfjax.launch.rendering import TARGETS, TOPOLOGIES, Order, render
from rlhfjax.launch.words import image_name, job_name

HOSTILE = (
    "a b", "it's", 'say "x"', "$(touch broken)", "`touch broken`", "${HOME}", "$(HOSTNAME)", "$$(A)", "$HOME",
    "a;touch broken", "a&&b", "a\\b", "*", "#x", "{{ 7 * 7 }}", "{% raw %}", "é… 字", "a: b", "'; touch broken; '",
    "$'x'", "!x", "%s", "~", "<<END", "END", "SCRIPT", "a,b", "[1, {x: 'y'}]", "\\$x", "x' \"y\"", ")", "*x", "&x", "|",
    ">", "@", "@sha256",
)  # fmt: skip
CONFIG, RUN_DIR = "my $(x) 'config' \"é\".yaml", "gs://my-bucket/a b/$HOME/'x'"
OVERRIDES = tuple(f"key{i}={text}" for i, text in enumerate(HOSTILE))
DOCTOR, RUN = ([verb, CONFIG, *OVERRIDES, "--run-dir", RUN_DIR] for verb in ("doctor", "run"))


def order(target, **changes):
    needs = of_topology(TOPOLOGIES[TARGETS[target].devices[0]], 2, 1)
    return replace(
        Order("My_Run 1", CONFIG, OVERRIDES, RUN_DIR, needs, "rlhfjax launch render", "registry.example.com/x:1"),
        **changes,
    )


# Words ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    """Runs bash with stand-ins for programs, which note what they are given: their argument lists, in order."""
    for name, body in {
        "rlhfjax": "",
        "xpk": "",
        "gcluster": "",
        "gcloud": "",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"\n',
        "scontrol": 'if [[ "$1" == show && "$2" == hostnames ]]; then echo n1; fi; echo JobState=RUNNING\n',
        "systemctl": "exit 1\n",
        "python3": "",
        "sudo": "",
        "uv": "",
    }.items():
        tell = "import json, sys; print(json.dumps(sys.argv[1:]))"
        note = f'{sys.executable} -c "{tell}" "${{0##*/}}" "$@" >> {tmp_path}/notes\n'
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{note}{body}")
        path.chmod(0o755)
    (tmp_path / "work").mkdir()

    def run(script, *arguments, **variables):
        (tmp_path / "notes").write_text("")
        given = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path / "home"), "LANG": "C.UTF-8"}
        done = subprocess.run(
            ["bash", "-c", script, "launch", *arguments],
            env=given | variables,
            cwd=tmp_path / "work",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / "work").iterdir()) == []  # nothing was touched
        return [json.loads(line) for line in (tmp_path / "notes").read_text(encoding="utf-8").splitlines()]

    run.home = tmp_path / "home"
    run.bin = tmp_path / "bin"
    return run


def as_kubernetes(text):
    """What a container gets of a text in its command, as Kubernetes documents it, where these variables are set."""
    known = {"HOSTNAME": "pod-0", "HOME": "/root", "A": "b"}
    found, i = "", 0
    while i < len(text):
        name = re.match(r"\$\(([^()]*)\)", text[i:])
        if text[i : i + 2] == "$$":
            found, i = found + "$", i + 2
        elif name and name[1] in known:
            found, i = found + known[name[1]], i + len(name[0])
        else:
            found, i = found + text[i], i + 1
    return found


def runs_of(noted):
    return [words[1:] for words in noted if words[0] == "rlhfjax"]


def test_words_of_people_stay_words_in_slurm(recorded):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"}
    assert runs_of(recorded(render("slurm", order("slurm", image=None)), **slurm)) == [DOCTOR, RUN]


def test_words_of_people_stay_words_in_xpk_and_gcluster(recorded):
    for target in ("xpk", "gcluster"):
        [words] = recorded(render(target, order(target)), "--more", "a b", CLUSTER="c")
        assert words[-2:] == ["--more", "a b"]
        assert runs_of(recorded(as_kubernetes(words[words.index("--command") + 1]))) == [DOCTOR, RUN]


@pytest.mark.parametrize(("target", "where"), [("sky", ("run",)), ("dstack", ("commands", 0))])
def test_words_of_people_stay_words_in_sky_and_dstack(recorded, target, where):
    found = yaml.safe_load(render(target, order(target)))
    for key in where:
        found = found[key]
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    dstack = {"DSTACK_MASTER_NODE_IP": "10.0.0.1", "DSTACK_NODES_NUM": "2", "DSTACK_NODE_RANK": "1"}
    tell = 'echo "$RLHFJAX_COORDINATOR $RLHFJAX_NUM_PROCESSES $RLHFJAX_PROCESS_ID" > ~/place\n'
    recorded.home.mkdir()
    (recorded.bin / "rlhfjax").write_text((recorded.bin / "rlhfjax").read_text() + tell)
    assert runs_of(recorded(found, **sky, **dstack)) == [DOCTOR, RUN]
    assert (recorded.home / "place").read_text() == "10.0.0.1:8476 2 1\n"


def test_words_of_people_stay_words_on_tpu_machines(recorded):
    for part, program in ((".local/bin", "uv"), ("rlhfjax-venv/bin", "rlhfjax")):
        (recorded.home / part).mkdir(parents=True)
        (recorded.home / part / program).symlink_to(recorded.bin / program)
    script = render("tpu-vm", order("tpu-vm", image=None))
    [words] = recorded(script, "run", ZONE="z", RLHFJAX_INSTALL="my 'package'")
    assert words[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "my-run-1", "--zone"]
    noted = recorded(words[words.index("--command") + 1])
    assert [
        "uv",
        "pip",
        "install",
        "--quiet",
        "--python",
        f"{recorded.home}/rlhfjax-venv/bin/python",
        "my 'package'",
    ] in noted
    assert runs_of(recorded('"$HOME"/rlhfjax-train')) == [DOCTOR, RUN]


@pytest.mark.parametrize("target", ["jobset-tpu", "jobset-gpu"])
def test_words_of_people_stay_words_in_kubernetes(target):
    text = "name: x # 'é'\nsecond: \"$(HOME)\"\n---\n"
    [jobset, config, _] = yaml.safe_load_all(render(target, order(target, text=text)))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    given = [
        [word.replace("$$", "$") for word in one["command"]] for one in (*pod["initContainers"], *pod["containers"])
    ]
    assert given == [["rlhfjax", words[0], "/config/config.yaml", *words[2:]] for words in (DOCTOR, RUN)]
    assert config["data"] == {"config.yaml": text}


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\x00b", "a\x1b[2Jb", "a\u2028b", "a\x85b", "-rf", "", "a\ud800"])
@pytest.mark.parametrize("place", ["config", "run_dir", "overrides"])
def test_what_no_file_can_hold_is_refused_everywhere(place, text):
    for target in TARGETS:
        value = {"config": text, "run_dir": f"gs://b/{text}" if text else "", "overrides": (text,)}[place]
        if place == "run_dir" and text.startswith("-"):
            continue  # no dash at the beginning of an address
        with pytest.raises(ConfigError):
            render(target, order(target, **{place: value}))


def test_dstack_puts_nothing_in():
    with pytest.raises(ConfigError, match="expected no"):
        render("dstack", order("dstack", overrides=("key=${{ secrets.x }}",)))


@pytest.mark.parametrize("image", ["a b", "$(x)", "x:", "-x", "x@sha256:12", "a\nb", "", "x;y", "x'y"])
def test_images_are_names_of_images(image):
    with pytest.raises(ConfigError, match="--image"):
        image_name(image)


def test_names_are_what_schedulers_take():
    assert job_name("InstructGPT_1b3 (new)") == "instructgpt-1b3-new"
    assert len(job_name("x" * 100)) == 40
    for name in ("", "---", "1b3", "é"):
        with pytest.raises(ConfigError):
            job_name(name)


# Needs ---------------------------------------------------------------------------------------------------------------


def test_a_plan_fills_in_grace_memory_and_disk(tmp_path):
    needs = Needs("gpu", "h100:2x8", 1, 16, 2, 8, 120, 200_000_000_001, 10**12 + 1)
    slurm = render("slurm", order("slurm", needs=needs, image=None))
    assert "#SBATCH --signal=TERM@120\n" in slurm
    assert "#SBATCH --mem=200001M\n" in slurm
    pods = yaml.safe_load(render("jobset-gpu", order("jobset-gpu", needs=needs)).partition("---")[0])
    pod = pods["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 120
    wanted = pod["containers"][0]["resources"]
    assert wanted["requests"] | {"cpu": 0} == {"cpu": 0, "memory": "200000000001", "ephemeral-storage": "1000000000001"}
    assert wanted["limits"] == {"nvidia.com/gpu": 8}
    sky = yaml.safe_load(render("sky", order("sky", needs=needs)))
    assert (sky["resources"]["memory"], sky["resources"]["disk_size"]) == ("201+", 1001)
    assert yaml.safe_load(render("dstack", order("dstack", needs=needs)))["stop_duration"] == "150s"
    tpus = replace(of_topology("v5p:4x4x4", None, 2), grace_s=120)
    assert "--termination-grace-period-seconds 150 " in render("xpk", order("xpk", needs=tpus))


def test_slices_and_chips_reach_kubernetes():
    needs = of_topology("tpu7x:2x2x2", None, 3)  # two hosts of four chips, each two devices
    jobset = yaml.safe_load(render("jobset-tpu", order("jobset-tpu", needs=needs)).partition("\n---\n")[0])
    [job] = jobset["spec"]["replicatedJobs"]
    assert (job["replicas"], job["template"]["spec"]["parallelism"], job["template"]["spec"]["completions"]) == (
        3,
        2,
        2,
    )
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["jobset-tpu", "quickstart", "--run-dir", "gs://b/x"], "--image: jobset-tpu runs an image"),
        (["xpk", "quickstart", "--image", "x"], "--run-dir: expected gs://… or s3://…"),
        (["slurm", "quickstart", "--topology", "v5p:2x2x1"], "slurm: expected gpu or cpu, got tpu"),
        (["slurm", "quickstart", "--nodes", "3", "--topology", "cpu"], "must be a multiple of"),
        (["slurm", "quickstart"], "--nodes: expected the number of nodes"),
        (["slurm", "quickstrat", "--nodes", "1"], "did you mean quickstart"),
        (["slrum", "quickstart"], "expected one of slurm"),
        (["xpk", "quickstart", "--topology", "v5p:2x2x1", "--slices", "2"], "mesh.slices: expected 2"),
        (["slurm", "quickstart", "--plan", "PLAN.json"], "does not fit: too large\n  give mesh.fsdp=8: half of it"),
        (["slurm", "quickstart", "--plan", "other.json"], "other.json: expected a plan of this configuration"),
        (["slurm", "quickstart", "--plan", "absent.json"], "absent.json: expected a plan"),
        (["slurm", "quickstart", "--plan", "good.json", "--nodes", "3"], "--nodes: expected 2, as good.json has it"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    needs = Needs("cpu", "cpu:2", 1, 2, 2, 1, 60, 0, 0)
    refused = {
        "fits": False,
        "reasons": ["too large"],
        "remedies": [{"overrides": ["mesh.fsdp=8"], "said": "half of it"}],
        "needs": vars(needs),
    }
    (tmp_path / "PLAN.json").write_text(json.dumps(refused))
    for name, more in (("good", {}), ("other", {"config_hash": "0" * 64})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"fits": True, "needs": vars(needs)} | more))
    result = CliRunner().invoke(app, ["launch", "render", *words])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""


def test_without_a_plan_it_says_so():
    result = CliRunner().invoke(app, ["launch", "render", "slurm", "quickstart", "--nodes", "2", "--topology", "cpu"])
    assert result.exit_code == 0
    assert result.stderr.startswith("not planned: 2 devices on 2 hosts by arithmetic, 300 s to save")
