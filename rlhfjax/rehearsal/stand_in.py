"""What stands for SLURM on the loopback, and for the start of a process: a file by itself, which imports little.

`python -I -S stand_in.py srun|scontrol|rlhfjax WORDS…`. `srun` runs the words once for each node of the job, with what
the scene has for one of them; `rlhfjax` asks the process that has imported all for a child, and ends as that does.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time


def forked(words):
    """Runs `rlhfjax WORDS` as a child of the process at REHEARSAL_SOCKET; its exit code, as a shell has it."""
    if os.environ.get("REHEARSAL_FRESH"):
        os.execv(sys.executable, [sys.executable, "-m", "rlhfjax.cli", *words])
    words += json.loads(os.environ.get("REHEARSAL_WORDS", "[]"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.connect(os.environ["REHEARSAL_SOCKET"])
        socket.send_fds(door, [json.dumps([words, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
        door.recv(64)
        return int(door.recv(64) or b"137")


def everywhere(words):
    """Runs the words on each node, where the first that ends leaves the others `--wait` seconds; the highest code."""
    options = {}
    while words[0].startswith("--"):
        name, _, value = words.pop(0).partition("=")
        options[name] = value
    with open(os.environ["REHEARSAL_SCENE"]) as file:
        scene = json.load(file)
    attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    verb = words[words.index("rlhfjax") + 1]
    hit = scene["node"] if attempt == 0 and verb in scene["verbs"] else {}
    began, tasks = time.monotonic(), {}
    waiting = set(range(int(os.environ["SLURM_JOB_NUM_NODES"])))
    if hit.get("absent"):
        waiting.discard(scene["process"])
    until, ends = float("inf"), {}
    while waiting or any(task.poll() is None for task in tasks.values()):
        now = time.monotonic()
        for node in sorted(waiting):
            mine = hit if node == scene["process"] else {}
            if now - began >= mine.get("late", 0):
                waiting.discard(node)
                tasks[node] = started(words, node, mine, f"{scene['logs']}/{attempt}.{verb}.{node}.log")
        for node, task in tasks.items():
            if node not in ends and task.poll() is not None:
                ends[node] = time.time()
                until = min(until, now + float(options.get("--wait") or "inf"))
        if now > until:
            for task in tasks.values():
                if task.poll() is None:
                    os.killpg(task.pid, signal.SIGKILL)
        time.sleep(0.05)
    with open(f"{scene['logs']}/{attempt}.{verb}.ends", "w") as file:
        json.dump({**{node: time.time() for node in tasks}, **ends}, file)
    return max((code if code >= 0 else 128 - code) for code in (task.wait() for task in tasks.values()))


def started(words, node, mine, log):
    """The words on a node, as a group of processes of its own."""
    variables = {**os.environ, "SLURM_PROCID": str(node), **mine.get("variables", {})}
    with open(log, "ab") as out:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
        return subprocess.Popen(words, env=variables, cwd=mine.get("folder"), start_new_session=True, **streams)


def asked(words):
    """The questions and the order that the launch file has for `scontrol`."""
    if words[:2] == ["show", "hostnames"]:
        print(*["127.0.0.1"] * int(os.environ["SLURM_JOB_NUM_NODES"]), sep="\n")
    elif words[:2] == ["show", "job"]:
        print("JobState=RUNNING")
    elif words[:1] == ["requeue"]:
        with open(os.environ["REHEARSAL_REQUEUED"], "w"):
            pass
    return 0


if __name__ == "__main__":
    sys.exit({"rlhfjax": forked, "srun": everywhere, "scontrol": asked}[sys.argv[1]](sys.argv[2:]))
