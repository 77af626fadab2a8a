"""The launch files before the validators of those who read them; each also finds a mistake that is put in.

`make launch-checks` makes the environment that they need and runs this.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.launch_files import FILES, LAUNCH
from launch.test_rendering import DOCTOR, RUN, as_kubernetes, order
from rlhfjax.launch.needs import of_topology
from rlhfjax.launch.rendering import TARGETS, render
from rlhfjax.xla_flags import refused

VENV = Path(os.environ.get("RLHFJAX_LAUNCH_VENV", "absent"))
pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(not (VENV / "bin" / "xpk").exists(), reason="without validators; use make launch-checks"),
]
SHELL = [path for path in FILES if path.suffix in (".sh", ".sbatch")]
JOBSETS = sorted((LAUNCH / "k8s").glob("jobset-*.yaml"))
PLAIN = [LAUNCH / "k8s" / "rbac.yaml", LAUNCH / "k8s" / "networkpolicy.yaml"]


def run(program, *words, given=None, **variables):
    """A program of the validators' environment: its exit code and what it said."""
    environment = os.environ | {"PATH": f"{VENV}/bin:{os.environ['PATH']}"} | variables
    done = subprocess.run(
        [VENV / "bin" / program, *words], input=given, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


# Kubernetes ----------------------------------------------------------------------------------------------------------

VALIDATE = """
import json, sys
import kubernetes_validate
for document in json.load(sys.stdin):
    try:
        kubernetes_validate.validate(document, "1.34", strict=True)
    except kubernetes_validate.ValidationError as error:
        print(document["kind"], error.message)
"""


def problems(documents):
    """What kubernetes-validate finds; each job of a JobSet is looked at as a Job, since it has no schema of JobSets."""
    documents = list(documents)
    plain = [each for each in documents if "x-k8s.io" not in each["apiVersion"]]
    for jobset in (each for each in documents if each["kind"] == "JobSet"):
        for job in jobset["spec"]["replicatedJobs"]:
            plain.append(
                {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}
            )
    assert plain
    code, said = run("python", "-c", VALIDATE, given=json.dumps(plain))
    assert code == 0, said
    return said


def of_file(path):
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "path", [*JOBSETS, LAUNCH / "k8s/rbac.yaml", LAUNCH / "k8s/networkpolicy.yaml"], ids=lambda p: p.name
)
def test_kubernetes_takes_it(path):
    assert problems(of_file(path)) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("backoffLimit: 0", "backofLimit: 0"),
        ("parallelism: 2", "parallelism: two"),
        ("terminationGracePeriodSeconds", "terminationGracePeriodSecond"),
        ("sizeLimit", "sizeLimits"),
        ("onExitCodes", "onExitCode"),
        ("restartPolicy: Never", "restartPolicy: [Never]"),
    ],
)
def test_kubernetes_finds_a_mistake(right, wrong):
    text = (LAUNCH / "k8s" / "jobset-gpu.yaml").read_text(encoding="utf-8")
    assert right in text
    assert problems(yaml.safe_load_all(text.replace(right, wrong))) != ""


FIELDS = {  # of JobSet 0.10 and newer, those that the files use
    "spec": {"ttlSecondsAfterFinished", "network", "failurePolicy", "replicatedJobs"},
    "network": {"enableDNSHostnames", "publishNotReadyAddresses"},
    "failurePolicy": {"maxRestarts", "rules"},
    "rule": {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"},
    "job": {"name", "replicas", "template"},
}


def strange_fields(jobset):
    spec = jobset["spec"]
    groups = [("spec", spec), ("network", spec["network"]), ("failurePolicy", spec["failurePolicy"])]
    groups += [("rule", rule) for rule in spec["failurePolicy"]["rules"]]
    groups += [("job", job) for job in spec["replicatedJobs"]]
    return {key for name, group in groups for key in group.keys() - FIELDS[name]}


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_a_jobset_has_fields_of_jobsets_alone(path):
    assert strange_fields(of_file(path)[0]) == set()
    wrong = path.read_text(encoding="utf-8").replace("maxRestarts:", "maxRestart:")
    assert strange_fields(next(yaml.safe_load_all(wrong))) == {"maxRestart"}


def said_by_stand_in(command, folder):
    """What a command gives to a stand-in for rlhfjax, call by call."""
    (folder / "rlhfjax").write_text('#!/bin/bash\n{ printf "%s\\0" "$@"; echo; } >> "${0%/*}/calls"\n')
    (folder / "rlhfjax").chmod(0o755)
    (folder / "calls").write_text("")
    variables = {"SKYPILOT_NODE_IPS": "a", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}
    variables |= {"DSTACK_MASTER_NODE_IP": "a", "DSTACK_NODES_NUM": "1", "DSTACK_NODE_RANK": "0"}
    environment = os.environ | variables | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split("\0")[:-1] for line in (folder / "calls").read_text(encoding="utf-8").splitlines()]


# XPK -----------------------------------------------------------------------------------------------------------------


def manifest(script, folder):
    """The JobSet that xpk would have created, or None with what it said."""
    (folder / "train.sh").write_text(script, encoding="utf-8")
    where = ["--project", "p", "--project-number", "1", "--zone", "us-east5-a"]
    dry = ["--dry-run", "--skip-validation", "--output-manifest-file", str(folder / "out.yaml")]
    environment = os.environ | {"PATH": f"{VENV}/bin:{os.environ['PATH']}", "CLUSTER": "c", "HOME": str(folder)}
    done = subprocess.run(
        ["bash", folder / "train.sh", *where, *dry],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    written = folder / "out.yaml"
    return (of_file(written) if written.exists() and done.returncode == 0 else None), done.stdout + done.stderr


@pytest.mark.parametrize(("topology", "slices"), [("v6e:4x4", 1), ("v5p:4x4x4", 2), ("v5e:4x8", 1), ("tpu7x:2x2x2", 1)])
def test_xpk_makes_a_jobset_of_our_slices_hosts_and_grace(topology, slices, tmp_path):
    needs = of_topology(topology, None, slices)
    made, said = manifest(
        render("xpk", order("xpk", needs=needs, config="x", overrides=("a=1",), run_dir="gs://b/x")), tmp_path
    )
    assert made, said
    [jobset] = [each for each in made if each["kind"] == "JobSet"]
    [job] = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert (job["replicas"], job["template"]["spec"]["parallelism"]) == (slices, needs.hosts_per_slice)
    assert pod["terminationGracePeriodSeconds"] == 330
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 100
    assert "rlhfjax doctor x a=1 --run-dir gs://b/x && exec rlhfjax run x a=1 --run-dir gs://b/x" in json.dumps(pod)


def test_xpk_changes_no_word(tmp_path):
    made, said = manifest(render("xpk", order("xpk", needs=of_topology("v6e:4x4", None, 1))), tmp_path)
    assert made, said
    [jobset] = [each for each in made if each["kind"] == "JobSet"]
    [job] = jobset["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    command = [as_kubernetes(word) for word in container["command"]]
    assert said_by_stand_in(command, tmp_path) == [DOCTOR, RUN]


def test_xpk_takes_the_file_and_no_other_option(tmp_path):
    text = (LAUNCH / "xpk" / "train.sh").read_text(encoding="utf-8")
    made, said = manifest(text, tmp_path)
    assert made, said
    (tmp_path / "out.yaml").unlink()
    for right, wrong in (("--num-slices", "--num-slicse"), ("v6e-16", "v6e-17"), ("--command", "--comand")):
        assert manifest(text.replace(right, wrong), tmp_path)[0] is None, wrong


# SkyPilot, dstack ----------------------------------------------------------------------------------------------------

SKY = """
import json, sys
import sky
task = sky.Task.from_yaml(sys.argv[1])
found = {json.dumps([each.accelerators, each.job_recovery]) for each in task.resources}
print("RUN" + json.dumps([task.num_nodes, [json.loads(each) for each in found], task.run]))
"""
DSTACK = """
import json, sys
import yaml
from dstack._internal.core.models.configurations import parse_run_configuration
task = parse_run_configuration(yaml.safe_load(open(sys.argv[1], encoding="utf-8")))
print("RUN" + json.dumps([task.nodes, task.resources.gpu.count.min, task.commands]))
"""


def read(program, text, folder):
    """What the reader of a tool makes of a file; None where it refuses it."""
    (folder / "train.yaml").write_text(text, encoding="utf-8")
    code, said = run("python", "-c", program, folder / "train.yaml", HOME=str(folder))
    found = re.search("^RUN(.*)$", said, re.MULTILINE)
    return json.loads(found[1]) if code == 0 and found else None


def test_skypilot_reads_what_we_mean(tmp_path):
    text = (LAUNCH / "sky" / "train.yaml").read_text(encoding="utf-8")
    nodes, resources, commands = read(SKY, text, tmp_path)
    [(accelerators, recovery)] = resources
    assert (nodes, accelerators) == (2, {"H100": 8})
    assert (recovery["max_restarts_on_errors"], recovery["recover_on_exit_codes"]) == (3, [42])
    assert commands.rstrip().endswith("exec rlhfjax run instructgpt_1b3 --run-dir s3://my-bucket/instructgpt_1b3")
    for right, wrong in (("num_nodes", "num_nods"), ("accelerators", "acelerators"), ("[42]", "[x]")):
        assert right in text
        assert read(SKY, text.replace(right, wrong), tmp_path) is None, wrong


def test_skypilot_and_dstack_change_no_word(tmp_path):
    for target, program in (("sky", SKY), ("dstack", DSTACK)):
        text = render(target, order(target))
        commands = read(program, text, tmp_path)[2]
        script = commands if isinstance(commands, str) else commands[0]
        assert said_by_stand_in(["bash", "-c", script], tmp_path) == [DOCTOR, RUN]


def test_dstack_reads_what_we_mean(tmp_path):
    text = (LAUNCH / "dstack" / "train.dstack.yml").read_text(encoding="utf-8")
    assert read(DSTACK, text, tmp_path)[:2] == [2, 8]
    for right, wrong in (("nodes:", "nods:"), ("interruption", "interuption"), ("shm_size", "shm_sise")):
        assert right in text
        assert read(DSTACK, text.replace(right, wrong), tmp_path) is None


# Shell, images, flags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_shellcheck_finds_nothing(path):
    assert run("shellcheck", path) == (0, "")


@pytest.mark.parametrize("target", [name for name, facts in TARGETS.items() if facts.template.split(".")[1] != "yaml"])
def test_shellcheck_finds_nothing_with_other_words(target, tmp_path):
    text = render(target, order(target))
    if target != "dstack":
        (tmp_path / "train.sh").write_text(text, encoding="utf-8")
        assert run("shellcheck", "--exclude=SC2016", tmp_path / "train.sh", LANG="C.UTF-8") == (0, "")


def test_shellcheck_finds_a_mistake(tmp_path):
    text = (LAUNCH / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    assert '"$task" task "$@"' in text
    (tmp_path / "train.sh").write_text(text.replace('"$task" task "$@"', '"$task" task $@'))
    assert "SC2068" in run("shellcheck", tmp_path / "train.sh")[1]


@pytest.mark.parametrize("path", sorted((LAUNCH / "docker").glob("Dockerfile.*")), ids=lambda path: path.name)
def test_hadolint_finds_nothing_and_would(path, tmp_path):
    assert run("hadolint", path) == (0, "")
    text = path.read_text(encoding="utf-8")
    for right, wrong, rule in (
        ('ENTRYPOINT ["rlhfjax"]', "ENTRYPOINT rlhfjax", "DL3025"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ("pip install --no-cache-dir --require-hashes -r", "pip install -r", "DL3042"),
    ):
        assert right in text
        (tmp_path / "Dockerfile").write_text(text.replace(right, wrong))
        assert rule in run("hadolint", tmp_path / "Dockerfile")[1], rule


def test_xla_takes_each_flag():
    flags = {flag for path in FILES for flag in re.findall(r"--xla_\w+=[\w.-]+", path.read_text(encoding="utf-8"))}
    assert len(flags) == 7
    assert [flag for flag in sorted(flags) if refused([flag])] == []
    assert refused(["--xla_gpu_enable_async_collectives=true"]) != []
