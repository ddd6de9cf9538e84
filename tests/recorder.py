"""What is made durable, in which order: recorded in processes of the program, and read by tests.

`record(cls, cluster)` has the processes of a test's class started by this module instead of tests.starter: they write a line in
a record for each fsync, rename, link, removal, commit and message. `events(cluster)` reads the record, and `Disk` says what a
power failure at one of its lines would leave in doubt. It knows nothing of how the program is written but `Channel`.
"""

import builtins
import ctypes
import fcntl
import functools
import json
import os
import sqlite3
import threading
import types

from tests import starter


# ---- in the process ---------------------------------------------------------------------------------------------

class Recorder:
    """Writes the record: an object a line, with `what` happened, after it has; but what is sent, before it is."""

    def __init__(self, path):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.descriptor = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 500)      # those below are closed in new processes
        os.close(opened)

    def note(self, what, **facts):
        facts.update(what=what, pid=os.getpid(), thread=threading.get_ident())
        os.write(self.descriptor, json.dumps(facts).encode() + b"\n")

    def position(self):
        """How long the record is: what stands before that has happened by now."""
        return os.fstat(self.descriptor).st_size


def path_of(descriptor):
    """Under which path a file was opened, as far as the system tells."""
    if hasattr(fcntl, "F_GETPATH"):
        return os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
    return os.readlink("/proc/self/fd/%d" % descriptor)


def named(path, directory=None):
    """The whole path of a name that was given to a system call."""
    return os.path.join(os.getcwd() if directory is None else path_of(directory), os.fsdecode(path))


def watch_names(recorder):
    """Names that come, change and go."""
    def two(call, what):
        def watched(old, new, *, src_dir_fd=None, dst_dir_fd=None, **more):
            facts = {"old": named(old, src_dir_fd), "new": named(new, dst_dir_fd)}
            call(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **more)
            recorder.note(what, **facts)
        return watched

    def one(call, what):
        def watched(path, *rest, dir_fd=None):
            place = named(path, dir_fd)
            call(path, *rest, dir_fd=dir_fd)
            recorder.note(what, path=place)
        return watched
    for name, what in (("rename", "rename"), ("replace", "rename"), ("link", "link")):
        setattr(os, name, two(getattr(os, name), what))
    for name, what in (("unlink", "unlink"), ("remove", "unlink"), ("mkdir", "mkdir"), ("rmdir", "rmdir")):
        setattr(os, name, one(getattr(os, name), what))


def watch_syncs(recorder):
    """fsync(2), fdatasync(2) and syncfs(2), which does not exist here with $CBACKUP_RECORD_SYNCFS=no."""
    def watched(call):
        def sync(file):
            descriptor, begun = file if isinstance(file, int) else file.fileno(), recorder.position()
            facts = {"path": path_of(descriptor), "size": os.fstat(descriptor).st_size}
            if call(descriptor):        # fsync(2) raises OSError, syncfs(2) returns -1
                return -1
            recorder.note("syncfs" if sync.whole else "fsync", begun=begun, **facts)
            return 0
        sync.whole = False
        return sync

    class Library(ctypes.CDLL):
        def __getattr__(self, name):
            if name == "syncfs" and os.environ.get("CBACKUP_RECORD_SYNCFS") == "no":
                raise AttributeError(name)
            found = super().__getattr__(name)
            if name == "syncfs":
                found = watched(found)
                found.whole = True
            return found
    ctypes.CDLL = Library
    for name in ("fsync", "fdatasync"):
        if hasattr(os, name):
            setattr(os, name, watched(getattr(os, name)))


def watch_writing(recorder):
    """Files that are opened for writing, and whether they were there before."""
    real_open, real_builtin = os.open, builtins.open

    def os_open(path, flags, *rest, dir_fd=None, **more):
        if not flags & (os.O_WRONLY | os.O_RDWR):
            return real_open(path, flags, *rest, dir_fd=dir_fd, **more)
        place = named(path, dir_fd)
        existed = os.path.lexists(place)
        descriptor = real_open(path, flags, *rest, dir_fd=dir_fd, **more)
        recorder.note("write", path=place, existed=existed)
        return descriptor

    def builtin_open(file, mode="r", *rest, **more):
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return real_builtin(file, mode, *rest, **more)
        place = named(file)
        existed = os.path.lexists(place)
        stream = real_builtin(file, mode, *rest, **more)
        recorder.note("write", path=place, existed=existed)
        return stream
    os.open, builtins.open = os_open, builtin_open


def watch_databases(recorder):
    """Commits: of which database, how durable, and what was changed."""
    class Connection(sqlite3.Connection):
        changed = ()

        def execute(self, sql, *values):
            return self._watched(super().execute, sql, *values)

        def executemany(self, sql, *values):
            return self._watched(super().executemany, sql, *values)

        def executescript(self, sql):
            return self._watched(super().executescript, sql)

        def _watched(self, call, sql, *values):
            before = self.total_changes
            cursor = call(sql, *values)
            if self.total_changes != before:
                self.changed += (" ".join(sql.split())[:80],)
            if self.changed and not self.in_transaction:
                facts = {name: super(Connection, self).execute("PRAGMA " + name).fetchone()[0]
                         for name in ("synchronous", "journal_mode")}
                path = [row[2] for row in super().execute("PRAGMA database_list") if row[1] == "main"][0]
                if sql != "ROLLBACK":
                    recorder.note("commit", path=path, changed=self.changed, **facts)
                self.changed = ()
            return cursor
    sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)


def watch_messages(recorder, channel):
    """What is about to be sent, and what was received, by the class `channel`."""
    send, receive = channel.send, channel.receive

    def watched_send(self, message, *rest):
        recorder.note("send", message=message)
        return send(self, message, *rest)

    def watched_receive(self, *rest, **keys):
        message = receive(self, *rest, **keys)
        recorder.note("receive", message=message)
        return message
    channel.send, channel.receive = watched_send, watched_receive


def main():
    import cbackup
    recorder = Recorder(os.environ["CBACKUP_RECORD"])
    watch_names(recorder)
    watch_syncs(recorder)
    watch_writing(recorder)
    watch_databases(recorder)
    watch_messages(recorder, cbackup.Channel)
    starter.main()


# ---- in the test ------------------------------------------------------------------------------------------------

def possible():
    """Whether this system tells the path of an open file."""
    return hasattr(fcntl, "F_GETPATH") or os.path.exists("/proc/self/fd")


def record(test, cluster):
    """In setUpClass: what is started is recorded. With CBACKUP_RECORD_SYNCFS=no, a process finds no syncfs(2)."""
    test.start_by("tests.recorder", {"CBACKUP_RECORD": cluster.path("record")})


def events(cluster):
    """The record: objects with what stands in it, and `at`, where that is. Messages have a `request` besides: the one that
    the same thread has sent or received last."""
    found, asked, at = [], {}, 0
    with open(cluster.path("record"), "rb") as file:
        for line in file:
            event = types.SimpleNamespace(**json.loads(line), at=at)
            at += len(line)
            if event.what in ("send", "receive"):
                thread = event.pid, event.thread
                if event.message and "op" in event.message:
                    asked[thread] = event.message
                event.request = asked.get(thread, {})
                event.answer = event.message if event.message and "op" not in event.message else None
            found.append(event)
    return found


class Disk:
    """What of the names and bytes below a directory a power failure would leave in doubt, as POSIX has it: a name is certain
    after its directory was synced, bytes after their file was; both after syncfs(2)."""

    def __init__(self, root):
        self.root = root
        self.names, self.bytes = {}, {}         # path: where in the record its name, its bytes have changed

    def follow(self, event):
        """Takes in an event; they come in the order of the record."""
        if event.what in ("rename", "link"):
            self.names[event.new] = event.at
            if event.old in self.bytes:
                self.bytes[event.new] = self.bytes[event.old]
        if event.what == "rename":
            self.names[event.old] = event.at
            self.bytes.pop(event.old, None)
        elif event.what in ("mkdir", "unlink", "rmdir"):
            self.names[event.path] = event.at
        elif event.what == "syncfs":
            self._certain(event, lambda path: path.startswith(event.path + "/"), lambda path: path.startswith(event.path + "/"))
        elif event.what == "fsync":
            self._certain(event, lambda path: os.path.dirname(path) == event.path, lambda path: path == event.path)

    def _certain(self, event, is_name, is_file):
        for kept, covered in ((self.names, is_name), (self.bytes, is_file)):
            for path in [path for path, at in kept.items() if at < event.begun and covered(path)]:
                del kept[path]

    def arrived(self, path, at):
        """Another process has written a file."""
        self.bytes[path] = at

    def doubts(self, path):
        """What of a file at `path` is not certain: its name, its bytes, or directories above it."""
        found = ["bytes of " + path] if path in self.bytes else []
        while len(path) > len(self.root):
            found += ["name of " + path] if path in self.names else []
            path = os.path.dirname(path)
        return found


if __name__ == "__main__":
    main()
