"""Starts processes for tests, and looks after them. Those of the program are forks of one process in which the module and the
library are imported already, and what each would make again is made: they do the same as those that are started in the
ordinary way, at a tenth of the cost.

Run by the harness as `python3 -m tests.starter FD`, FD being its end of a pipe of multiprocessing. It says at first the
cluster.pem that it is used to. It is asked for a process by {"command", "environment", "cwd", "confined", "files"}, followed by
as many descriptors, for standard output and error and before them maybe for the input; the answer is its pid. It is asked by a
pid whether that process has ended; the answer is None or the exit code, negative for a signal's. At the end of the pipe, however
the other end has died, what still runs is killed. This process has a single thread, as one that forks must have.
"""

import contextlib
import gc
import importlib
import os
import resource
import signal
import sqlite3
import ssl
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

import cbackup
from tests import PROGRAM

QUICK = [sys.executable, "-S", "-B", "-m", "tests"]
"""The begin of a command line that is a mere fork here; where a fork needs an exec, it runs the program as well."""

IMPORTED = ("calendar", "ctypes", "fnmatch", "grp", "pwd", "socketserver")   # by the program, later

CONFIGURATION = """\
[cluster]
name = test
[hosts]
s = 127.0.0.1:4711
[sources]
docs = s:/docs
[backups]
b = s:/b size=1G
"""


def confine(umask=None, user=None, memory=None):
    """For the process that calls it: a umask, another user's number, a limit on its address space in bytes."""
    if umask is not None:
        os.umask(umask)
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def rehearse(program):
    """What each process would do again, and what stays the same, is done here: expressions are compiled, the parsers of the
    usual commands are made, the libraries for TLS and databases are set up, rsync is asked for its version. Returns a cluster.pem."""
    for name in IMPORTED:
        importlib.import_module(name)
    program.parse_config(CONFIGURATION, "cbackup.conf").lines_about("s")
    program.check_json(b"{}")
    build, made = program.build_parser, {}
    for names in (["client"], ["server"], ["restore"], ["status"]):
        made[tuple(names)] = build(names)
        made[tuple(names)].parse_args(["--home", "/nowhere"] + names + ["docs"] * (names == ["restore"]))
    program.build_parser = lambda names=program.COMMANDS: made.get(tuple(names)) or build(names)
    pem = share_contexts(program)
    sqlite3.connect(":memory:").close()
    with contextlib.suppress(program.UsageError):
        program.find_rsync()        # of each path it is asked once
    gc.collect()
    gc.freeze()
    return pem


def share_contexts(program):
    """Whoever has the key that is made here finds the contexts for TLS made, and tried. Returns it; b"" without openssl."""
    make, made, pem = program.tls_context, {}, b""
    with contextlib.suppress(program.UsageError), tempfile.TemporaryDirectory(prefix="cbackup-test-") as folder:
        home = program.Home(folder, "s")
        program.make_cluster_key(home.key_path)
        home.cluster_id()
        pem = key_of(home)
        made = {(pem, server_side): make(home, server_side) for server_side in (False, True)}
        shake_hands(*made.values())

    def tls_context(home, server_side):
        home.check_key()
        return made.get((key_of(home), server_side)) or make(home, server_side)
    program.tls_context = tls_context
    return pem


def key_of(home):
    with contextlib.suppress(OSError), open(home.key_path, "rb") as file:
        return file.read()


def shake_hands(*contexts):
    """What a client's context and a server's do with each other: what a library for TLS makes at the first time, it keeps."""
    pipes = [ssl.MemoryBIO(), ssl.MemoryBIO()]
    ends = [context.wrap_bio(*order, server_side=order is not pipes) for context, order in zip(contexts, (pipes, pipes[::-1]))]
    for end in ends * 2:
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    ends[1].write(b"1")
    ends[0].read(1)


def become(request, descriptors):
    """In the new process: what subprocess would do, and for the program what an interpreter that was started with it would."""
    os.setsid()
    for number, descriptor in enumerate(([os.open(os.devnull, os.O_RDONLY)] + descriptors)[-3:]):
        os.dup2(descriptor, number)
    os.closerange(3, 256)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    confine(**request["confined"])
    command = request["command"]
    if command[:len(QUICK)] != QUICK or sys.platform == "darwin":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execvp(command[0], command)
    sys.argv = [PROGRAM] + command[len(QUICK):]
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering, encoding="utf-8", errors=errors, closefd=False) for number, mode, buffering, errors in
        ((0, "r", -1, "surrogateescape"), (1, "w", -1, "surrogateescape"), (2, "w", 1, "backslashreplace")))
    sys.modules["__main__"], sys.modules["starter"] = cbackup, sys.modules["__main__"]
    exec(os.environ.pop("CBACKUP_TEST_BEFORE", ""), {"cbackup": cbackup})
    sys.exit(cbackup.main())


def run(request, descriptors):
    """become(), and then the end as an interpreter makes it."""
    status = 1
    try:
        become(request, descriptors)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def begin(request, descriptors):
    """Returns the pid of a new process, once it has a session of its own."""
    ready, begun = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(request, descriptors)
    for descriptor in descriptors + [begun]:
        os.close(descriptor)
    os.read(ready, 1)       # its end: what was open here is closed there
    os.close(ready)
    return pid


def main():
    connection, running = Connection(int(sys.argv[1])), set()
    connection.send(rehearse(cbackup))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            request = connection.recv()
            if isinstance(request, dict):
                answer = begin(request, [recv_handle(connection) for _ in range(request["files"])])
                running.add(answer)
            else:
                pid, status = os.waitpid(request, os.WNOHANG)
                answer = None
                if pid:
                    running.remove(pid)
                    answer = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            connection.send(answer)
    except (EOFError, OSError):
        for pid in running:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
