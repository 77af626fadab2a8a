"""Commands of the tests without the two seconds of a processor that the imports of each one take.

A process that has imported rlhfjax, and jax with it, forks a child for each command. It has one thread, no device and
no program, so its child is what a fresh `python -m rlhfjax.cli` is that has imported as much, with its own variables,
directory, arguments, streams, signals and exit code. One thing differs: children of one process hash texts alike. Where
that or the start itself matters, a test starts a process as anybody would.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time

MOST = 2**17  # bytes of a request; the variables are most of it
OWN = ("RLHFJAX_", "PYTEST_")  # variables that no module but `faults` reads while it is imported
_servers = {}


def forked(*args, environment):
    """Starts `python -m rlhfjax.cli ARGS` here, with these variables: its process, and pipes of its text."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return _started(args, environment)  # not on Linux
    return server_of(environment).start("rlhfjax.cli", *args, environment=environment)


def server_of(environment):
    """The process with these variables that forks for all tests of this one."""
    variables = {name: value for name, value in environment.items() if not name.startswith(OWN)}
    server = _servers.get(frozenset(variables.items()))
    if server is None:
        server = _servers[frozenset(variables.items())] = ForkServer(variables)
        atexit.register(server.close)
    return server


def _started(args, environment):
    # A shell's background job ignores Ctrl-C and hands that down; a child gets the default where we handle it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        words = [sys.executable, "-m", "rlhfjax.cli", *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(words, env=environment, text=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


class Forked:
    """A command of a `ForkServer`, with the part of `subprocess.Popen` that tests use; its streams are text."""

    def __init__(self, args, pid, process, told, stdout, stderr):
        self.args, self.pid, self.returncode = args, pid, None
        self.stdout, self.stderr = (os.fdopen(stream, encoding="utf-8") for stream in (stdout, stderr))
        self._told, self._readers, self._texts = told, [], {}
        self._process = process

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            self._told.settimeout(timeout if timeout != 0 else 1e-6)
            try:
                said = self._told.recv(64)
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            assert said, "the process that forks has died"
            self.returncode = os.waitstatus_to_exitcode(int(said))
            self._told.close()
            os.close(self._process)
        return self.returncode

    def communicate(self, timeout=None):
        """What it wrote to its streams and was not read yet, both to their ends."""
        until = None if timeout is None else time.monotonic() + timeout
        if not self._readers:
            self._readers = [threading.Thread(target=self._read, args=(name,)) for name in ("stdout", "stderr")]
            for reader in self._readers:
                reader.daemon = True
                reader.start()
        for reader in self._readers:
            reader.join(None if until is None else max(until - time.monotonic(), 0))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if until is None else max(until - time.monotonic(), 0))
        return self._texts["stdout"], self._texts["stderr"]

    def _read(self, name):
        with getattr(self, name) as stream:
            self._texts[name] = stream.read()

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stdout.close()
        self.stderr.close()
        self.wait()


class ForkServer:
    """The other end of `serve`, in a process with these variables."""

    def __init__(self, environment):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            words = [sys.executable, __file__, str(theirs.fileno())]
            # Pipes, as those of its children are: Python makes a stream of a file otherwise.
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self._process = subprocess.Popen(words, env=environment, pass_fds=[theirs.fileno()], **pipes)
        self._socket = ours

    def start(self, module, *args, environment):
        """`python -m MODULE ARGS` here, with these variables; its standard input is that of this process."""
        told, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (stdout, its_stdout), (stderr, its_stderr) = os.pipe(), os.pipe()
        request = json.dumps([module, list(map(str, args)), os.getcwd(), dict(environment)]).encode()
        assert len(request) < MOST
        try:
            socket.send_fds(self._socket, [request], [0, its_stdout, its_stderr, theirs.fileno()])
        finally:
            theirs.close()
            os.close(its_stdout)
            os.close(its_stderr)
        pid, process, _, _ = socket.recv_fds(told, 64, 1)
        assert pid, self._process.communicate()[1].decode()
        return Forked([module, *args], int(pid), *process, told, stdout, stderr)

    def close(self):
        self._socket.close()
        _, err = self._process.communicate()
        assert self._process.returncode == 0, err.decode()


def serve(requests):
    """Forks a child for each request until nobody can ask any more; in a child, what it is to run."""
    children, chosen = {}, selectors.DefaultSelector()
    chosen.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in chosen.select():
            if key.fileobj is not requests:
                pid, told = children.pop(key.fileobj)
                with told, contextlib.suppress(BrokenPipeError):
                    told.send(str(os.waitpid(pid, 0)[1]).encode())
                chosen.unregister(key.fileobj)
                os.close(key.fileobj)
                continue
            said, streams, _, _ = socket.recv_fds(requests, MOST, 4)
            if not said:
                raise SystemExit
            assert threading.active_count() == 1
            pid = os.fork()
            if not pid:
                chosen.close()
                requests.close()
                for process, (_, told) in children.items():
                    os.close(process)
                    told.close()
                return json.loads(said), streams
            assert len(os.listdir("/proc/self/task")) == 1  # those of OpenBLAS end before a fork
            told = socket.socket(fileno=streams.pop())
            for stream in streams:
                os.close(stream)
            process = os.pidfd_open(pid)
            socket.send_fds(told, [str(pid).encode()], [process])
            children[process] = pid, told
            chosen.register(process, selectors.EVENT_READ)


def become(module, args, folder, environment, streams):
    """This process is from now on `python -m MODULE ARGS` in that directory, with these variables and streams."""
    for number, stream in enumerate(streams[:3]):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0], sys.argv, sys.orig_argv = folder, [module, *args], [sys.executable, "-m", module, *args]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    importlib.reload(sys.modules["rlhfjax.faults"])  # which reads the variables
    sys.modules["numpy"].random.seed()  # Python's own generator begins anew in a child
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main():
    requests = socket.socket(fileno=int(sys.argv[1]))
    sys.path[0] = os.getcwd()
    gc.disable()  # imports make no garbage to speak of
    import rlhfjax

    for found in pkgutil.walk_packages(rlhfjax.__path__, "rlhfjax."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    gc.collect()
    gc.freeze()
    gc.enable()
    request, streams = serve(requests)
    become(*request, streams)


if __name__ == "__main__":
    main()
