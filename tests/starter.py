"""Starts processes of the program for tests: as forks of one process in which the module and the library are imported
already, and what each would make again is made. They do the same as those that are started in the ordinary way, at a tenth of
the cost.

Run by the harness as `python3 -m tests.starter FD`, FD being its end of a socket. A request is a line of JSON, {"arguments",
"environment", "cwd", "confined"}, with the descriptors for standard output and error; the answer is {"pid"}. {"ended": pid, "status"} comes
when a process has ended. This process has a single thread, as one that forks must have.
"""

import array
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sqlite3
import ssl
import sys
import traceback

import cbackup
from tests import PROGRAM

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


def receive(connection):
    """(request, descriptors), or None at the end."""
    data, descriptors = b"", array.array("i")
    while not data.endswith(b"\n"):
        part, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(2 * descriptors.itemsize))
        if not part:
            return None
        data += part
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[:len(content) - len(content) % descriptors.itemsize])
    return json.loads(data), list(descriptors)


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
    usual commands are made, the libraries for TLS and databases are set up."""
    program.parse_config(CONFIGURATION, "cbackup.conf")
    build, made = program.build_parser, {}
    for names in (["client"], ["server"], ["restore"], ["status"]):
        made[tuple(names)] = build(names)
        made[tuple(names)].parse_args(["--home", "/nowhere"] + names + ["docs"] * (names == ["restore"]))
    program.build_parser = lambda names=program.COMMANDS: made.get(tuple(names)) or build(names)
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        ssl.SSLContext(protocol)
    sqlite3.connect(":memory:").close()
    gc.collect()
    gc.freeze()


def become(request, descriptors):
    """In the new process: what an interpreter that was started with the module would do."""
    os.setsid()
    for number, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY)] + descriptors):
        os.dup2(descriptor, number)
    os.closerange(3, 256)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    confine(**request["confined"])
    sys.argv = [PROGRAM] + request["arguments"]
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering, encoding="utf-8", errors=errors, closefd=False) for number, mode, buffering, errors in
        ((0, "r", -1, "surrogateescape"), (1, "w", -1, "surrogateescape"), (2, "w", 1, "backslashreplace")))
    sys.modules["__main__"], sys.modules["starter"] = cbackup, sys.modules["__main__"]
    status = 1
    try:
        sys.exit(cbackup.main())
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass
    os._exit(status)


def main():
    connection = socket.socket(fileno=int(sys.argv[1]))
    for name in IMPORTED:
        importlib.import_module(name)
    rehearse(cbackup)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wake)
    while True:
        ready = select.select([connection, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            report(connection)
        if connection in ready:
            got = receive(connection)
            if got is None:
                return
            connection.sendall(json.dumps({"pid": begin(*got)}).encode() + b"\n")


def begin(request, descriptors):
    """Returns the pid of a new process, once it has a session of its own."""
    ready, begun = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            become(request, descriptors)
        finally:
            os._exit(70)
    for descriptor in descriptors + [begun]:
        os.close(descriptor)
    os.read(ready, 1)       # its end: what was open here is closed there
    os.close(ready)
    return pid


def report(connection):
    """Tells which processes have ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        connection.sendall(json.dumps({"ended": pid, "status": status}).encode() + b"\n")


if __name__ == "__main__":
    main()
