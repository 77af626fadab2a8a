"""The script for TPU machines, with a stand-in for gcloud: machines come, go and come back, and a run ends somehow.

The stand-in keeps the state of the machines and of the service on them in files, and notes every command it is given.
"""

import os
import re
import subprocess

import pytest

from launch.launch_files import LAUNCH

SCRIPT = LAUNCH / "tpu_vm" / "train.sh"
GCLOUD = r"""#!/bin/bash
# state: of the machines; ends: what the service shows each time it is asked, a line for each answer
cd "${0%/*}"
echo "${*:3:3}" >> calls
case "$*" in
  *"queued-resources describe"*) [[ -s state ]] && cat state || exit 1 ;;
  *"queued-resources create"*)
    echo "$*" >> created
    { [[ -e refused ]] && echo FAILED && rm refused || echo ACTIVE; } > state
    ;;
  *"queued-resources delete"*) : > state ;;
  *"systemctl show"*)
    line="$(head -n 1 ends)"
    sed -i 1d ends
    [[ "$line" == GONE ]] && echo SUSPENDED > state && exit 1
    echo -e "${line//|/\\n}"
    ;;
  *"systemd-run"*) echo started >> calls ;;
  *"systemctl stop"*) echo stopped >> calls ;;
  *) exit 64 ;;
esac
"""
NONE, RUNNING = "LoadState=not-found SubState=dead ExecMainCode=0 ExecMainStatus=0", "SubState=running ExecMainStatus=0"


def ended(code, killed=False):
    """A line of `systemctl show` for a service that ended; the order of its fields is its own affair."""
    return f"ExecMainCode={2 if killed else 1} ExecMainStatus={code} LoadState=loaded SubState=failed"


@pytest.fixture
def machines(tmp_path):
    """Runs a verb of the script on machines in a state, with a service that shows this: exit code, and the calls."""
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)

    def run(verb, *ends, state="", refused=False, **variables):
        (tmp_path / "state").write_text(state)
        (tmp_path / "ends").write_text("".join(f"{line}\n" for line in ends))
        (tmp_path / "calls").write_text("")
        if refused:
            (tmp_path / "refused").touch()
        given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "ZONE": "z", "POLL": "0"}
        done = subprocess.run(
            ["bash", SCRIPT, verb], env=given | variables, capture_output=True, text=True, timeout=60, check=False
        )
        calls = [
            re.sub("queued-resources |tpu-vm ", "", line) for line in (tmp_path / "calls").read_text().splitlines()
        ]
        return done.returncode, [call.split()[0] for call in calls if not call.startswith(("describe", "ssh"))]

    return run


def test_machines_that_are_there_are_kept_and_those_that_went_are_asked_for_anew(machines, tmp_path):
    assert machines("create") == (0, ["create"])
    assert machines("create", state="ACTIVE") == (0, [])
    assert machines("create", state="SUSPENDED") == (0, ["delete", "create"])
    assert machines("create", state="FAILED", SPOT="1", PROJECT="p") == (0, ["delete", "create"])
    asked = (tmp_path / "created").read_text().splitlines()
    assert all("--accelerator-type v5p-16" in line and "--node-id instructgpt-1b3" in line for line in asked)
    assert ["--spot" in line and "--project p" in line for line in asked] == [False, False, True]
    assert machines("create", refused=True)[0] == 1


@pytest.mark.parametrize(
    ("ends", "code", "calls"),
    [
        ([NONE, RUNNING, RUNNING, ended(0)], 0, ["started"]),
        ([NONE, ended(42), NONE, ended(0)], 0, ["started", "stopped", "started"]),
        ([ended(9, killed=True), NONE, ended(0)], 0, ["stopped", "started"]),
        ([ended(2)], 2, []),
        ([f"{ended(134)}|{ended(3)}|{ended(134)}"], 3, []),  # the others died of the one that is final
        ([f"{RUNNING}|{ended(2)}"], 2, []),
        ([f"{RUNNING}|{NONE}", ended(0)], 0, []),
        ([f"{NONE}|{ended(0)}", ended(0)], 0, ["started"]),
        ([NONE, "GONE", NONE, ended(0)], 0, ["started", "delete", "create", "started"]),
        ([ended(134)] * 4, 134, ["stopped"] * 3),  # three deaths, and no more
        ([ended(42)] * 4 + [ended(134)] * 3 + [ended(0)], 0, ["stopped"] * 7),  # each has a count of its own
    ],
)
def test_a_run_is_watched_to_its_end(machines, ends, code, calls):
    assert machines("babysit", *ends, state="ACTIVE") == (code, calls)


def test_no_verb_is_a_line(machines):
    assert machines("brew") == (2, [])
