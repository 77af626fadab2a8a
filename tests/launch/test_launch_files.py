"""The files of launch/ are what render makes of them, and what they call is what the command line takes."""

import re
import subprocess

import pytest
import typer
import yaml

from launch.launch_files import FILES, LAUNCH, command_lines, command_of, rendered
from rlhfjax.cli import app
from rlhfjax.launch.rendering import TARGETS

RENDERED = [path for path in FILES if command_of(path)]
SHELL = [path for path in FILES if path.suffix in (".sh", ".sbatch")]
YAML = [path for path in FILES if path.suffix in (".yaml", ".yml")]


def name(path):
    return str(path.relative_to(LAUNCH))


@pytest.mark.parametrize("path", RENDERED, ids=name)
def test_a_file_is_what_its_command_renders(path):
    assert path.read_text(encoding="utf-8") == rendered(command_of(path)), "make launch-files"


def test_each_target_has_a_file():
    assert {command_of(path)[2] for path in RENDERED} == TARGETS.keys()


@pytest.mark.parametrize("path", [*SHELL, *YAML], ids=name)
def test_command_lines_are_ones_that_the_command_line_takes(path):
    for words in command_lines(path):
        command = typer.main.get_command(app)
        rest = words[1:]
        while hasattr(command, "commands") and rest:
            assert rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        command.make_context(" ".join(words[:2]), rest)


@pytest.mark.parametrize("path", RENDERED, ids=name)
def test_a_run_is_looked_at_before_it_begins(path):
    """The same words for both, and nothing else is run."""
    lines = [words for words in command_lines(path) if words[1] != "launch"]
    assert [words[1] for words in lines] == ["doctor", "run"]
    assert lines[0][2:] == lines[1][2:]


@pytest.mark.parametrize("path", SHELL, ids=name)
def test_bash_reads_it(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert path.suffix == ".sbatch" or path.stat().st_mode & 0o111


@pytest.mark.parametrize("path", YAML, ids=name)
def test_yaml_reads_it(path):
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        assert document


@pytest.mark.parametrize("path", sorted((LAUNCH / "docker").glob("Dockerfile.*")), ids=name)
def test_images_run_rlhfjax_itself_as_nobody(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 'ENTRYPOINT ["rlhfjax"]' in lines  # no shell between it and SIGTERM
    assert "USER 10001:10001" in lines
    assert not any(re.search("KEY|TOKEN|SECRET|PASSWORD", line) for line in lines)


# Kubernetes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["jobset-tpu", "jobset-gpu"])
def documents(request):
    return list(yaml.safe_load_all((LAUNCH / "k8s" / f"{request.param}.yaml").read_text(encoding="utf-8")))


@pytest.fixture
def pod(documents):
    [job] = documents[0]["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


def test_pods_are_nobody_and_may_nothing(pod):
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod["initContainers"], *pod["containers"]]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in rights
        assert not any("KEY" in each["name"] or "TOKEN" in each["name"] for each in container["env"])
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not any("hostPath" in volume for volume in pod["volumes"])


def test_memory_that_is_shared_has_a_limit(pod):
    [shm] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shm["medium"] == "Memory"
    assert shm["sizeLimit"]


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (42, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (42, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),  # a host that goes
        (1, False, "FailJobSet"),
        (2, False, "FailJobSet"),
        (3, False, "FailJobSet"),
        (4, False, "FailJobSet"),
        (134, False, "RestartJobSet"),  # counted: what JobSet does where no rule matches
        (137, False, "RestartJobSet"),
    ],
)
def test_exit_codes_restart_or_end_the_jobset(documents, code, disrupted, action):
    """The rules, read as the controllers of Kubernetes and JobSet are documented to."""
    jobset = documents[0]["spec"]
    [job] = jobset["replicatedJobs"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["template"]["spec"]["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {"values": ()})["values"]
        if code in codes or ("onPodConditions" in rule and disrupted):
            said = f"failed with exit code {code}" if code in codes else "has condition DisruptionTarget"
            reason, message = "PodFailurePolicy", f"Pod rlhfjax/x {said} matching FailJob rule at index {index}"
            break
    for rule in jobset["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(each, message) for each in patterns):
            assert rule["action"] == action
            return
    assert action == "RestartJobSet"
    assert jobset["failurePolicy"]["maxRestarts"] > 0
