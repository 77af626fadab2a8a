"""Nobody reads any more: the run goes on, and the manifest says so."""

import io
import os
import subprocess
import sys

from stages.conftest import rows_of

from rlhfjax.runs.output import lasting_output

WRITE_ON = """
import sys
from rlhfjax.runs.output import lasting_output
with lasting_output() as lost:
    for i in range(3):
        print("to stdout", flush=True)
        print("to stderr", file=sys.stderr, flush=True)
        sys.stdin.readline()
    result = lost()
with open(sys.argv[1], "w") as file:
    file.write(repr(result))
"""


def test_a_reader_that_has_gone_ends_nothing(tmp_path):
    words = [sys.executable, "-c", WRITE_ON, str(tmp_path / "lost")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes) as process:
        assert process.stdout.readline() == "to stdout\n"
        process.stdout.close()
        process.stderr.close()
        process.stdin.write("\n\n\n")
    assert process.returncode == 0
    assert eval((tmp_path / "lost").read_text()) == {
        "output_lost": dict.fromkeys(("stdout", "stderr"), "[Errno 32] Broken pipe")
    }


def test_a_full_disk_and_a_closed_stream_end_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", closed)
        with lasting_output() as lost:
            print("x", flush=True)
            print("y", file=sys.stderr)
            print("z", flush=True)
        assert lost()["output_lost"].keys() == {"stdout", "stderr"}
        assert "No space left on device" in lost()["output_lost"]["stdout"]
        assert os.readlink(f"/proc/self/fd/{full.fileno()}") == os.devnull
    assert (sys.stdout, sys.stderr) == (full, closed)


def test_what_is_read_arrives(capsys):
    with lasting_output() as lost:
        print("to stdout")
        print("to stderr", file=sys.stderr)
    assert capsys.readouterr() == ("to stdout\n", "to stderr\n")
    assert lost() == {}


def test_a_run_whose_reader_goes_is_finished(copied, config, start):
    # case 33 of the faults: rlhfjax run … 2>&1 | head -1
    run_dir = copied("pretrain")
    with start("run", config, "--run-dir", run_dir, "--only", "pretrain") as process:
        assert "pretrain: started\n" in iter(process.stderr.readline, "")  # which reads no further
        process.stderr.close()
        process.stdout.close()
    assert process.returncode == 0
    assert (run_dir / "pretrain" / "complete.json").exists()
    line = rows_of(run_dir / "manifest.jsonl")[-1]
    assert (line["status"], line["exit_code"]) == ("finished", 0)
    assert line["output_lost"] == {"stderr": "[Errno 32] Broken pipe"}
