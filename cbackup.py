#!/usr/bin/env python3
"""cbackup: one backup on the free space of the UNIX machines somebody already has.

Every file of every *source* (a directory tree on one host) is kept as N whole, plain copies in the
*backups* (directories that offer space) of N other hosts.  There is no extra machine, no single
point of failure, and any host may be down when it is time to restore.

     host with a source                                   host with a backup
     +----------------------------+                      +------------------------------+
     | server (passive)           |   TLS, one TCP port  | client (cron)                |
     |   scanner --> catalog      | <-- claim, confirm --|   pass: move, update, retire |
     |   reader --> books (SQLite)|     todo, drop       |         copy, scrub          |
     |   rsync --daemon (stdin)   | ==  rsync protocol =>|   rsync --> incoming --> file|
     +----------------------------+                      +------------------------------+
            every host runs a server; restore is a client of the servers of the backups

A client's pass, for each backup of its host:

 1. lock the backup, finish what an earlier pass left half done, ask the servers to look at their
    sources;
 2. do what the servers' books say has become of the copies here: move, update, retire;
 3. when the server's sum of what we hold is not ours, report everything and confirm it again;
 4. claim files that are short of copies, fetch them by rsync into `.cbackup/incoming`, digest them,
    let the server check digest and samples against its own file, rename into place, and only then
    be counted;
 5. make room, or relieve a full backup, where that lets a file have its N copies (see Placement);
 6. fetch the catalogs' news, read a few copies again (scrub), tell the servers how much room is
    left.

What always holds:

 * a copy counts only after the server checked its digest against the version that it knows now, and
   after the file is durable at its place in the backup;
 * a digest is a fact only when the source's server has read its own file in full; what is inferred
   from inode, size, time or samples is presumed: acted on at once, read in the background, and it
   grants nothing;
 * no copy is deleted without a grant that is committed at the server before it is answered;
 * a host counts once, and the source's own host never;
 * files are replaced by rename; what was there goes to the attic first;
 * a source that is suddenly empty, gone, or mostly different is *held*: nothing changes anywhere;
 * any process may be killed at any instant, any `state/` may be lost: the next pass puts it right.

Failure model: hosts crash, disks fill and rot, networks cut; peers may send nonsense, and are cut
off. All who hold `cluster.pem` are members and may read every source: there is no secrecy between
members.

Reading order: the sections follow one another, each uses only what stands above it.  Paths below a
root are bytes, relative, with `/`; on the wire and in JSON they are UTF-8 with surrogateescape.
Times are nanoseconds where they belong to files and seconds elsewhere.

Built differently from the first design: rsync writes into `.cbackup/incoming` instead of beside the
destination, so that nothing unconfirmed ever stands at a file's place, and an update's old version
is linked into the attic before the new one is renamed over it; a confirmation has two steps,
`confirm` (contents) and `placed` (durable and in place), and only the second one counts; a claim
leaves to hosts that will be short of files those of which only they could take all missing copies
(`Placement.candidates`): of the copies made in vain where N is 3 and hosts are unequal that spares
most.

The large rooms are built of smaller ones, each a class over the one before it, which it may use and
which knows nothing of it:

    the server's books     Groups, Inventory, News, Proof, Placement, Ledger = Books   (section 7)
    a backup's directory   BackupDirectory, Folding, Attic, Journal = Vault            (section 11)
    what a server answers  ServerState, Standings, Confirmations = Service             (section 12)
    a pass                 Session, Copier, CatchUp, Placer, Keeper = Pass             (section 13)

A copy begins to count in `Ledger.count_copies` and is let go in `Ledger.grant_drop`; a file of a
backup is deleted in `BackupDirectory.delete`; which files are whose to take is said by `Placement`;
the form of each message by `OPERATIONS`.
"""

import sys

# what is written here can be read by 3.6 and 3.7, so that they get as far as this
if sys.version_info < (3, 8):
    sys.stderr.write("cbackup: needs Python 3.8 or newer, and this is %d.%d; start it with another "
                     "one, as in: python3.8 %s\n"
                     % (sys.version_info[0], sys.version_info[1], " ".join(sys.argv)))
    sys.exit(2)

import argparse
import base64
import binascii
import contextlib
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import io
import itertools
import json
import logging
import operator
import os
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
import zlib
from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` and `dataclasses` would be a quarter of the time that a start takes
    from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple
else:
    Any = object

try:
    import sqlite3
except ImportError:  # a Python built without it: said in words by `require_python_parts`
    sqlite3 = None  # type: ignore[assignment]
try:
    import ssl
except ImportError:
    ssl = None  # type: ignore[assignment]

__version__ = "1.1"

log = logging.getLogger("cbackup")


# ==== 2. Constants ================================================================================

PROTOCOL = 1
"""Version of the messages; both sides must speak the same one."""

LEVEL = 2
"""What a server understands beyond that: said in its hello, 1 when it is not.  A field or an
operation that is newer than level 1 is used only with a server that says a level which has it;
fields that a server does not know it ignores."""

EXIT_DONE, EXIT_INCOMPLETE, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What is the disk's fault, whatever file it is said of: the next one would meet the same."""

MESSAGE_LIMIT = 4 << 20
"""Longest line on the channel, bytes.  A page of 2,000 files with long names stays well below
it."""

UNPACKED_LIMIT, REQUEST_LIMIT = 32 << 20, 8 << 20
"""Longest message after decompression, bytes: an answer, and a request.  A small line must not
unfold into all of the memory."""

NESTING, ELEMENTS, DIGITS = 12, 250_000, 32
"""How deep a message may be, how many values, and how many digits in a row it may have: looked at
before it is parsed."""

LIGHT, BUFFERS, AT_WORK = 64 << 10, 8 << 20, 8 << 20
"""A server's memory, bytes: messages up to LIGHT are all listened to at once; longer ones have
together BUFFERS while they arrive, and AT_WORK, unpacked, while they are answered."""

PACK_FROM = 4096
"""Messages longer than this travel compressed."""

PAGE, PAGE_TEXT = 2000, 512 << 10
"""Rows in one page of a listing on the channel, and bytes of names in it: in JSON a byte can become
six."""

CONNECT_TIMEOUT = 10.0
HANDSHAKE_TIMEOUT = 15.0
"""Seconds a peer has for connect and TLS handshake; a Raspberry Pi needs well below one."""

SILENT_FROM, SILENT_REST = 2.0, 60.0
"""Seconds after which a host that could not be connected to counts as silent, and for which a pass
does not wait for it again, whatever else it wants of it."""

CONNECTION_REST = 20.0
"""Seconds for which a client keeps a connection that it does not use; a server's patience is
longer."""

REQUEST_IDLE = 900.0
"""Seconds a client may be silent on an open connection (it hashes large files between two
requests)."""

REPLY_TIMEOUT = 300.0
"""Seconds a client waits for an answer: a confirmation may make the server read a large file in
full."""

RSYNC_IDLE = 180.0
"""Seconds without a byte in either direction after which a transfer is given up.  rsync's own
--timeout did not fire within 30 s on stalled 3.2.7 and 3.5.0 clients (measured), so the relay
watches as well."""

SLOW_FROM, SLOW_LIMIT = 10.0, 1800.0
"""A server whose answers take longer than SLOW_FROM seconds has SLOW_LIMIT of them, over one
connection's life, until it is as good as down: or one slow host would hold up the passes of all
others for days."""

ROWS_LIMIT = 20_000_000
"""Rows of one listing, over all its pages, that are listened to."""

ROUNDS_LIMIT, BARREN_LIMIT = 1000, 50
"""Times in a row that a client asks for the news which came while it fetched the news; that it
claims files of a source, and none of them comes."""

LOOK_LIMIT = 900.0
"""Seconds that a pass waits for a server to look at its sources; then it goes on with what the last
look found."""

EXCESS_BYTES, EXCESS_PER_FILE = 16 << 20, 64 << 10
"""What a transfer may bring beyond twice the bytes that were claimed: lists, checksums, files that
are growing."""

CATALOG_BYTES = 8 << 30
"""The most that the catalogs which a restore fetches from one backup may add up to."""

LEAST_RATE, RATE_WINDOW = 64, 600.0
"""Bytes a second, over a window, below which a transfer is given up.  An rsync that only compares a
large file sends hundreds, and a peer that sends a byte now and then would hold up a pass for
ever."""

GENERATION_JUMP = 10_000_000
"""How far a backup's word may raise a catalog's generation, and (VERSION_JUMP) a member's the
configuration's version: no one can use up the numbers, and no honest member is that far ahead.
VERSION_FIRST: for a machine that knows none yet."""
VERSION_JUMP, VERSION_FIRST = 1_000_000, 1 << 61

STRANGER_LINE, STRANGER_SILENCE, STRANGER_TIME = 4096, 5.0, 15.0
"""What a peer may say, and how long it may be silent and take in all, until it has proved that it
is a member."""

ROOM, MEMBERS, MEMBER_SHARE = 128, 250, 100
"""Connections at the door that have not proved anything yet; those of members that are served at
once; those of one address."""

CONNECT_TRIES = 10
"""A server with a crowd before its door may cut a connection before it has said anything: so often
a client tries."""

LOOK_WAIT, READ_WAIT = 20.0, 5.0
"""Longest times a `look` request waits for the scan before it answers "still scanning", and behind
it for files to be read."""

BATCH_FILES, BATCH_BYTES = 2000, 1 << 30
"""One rsync run.  1,000 files cost 0.16 s through the channel, 10,000 1.5 s (measured); beside it
each batch costs three commits on either side.  A pass that dies loses at most one."""

PLAIN_BELOW = 1 << 20
"""New files up to this size are written without a temporary name and without looking for holes:
when they are cut off they come again from the beginning."""

SCARCE_BYTES = 16 << 20
"""While room is scarce a claim takes 1 % of what is free, so that clients at work together share;
but not less than this, or a small backup would fill in hundreds of steps."""

HEARD_WITHIN = 60.0
"""Seconds within which a backup that says the same again is not written down again."""

CLAIM_LEASE = 3600.0
"""Seconds of server time that a claim lasts; every word from the backup renews it."""

FRUITLESS_PASSES = 10
"""Passes in a row that go on with old claims and bring no copy, after which a backup's words no
longer renew its claims."""

RENEW_EVERY = 600.0
"""Seconds between two words to the servers whose files are on their way: one large file may take
many hours."""

STALE_LEASE = 3 * 3600.0
"""Seconds that a backup has to update a changed file before others may take it in its place."""

RECOVERY_WAIT = 3 * 3600.0
"""Seconds that a server whose books were lost waits for all backups' reports before it has files
copied again."""

DECLINE_FOR = 24 * 3600.0
"""Seconds until a file that a backup could not take is offered to it again."""

SAMPLES, SAMPLE_BYTES = 8, 16 << 10
WHOLE_BELOW = 256 << 10
"""A file up to WHOLE_BELOW is compared in full when confirmed, a larger one by SAMPLES random
samples."""

READ_BLOCK = 1 << 20

XATTRS_LIMIT, XATTRS_PAGE = 64 << 10, 1 << 20
"""Bytes of extended attributes (names and values) that are kept of one file, and, as they are
written, in one page of a catalog's news."""

ROTTEN = "rotten"
"""What `entries.blocked` says of a file whose content changed while its inode, size and times did
not."""

FINE_CLOCK, COARSE_CLOCK = 0.1, 2.1
"""A file that was changed so many seconds ago may be changed again without that its times show it:
times come from the kernel's tick (at most 10 ms), on older file systems they are whole seconds, on
FAT every second one."""

CANDIDATES, CHOICE = 64, 4
"""Files of the lowest level that a claim looks at: 64 (the simulation's sample), and 4 for each one
that is wanted."""

SHORT_OF_FILES = 1.3
"""A host is short of files when it could take all that it lacks with this times its room (with 1.0
it is noticed too late: of 3 copies on 5 unequal hosts with 3 % to spare, 3 % were made in vain;
with 1.3 none, at the median)."""

SHAPES = 20000
"""Groups of files that a server keeps in memory in parsed form, about 1 KiB each."""

OVERDUE_LEAST, OVERDUE_PERIODS, OVERDUE_TIMES = 3600.0, 4, 3
"""A source that was not looked at for an hour, for 4 times `scan` and for 3 times as long as a look
takes is not safe."""

HELD_FILES = 10000
"""Most files that are gone, and most that have changed, that the books keep to be shown while a
source is held."""

HELD_SHARE_OF = 20
"""Mass-change rule: more than half of at least this many files gone or changed within one scan."""

SCRUB_PASS_SECONDS = 20 * 60.0
"""A single pass reads copies for at most this long; the rest of the period's share waits."""

PART_SUFFIX_DIR = b".cbackup-part"
"""rsync's --partial-dir, relative, inside `incoming`: keeps the received part of a file that was
cut."""

META_DIR = b".cbackup"
RESTORE_DIR = b".cbackup-restore"
"""Working directory of a restore inside its target; never part of a source."""
RESTORE_MARK = b"whole"
"""A file in it while a whole source is being restored: as long as it is there, the source is
held."""
BEFORE_RESTORE = b".cbackup-before-"
"""How the directories begin, at the top of a target, into which `restore --force` moves what was in
the way; they are never part of a source either."""

RSYNC_PACKAGES = {"apt-get": "apt-get install -y rsync", "dnf": "dnf install rsync",
                  "apk": "apk add rsync",
                  "pacman": "pacman -S rsync", "zypper": "zypper install rsync",
                  "pkg": "pkg install rsync",
                  "brew": "brew install rsync", "pkgin": "pkgin install rsync"}
"""How the common systems install rsync; the first package manager found on PATH is named."""


# ==== 3. Errors ===================================================================================


class CBackupError(Exception):
    """Anything that is told to the user in one line.  `code` is the exit status that goes with
    it."""

    code = EXIT_INCOMPLETE


class UsageError(CBackupError):
    code = EXIT_USAGE


class ConfigError(CBackupError):
    """All that is wrong with a configuration: `problems` is a list of (line number or 0, text)."""

    code = EXIT_USAGE

    def __init__(self, path: str, problems: "List[Tuple[int, str]]") -> None:
        self.problems = sorted(problems)
        super().__init__("\n".join(
            "%s: %s" % ("%s line %d" % (path, line) if line else path, what)
            for line, what in self.problems))


class Unreachable(CBackupError):
    """A host did not answer; `host` names it."""

    def __init__(self, host: str, why: str) -> None:
        self.host = host
        super().__init__("%s: cannot be reached: %s" % (host, why))


class Refused(CBackupError):
    """The peer understood and said no; `reason` is a word of the protocol (`held`, `unknown`,
    ...)."""

    def __init__(self, reason: str, text: str) -> None:
        self.reason = reason
        super().__init__(text)


class ProtocolError(CBackupError):
    """The peer sent something that is not of the protocol."""


class OwnFailure(CBackupError):
    """A transfer failed because of this machine: no other host is to blame, and the next transfer
    would fail as well."""


class Cancelled(CBackupError):
    """A transfer that is no longer needed: others have delivered its files."""


class DamagedCatalog(CBackupError):
    """A catalog on disk that is not, or no longer, one."""


class Busy(CBackupError):
    """Somebody else holds the lock: not an error for a client started by cron."""


# ==== 4. Small helpers ============================================================================

_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([KMGT]?)\Z", re.I)
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])\Z")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_size(word: str) -> int:
    """Bytes of `700G`, `1.5T`, `512M` or `100`.  Raises ValueError with a text for people."""
    match = _SIZE.match(word)
    if not match:
        raise ValueError("%r is not a size: write 700G, 1.5T, 512M or a number of bytes" % word)
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()]) if "." in match.group(1) \
        else int(match.group(1)) * _UNITS[match.group(2).upper()]


def parse_duration(word: str) -> float:
    """Seconds of `90s`, `15m`, `6h`, `30d` or `2w`.  Raises ValueError with a text for people."""
    match = _DURATION.match(word)
    if not match:
        raise ValueError("%r is not a duration: write 90s, 15m, 6h, 30d or 2w" % word)
    return float(int(match.group(1)) * _SECONDS[match.group(2)])


def format_size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return "%d %s" % (count, unit) if unit == "bytes" else "%.3g %s" % (count, unit)
        count /= 1024.0
    return "%.3g TB" % count


def format_seconds(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 90:
        return "%d s" % seconds
    if seconds < 90 * 60:
        return "%d min" % round(seconds / 60)
    if seconds < 48 * 3600:
        return "%.1f h" % (seconds / 3600)
    return "%d days" % round(seconds / 86400)


def format_age(seconds: float) -> str:
    """How long ago, in words: "5 minutes", "3 hours", "3 days"."""
    for unit, word, least in ((86400, "day", 2), (3600, "hour", 1), (60, "minute", 1)):
        if seconds >= least * unit:
            return count_of(int(seconds // unit), word)
    return count_of(max(0, int(seconds)), "second")


def count_of(number: int, word: str) -> str:
    return "%s %s%s" % (format(number, ","), word, "" if number == 1 else "s")


def may_be_time(there: int, wanted: int) -> bool:
    """Whether a file system may say the time `there` (ns) of a file whose time was set to `wanted`:
    FAT counts in 2 s, HFS+ and ext3 in 1 s, exFAT in 10 ms, NTFS in 100 ns."""
    return there == wanted or any(there % step == 0 and abs(there - wanted) < step
                                  for step in (100, 1000, 10 ** 7, 10 ** 9, 2 * 10 ** 9))


def in_batches(items: "Iterable[Any]", most: int = 500) -> "Iterator[List[Any]]":
    """Lists of up to `most` items: each one transaction, where one for every item would wait for
    the disk every time."""
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, most)), [])


def in_pages(rows: "Iterable[Any]") -> "Iterator[List[Any]]":
    """Lists of as many rows, or names, as a message has room for: PAGE, fewer where the names are
    long."""
    rest = iter(rows)
    page = list(itertools.islice(rest, PAGE))
    while page:
        most = _that_have_room(page)
        yield page[:most]
        page = page[most:]
        page += itertools.islice(rest, PAGE - len(page))


def _that_have_room(page: "List[Any]") -> int:
    """How many rows, or names, of a page have room in a message: one at least."""
    flat = isinstance(page[0], (str, bytes))
    size = 0
    for column in [page] if flat else itertools.zip_longest(*page):
        kinds = set(map(type, column))
        if not kinds.isdisjoint((str, bytes)):
            size += sum(map(len, column if kinds <= {str, bytes} else
                            [cell for cell in column if isinstance(cell, (str, bytes))]))
    if size <= PAGE_TEXT:
        return len(page)
    size = 0
    for count, row in enumerate(page):
        size += len(row) if flat else sum([len(cell) for cell in row
                                           if isinstance(cell, (str, bytes))])
        if count and size > PAGE_TEXT:
            return count
    return len(page)


def first_page(rows: "Iterable[Any]") -> "List[Any]":
    return next(in_pages(rows), [])


def with_more(rows: "List[Any]") -> "Tuple[List[Any], bool]":
    """(first_page, whether more may follow) of at most PAGE rows that were asked for."""
    page = first_page(rows)
    return page, len(page) == PAGE or len(page) < len(rows)


def as_text(raw: bytes) -> str:
    """A name as it travels in JSON: UTF-8, what is not UTF-8 as lone surrogates."""
    return raw.decode("utf-8", "surrogateescape")


def as_raw(text: str) -> bytes:
    """The inverse of `as_text`.  Raises ProtocolError for text that no file name can have given."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ProtocolError("a name that is not valid text")


def shown(raw: "bytes | str") -> str:
    """A name, or any text from elsewhere, for people: control characters, escape sequences and what
    is not UTF-8 are shown as such.  What is shown already stays as it is."""
    text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fold_key(path: bytes) -> bytes:
    """The same for all names that some file system may take for one name: by case, by the form of
    composed letters."""
    import unicodedata
    try:
        text = unicodedata.normalize("NFD", path.decode()).casefold()
    except UnicodeDecodeError:
        return path.lower()
    return unicodedata.normalize("NFC", text).encode()


def difference(other: bytes, path: bytes) -> str:
    """In which way `path` is taken for `other` by a file system that folds names."""
    import unicodedata
    texts = [unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape"))
             for name in (other, path)]
    return "differs only in %s from %s" % ("Unicode normal form" if texts[0] == texts[1]
                                           else "case", shown(other))


_NOT_PLAIN = re.compile(rb"(?:\A|/)\.{0,2}(?:/|\Z)|\0").search
"""Finds an empty part, "." or ".." in a path, or a zero byte."""


def check_relative(raw: bytes) -> bytes:
    """`raw` itself when it is a plain relative path that stays below its root; else
    ProtocolError."""
    if len(raw) > 8192 or _NOT_PLAIN(raw):
        if not raw or len(raw) > 8192 or b"\0" in raw:
            raise ProtocolError("not a path: %s" % shown(raw[:80]))
        raise ProtocolError("not a plain relative path: %s" % shown(raw[:200]))
    return raw


def reason_of(error: BaseException) -> str:
    """What an exception says to people: the system's words for an OSError, else its own text."""
    if isinstance(error,
                  OSError) and error.strerror and not isinstance(error,
                                                                 getattr(ssl, "SSLError", ())):
        return error.strerror
    return str(error) or error.__class__.__name__


def fsync(descriptor: int, drive: bool = True) -> None:
    """fsync(2), and with `drive`, on macOS, also what the drive has in its cache: there fsync alone
    stops before it."""
    os.fsync(descriptor)
    if drive and hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):  # not on every file system
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)


def fsync_directory(path: "str | bytes") -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str, data: bytes, mode: int = 0o600) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the whole new
    one."""
    temporary = "%s.%d.new" % (path, os.getpid())
    descriptor = os.open(temporary,
                         os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            fsync(stream.fileno())
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_directory(os.path.dirname(path) or ".")


def read_json(path: str) -> "Dict[str, Any]":
    """The object in a JSON file of ours; {} when it is absent or damaged (all of them can be made
    again)."""
    try:
        with open(path, "rb") as stream:
            value = json.loads(stream.read().decode())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class PlainFormatter(logging.Formatter):
    """Nothing that a peer or a name says reaches a terminal raw; the lines of a traceback (-v) stay
    lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(shown, super().format(record).split("\n")))


def for_test(name: str) -> "Optional[str]":
    """What a test has set for this process: the variable CBACKUP_TEST_`name`, or None; only
    together with CBACKUP_TEST=1, so that nobody has it by mistake.  Read when it is needed."""
    return os.environ.get("CBACKUP_TEST_" + name) if os.environ.get("CBACKUP_TEST") == "1" else None


def number_or(text: "Optional[str]", default: float) -> float:
    """A finite number that a test has set; what makes no sense is as if nothing were set."""
    try:
        value = float(text or default)
    except ValueError:
        return default
    return value if abs(value) < 1e12 else default


class Clock:
    """The program's times, for all that is policy: how old, how often, how long.  What waits for a
    peer, a disk or another thread uses time.monotonic().  CBACKUP_TEST_CLOCK names a file with
    seconds to add, so that tests can age things."""

    def __init__(self) -> None:
        self._furthest = 0.0
        self._set: "Tuple[Any, float]" = (None, 0.0)  # a test's clock: which file, what it says

    def _offset(self) -> float:
        name = for_test("CLOCK")
        if not name:
            return 0.0
        try:
            info = os.stat(name)
            file = info.st_ino, info.st_mtime_ns, info.st_size
            if self._set[0] != file:
                with open(name) as stream:
                    self._set = file, number_or(stream.read(64), 0.0)
        except (OSError, ValueError):
            return 0.0
        return self._set[1]

    def now(self) -> float:
        """Seconds since 1970, as the host believes."""
        return time.time() + self._offset()

    def steady(self) -> float:
        """Seconds that only ever grow while this process runs; no relation to the date."""
        self._furthest = max(self._furthest, self._offset())
        return time.monotonic() + self._furthest

    @staticmethod
    def nap(seconds: float) -> float:
        """How long to wait for `seconds` of this clock before it is looked at again: a test may set
        it."""
        return min(seconds, 0.25) if for_test("CLOCK") else seconds


clock = Clock()


def test_point(name: str) -> None:
    """A place where a test may want this process to die: CBACKUP_TEST_KILL=NAME or NAME:COUNT or
    any:COUNT.

    `any:COUNT` dies at the COUNT-th of all points.  Without the variable this costs two look-ups.
    """
    wanted, _, count = (for_test("KILL") or "").partition(":")
    if wanted in (name, "any"):
        _test_points[0] += 1
        if _test_points[0] >= int(count if count.isdecimal() else 1):
            os.kill(os.getpid(), signal.SIGKILL)


_test_points = [0]


def log_failure(what: str, error: BaseException) -> None:
    """Log what went wrong where the work goes on; with its traceback when all is logged, and in a
    test when it is a mistake in cbackup itself."""
    mistake = not isinstance(error, (CBackupError, OSError, sqlite3.Error, MemoryError))
    log.error("%s: %s", what, reason_of(error), exc_info=error if log.isEnabledFor(logging.DEBUG)
              or mistake and os.environ.get("CBACKUP_TEST") == "1" else None)


RATE_SECONDS = 30.0
"""A rate is that of so many last seconds: it has to follow when another machine, or a slower disk,
has its turn."""

WAITING_AFTER = 5.0
"""Seconds after which somebody at a terminal is told for whom cbackup is waiting."""


class Progress:
    """One line on a terminal that says what, how much of how much, the rate and the time left.

    Silent when standard error is not a terminal or when told to be quiet.  `update` may be called
    as often as the caller likes, from any thread.  What else goes to standard error calls
    `clear_line` before.
    """

    quiet = False  # of the whole process: nobody shows progress
    _standing: "Optional[Progress]" = None  # whose line is on the terminal now

    def __init__(self, quiet: bool = False) -> None:
        self.on = not quiet and not Progress.quiet and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._drawn = 0.0
        self._width = 0
        self._points: "Dict[str, List[Tuple[float, float]]]" = {}

    def update(self, what: str, done: float, total: float, note: str = "") -> None:
        if not self.on:
            return
        now = time.monotonic()
        with self._lock:
            points = self._points.setdefault(what, [(now, done)])
            if now - self._drawn < 0.2:
                return
            self._drawn = now
            line = "%s: %s of %s" % (what, format_size(done), format_size(max(total, done)))
            rate = self._rate(points, now, done)
            if rate > 0:
                line += ", %s/s, %s left" % (format_size(rate),
                                             format_seconds(max(0, total - done) / rate))
            self._draw(line + note)

    @staticmethod
    def _rate(points: "List[Tuple[float, float]]", now: float, done: float) -> float:
        """Bytes a second since RATE_SECONDS ago; 0 when it is not known.  points: (time, done) of
        before, one a second."""
        while len(points) > 1 and points[1][0] <= now - RATE_SECONDS:
            points.pop(0)
        if now - points[-1][0] >= 1:
            points.append((now, done))
        first, base = points[0]
        return (done - base) / (now - first) if now - first > 1 else 0.0

    def say(self, line: str) -> None:
        """Show a state without figures, such as what is being waited for."""
        if self.on:
            with self._lock:
                self._draw(line)

    def _draw(self, line: str) -> None:
        line = line[:shutil.get_terminal_size().columns - 1]
        sys.stderr.write("\r" + line + " " * max(0, self._width - len(line)))
        sys.stderr.flush()
        self._width = len(line)
        Progress._standing = self

    def clear(self) -> None:
        if self.on and self._width:
            with self._lock:
                sys.stderr.write("\r" + " " * self._width + "\r")
                sys.stderr.flush()
                self._width = 0


def clear_line() -> None:
    """Take away the progress line, whosever it is: an error must not stand on it."""
    if Progress._standing:
        Progress._standing.clear()


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Log lines on standard error, on lines of their own."""

    def emit(self, record: logging.LogRecord) -> None:
        clear_line()
        super().emit(record)


TINTS = {"well": "32", "wait": "33", "wrong": "31"}


def tint(state: str, text: str) -> str:
    """Text for standard output, in the colour of `well`, `wait` or `wrong` on a terminal, unless
    NO_COLOR is set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return "\033[%sm%s\033[0m" % (TINTS[state], text)


class Pace:
    """Keeps a loop that handles bytes below a rate (bytes a second; None: no limit)."""

    def __init__(self, rate: "Optional[float]") -> None:
        self.rate = rate
        self._due = time.monotonic()

    def spent(self, count: int) -> None:
        if self.rate:
            now = time.monotonic()
            self._due = max(self._due, now - 0.1) + count / self.rate
            if self._due > now:
                time.sleep(self._due - now)


def new_digest(data: bytes = b"") -> Any:
    """BLAKE2b-256: in every Python since 3.6, and the fastest good digest on processors without SHA
    instructions (a Raspberry Pi)."""
    return hashlib.blake2b(data, digest_size=32)


def digest_descriptor(descriptor: int, pace: "Optional[Pace]" = None,
                      size: int = -1) -> "Tuple[bytes, int]":
    """(digest, bytes read) of an open file from its start.  With `size`, what its stat says, its
    end is not looked for: the caller compares the stat once more, or cares for the first `size`
    bytes only."""
    if 0 <= size <= READ_BLOCK:
        block = os.pread(descriptor, size, 0)
        if len(block) == size:
            if pace:
                pace.spent(size)
            return new_digest(block).digest(), size
    digest, total = new_digest(), 0
    while total != size:
        block = os.pread(descriptor, READ_BLOCK if size < 0 else min(READ_BLOCK, size - total),
                         total)
        if not block:
            break
        digest.update(block)
        total += len(block)
        if pace:
            pace.spent(len(block))
    return digest.digest(), total


def copy_rest(reader: int, writer: Any, on_block: "Callable[[bytes], None]") -> None:
    """Copy a file from where the descriptor `reader` is, to where the stream `writer` is and to its
    end: holes stay holes.  `on_block` is called with each block."""
    for block in iter(lambda: os.read(reader, READ_BLOCK), b""):
        if block.count(0) == len(block):
            writer.seek(len(block), os.SEEK_CUR)
        else:
            writer.write(block)
        on_block(block)
    writer.truncate()


def list_xattrs(place: "int | str | bytes", follow: bool = True) -> "List[str]":
    """The names of a file's extended attributes; a file system without them has none.  Only where
    Python has the calls, which is on Linux."""
    try:
        return os.listxattr(place, follow_symlinks=follow)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            return []
        raise


class _Parents:
    """The directories that one thread used last in a tree, open: path -> descriptor, the last one
    last. Closed with the thread, or when the tree forgets them."""

    __slots__ = ("open", "age")

    def __init__(self) -> None:
        self.open: "Dict[bytes, int]" = {}
        self.age: Any = None

    def clear(self) -> None:
        while self.open:
            os.close(self.open.popitem()[1])

    __del__ = clear


class Tree:
    """A directory whose inside is reached without ever following a symlink: the one place for such
    paths.

    All paths are relative bytes.  Each operation walks from the root's descriptor with O_NOFOLLOW,
    so that a symlink that lies (or is put) inside leads nowhere.  Safe to use by several threads.

    The parents that a thread used last stay open for it: most callers go through sorted paths.
    Directories are removed only through this object while it is in use, which forgets them then.
    """

    _REMEMBERED = 16
    """More than any one operation uses: what it has been given stays open until it is over."""

    _FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    _DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    _ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EMLINK)
    """What open(2) says, on one system or another, of a parent that is missing, a file or a
    symlink."""
    IMPOSSIBLE = (errno.EILSEQ, errno.EINVAL, errno.ENAMETOOLONG)
    """What file systems say of a name that they cannot hold: nothing is under it."""
    NO_FILE = _ABSENT + IMPOSSIBLE
    """What `open_file` raises where there is no regular file; else there is one, and it cannot be
    read."""

    def __init__(self, root: "str | bytes", own_links: bool = False) -> None:
        """`own_links`: symlinks that stand where a directory has to be made are ours, and are
        removed."""
        self.root = os.fsencode(root)
        self._own_links = own_links
        self._here = threading.local()
        self._age = object()  # another one with all that is forgotten
        self._root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        self._forget()
        self._parents()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def _forget(self) -> None:
        """The next operation of each thread walks from the root."""
        self._age = object()

    def _parents(self) -> "Dict[bytes, int]":
        """This thread's open directories."""
        try:
            mine = self._here.parents
        except AttributeError:
            mine = self._here.parents = _Parents()
        age = self._age
        if mine.age is not age:
            mine.clear()
            mine.age = age
        return mine.open

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _parent(self, rel: bytes, make: bool = False) -> "Tuple[int, bytes]":
        """(descriptor of the parent directory, last name).  With `make`, missing parents are made.
        The descriptor is this thread's for the operation that it asks for, and is not closed by
        it."""
        above, _, name = rel.rpartition(b"/")
        known = self._parents()
        if above in known and name not in (b"", b".", b"..") and b"\0" not in name:
            descriptor = known.pop(above)
        else:
            check_relative(rel)
            if not above:
                return self._root, name
            descriptor = self._walk(above, make)
            if len(known) >= self._REMEMBERED:
                os.close(known.pop(next(iter(known))))
        known[above] = descriptor
        return descriptor, name

    def _walk(self, above: bytes, make: bool) -> int:
        """A new descriptor of a directory; from its own parent on where that is open."""
        upper, _, last = above.rpartition(b"/")
        known = self._parents().get(upper, self._root if not upper else -1)
        if known >= 0:
            return self._step(known, last, make)
        descriptor = os.dup(self._root)
        for part in above.split(b"/"):
            try:
                following = self._step(descriptor, part, make)
            finally:
                os.close(descriptor)
            descriptor = following
        return descriptor

    def _step(self, descriptor: int, part: bytes, make: bool) -> int:
        try:
            return os.open(part, self._DIRECTORY, dir_fd=descriptor)
        except OSError as error:
            if not make or error.errno not in self._ABSENT:
                raise
        with contextlib.suppress(FileNotFoundError):
            if self._own_links and stat.S_ISLNK(os.stat(part, dir_fd=descriptor,
                                                        follow_symlinks=False).st_mode):
                os.unlink(part, dir_fd=descriptor)
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, 0o700, dir_fd=descriptor)
        return os.open(part, self._DIRECTORY, dir_fd=descriptor)

    def lstat(self, rel: bytes, strict: bool = False) -> "Optional[os.stat_result]":
        """The entry's own stat; None when there is none (or a parent is missing or not a
        directory), and also when no such name can be there, which raises OSError when `strict`."""
        try:
            descriptor, name = self._parent(rel)
            return os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        except OSError as error:
            if error.errno in self._ABSENT or not strict and error.errno in self.IMPOSSIBLE:
                return None
            raise

    def open(self, rel: bytes) -> int:
        """A descriptor for reading a regular file.  Raises OSError, also for anything that is not
        one."""
        return self.open_file(rel)[0]

    def open_file(self, rel: bytes) -> "Tuple[int, os.stat_result]":
        """The same, and the file's stat."""
        descriptor, name = self._parent(rel)
        found = os.open(name, self._FILE, dir_fd=descriptor)
        info = os.fstat(found)
        if not stat.S_ISREG(info.st_mode):
            os.close(found)
            raise OSError(errno.EINVAL, "not a regular file")
        return found, info

    def digest(self, rel: bytes, pace: "Optional[Pace]" = None) -> "Tuple[bytes, int]":
        """(digest, bytes) of a regular file.  Raises OSError."""
        descriptor = self.open(rel)
        try:
            return digest_descriptor(descriptor, pace)
        finally:
            os.close(descriptor)

    def make_directory(self, rel: bytes) -> None:
        self._parent(rel + b"/x", make=True)

    def rename(self, old: bytes, new: bytes) -> None:
        """Rename within the tree, replacing what is at `new`; parents of `new` are made."""
        new_dir, new_name = self._parent(new, make=True)
        old_dir, old_name = self._parent(old)
        os.rename(old_name, new_name, src_dir_fd=old_dir, dst_dir_fd=new_dir)

    def rename_new(self, old: bytes, new: bytes) -> None:
        """The same where nothing is at `new`; else FileExistsError."""
        new_dir, new_name = self._parent(new, make=True)
        try:
            os.stat(new_name, dir_fd=new_dir, follow_symlinks=False)
        except FileNotFoundError:
            pass
        else:
            raise FileExistsError(errno.EEXIST, "something else is there")
        old_dir, old_name = self._parent(old)
        os.rename(old_name, new_name, src_dir_fd=old_dir, dst_dir_fd=new_dir)

    def link(self, old: bytes, new: bytes) -> None:
        """A second name `new` for the file `old`.  Raises OSError where the file system has no
        links."""
        new_dir, new_name = self._parent(new, make=True)
        old_dir, old_name = self._parent(old)
        os.link(old_name, new_name, src_dir_fd=old_dir, dst_dir_fd=new_dir, follow_symlinks=False)

    def copy(self, old: bytes, new: bytes) -> bytes:
        """Write what is in the file `old` into a new one, durably; its digest.  Where a file has
        holes the other one has them, too."""
        new_dir, new_name = self._parent(new, make=True)
        reader, digest = self.open(old), new_digest()
        try:
            with open(os.open(new_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600,
                              dir_fd=new_dir), "wb") as writer:
                copy_rest(reader, writer, digest.update)
                writer.flush()
                fsync(writer.fileno())
        finally:
            os.close(reader)
        return digest.digest()

    def symlink(self, target: bytes, rel: bytes) -> None:
        descriptor, name = self._parent(rel, make=True)
        os.symlink(target, name, dir_fd=descriptor)

    def readlink(self, rel: bytes) -> bytes:
        descriptor, name = self._parent(rel)
        return os.readlink(name, dir_fd=descriptor)

    def unlink(self, rel: bytes) -> None:
        descriptor, name = self._parent(rel)
        os.unlink(name, dir_fd=descriptor)

    def rmdir(self, rel: bytes) -> None:
        self._forget()
        descriptor, name = self._parent(rel)
        os.rmdir(name, dir_fd=descriptor)
        self._forget()

    def list(self, rel: bytes = b"") -> "List[bytes]":
        """The names in a directory, sorted; [] when it does not exist."""
        try:
            descriptor, _ = self._parent(rel + b"/x" if rel else b"x")
            return sorted(os.fsencode(name) for name in os.listdir(descriptor))
        except OSError as error:
            if error.errno in self._ABSENT:
                return []
            raise

    def walk_files(self, rel: bytes, after: bytes = b"") -> "Iterator[bytes]":
        """Every path below `rel` that is not a directory, depth first; only those that come behind
        `after`, a path below `rel`, when it is given."""
        stack = [(rel, iter(self.list(rel)), after)]
        while stack:
            above, names, behind = stack[-1]
            first, _, rest = behind.partition(b"/")
            for name in names:
                below = above + b"/" + name if above else name
                info = self.lstat(below) if name >= first else None
                if info is not None and stat.S_ISDIR(info.st_mode):
                    stack.append((below, iter(self.list(below)), rest if name == first else b""))
                    break
                if info is not None and name > first:
                    yield below
            else:
                stack.pop()

    def clear_empty(self, rel: bytes, links: bool = False) -> None:
        """Remove the directory `rel` and the directories in it, as far as they are empty; with
        `links`, the symlinks in them too."""
        for name in self.list(rel):
            info = self.lstat(rel + b"/" + name)
            if info is not None and stat.S_ISDIR(info.st_mode):
                self.clear_empty(rel + b"/" + name, links)
            elif links and info is not None and stat.S_ISLNK(info.st_mode):
                self.unlink(rel + b"/" + name)
        with contextlib.suppress(OSError):
            self.rmdir(rel)

    def chmod(self, rel: bytes, mode: int) -> None:
        """chmod of a regular file or directory; everything else is left alone."""
        descriptor, name = self._parent(rel)
        info = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if stat.S_IMODE(info.st_mode) == mode or not stat.S_ISREG(info.st_mode) \
                and not stat.S_ISDIR(info.st_mode):
            return
        if os.chmod in os.supports_follow_symlinks:
            os.chmod(name, mode, dir_fd=descriptor, follow_symlinks=False)
            return
        with self._itself(descriptor, name) as (found, place):
            if not stat.S_ISLNK(os.fstat(found).st_mode):
                os.chmod(place, mode)

    @contextlib.contextmanager
    def _itself(self, descriptor: int, name: bytes) -> "Iterator[Tuple[int, Any]]":
        """(descriptor, what os.chmod and the like take) of an entry: a symlink that has taken the
        place since is not followed.  With O_PATH it takes no permission."""
        by_path = os.O_RDONLY | os.O_NONBLOCK
        if os.path.isdir("/proc/self/fd") and hasattr(os, "O_PATH"):
            by_path = os.O_PATH
        found = os.open(name, by_path | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
        try:
            yield found, found if by_path & os.O_NONBLOCK else "/proc/self/fd/%d" % found
        finally:
            os.close(found)

    @contextlib.contextmanager
    def _place(self, rel: bytes) -> "Iterator[Any]":
        if not rel:
            yield self._root
            return
        with self._itself(*self._parent(rel)) as (_, place):
            yield place

    def xattrs(self, rel: bytes) -> "Dict[str, bytes]":
        """The extended attributes of an entry itself, b"" being the root.  Raises OSError."""
        with self._place(rel) as place:
            return {key: os.getxattr(place, key) for key in list_xattrs(place)}

    def set_xattr(self, rel: bytes, key: str, value: "Optional[bytes]") -> None:
        """Set one of them, or with None remove it.  Raises OSError."""
        with self._place(rel) as place:
            if value is None:
                os.removexattr(place, key)
            else:
                os.setxattr(place, key, value)

    def chown(self, rel: bytes, uid: int, gid: int) -> None:
        descriptor, name = self._parent(rel)
        os.chown(name, uid, gid, dir_fd=descriptor, follow_symlinks=False)

    def set_mtime(self, rel: bytes, mtime_ns: int) -> None:
        descriptor, name = self._parent(rel)
        os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=descriptor, follow_symlinks=False)

    def sync(self, paths: "Iterable[bytes]") -> None:
        """Make files, and their names in their directories, durable; also that a file is no longer
        under its name.

        Linux has one call for a whole file system; elsewhere every file is synced by itself, and
        every directory above it: those that were made for it have names, too.
        """
        paths = list(paths)
        if not paths or _syncfs(self._root):
            return
        gone = (FileNotFoundError, NotADirectoryError)
        for rel in paths:
            with contextlib.suppress(*gone):
                descriptor = self.open(rel)
                try:
                    fsync(descriptor, drive=False)
                finally:
                    os.close(descriptor)
        above: "set[bytes]" = set()
        for rel in paths:
            while b"/" in rel and rel.rpartition(b"/")[0] not in above:
                rel = rel.rpartition(b"/")[0]
                above.add(rel)
        for rel in above:
            with contextlib.suppress(*gone):
                fsync(self._parent(rel + b"/x")[0], drive=False)
        fsync(self._root)

    def sync_at_once(self) -> bool:
        """Make everything on the tree's file system durable by one call; False where this system
        has none that waits for it.  Raises OSError when something could not be written."""
        return _syncfs(self._root)

    def sync_all(self) -> None:
        """The same, as far as the system can."""
        if not self.sync_at_once():
            os.sync()


def stats_of(tree: Tree, rels: "Iterable[bytes]") -> "Iterator[Optional[os.stat_result]]":
    """`lstat` of each; where a directory is missing, all that is asked for in it in a row is told
    by one look."""
    above, there = b"", True
    for rel in rels:
        if rel.rpartition(b"/")[0] != above:
            above = rel.rpartition(b"/")[0]
            there = not above or tree.lstat(above) is not None
        yield tree.lstat(rel) if there else None


def _syncfs(descriptor: int) -> bool:
    """syncfs(2) on Linux; False where there is none, so that the caller syncs file by file.  Raises
    OSError when something could not be written: who opens the files after that, to sync them one by
    one, is no longer told of it."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes  # only clients that copied something come here
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) == 0:
            return True
    except (OSError, AttributeError):
        return False
    error = ctypes.get_errno()
    if error in DISK_ERRORS:
        raise OSError(error, os.strerror(error))
    return False


def install_hint(program: str) -> str:
    """The command that installs `program` on this system, as far as one can tell."""
    for manager, command in RSYNC_PACKAGES.items():
        if shutil.which(manager):
            return command.replace("rsync", program)
    return "your system's package manager (package %s)" % program


def require_python_parts() -> None:
    for module, package in ((sqlite3, "sqlite3"), (ssl, "ssl")):
        if module is None:
            raise UsageError("this Python (%s) has no %s module; install a complete one, for "
                             "example with: %s"
                             % (sys.executable, package, install_hint("python3")))


# ==== 5. Digests and data types ===================================================================


def choose_samples(size: int) -> "List[int]":
    """Offsets of the samples by which a file of `size` is confirmed; [] means: compare all of
    it."""
    if size <= WHOLE_BELOW:
        return []
    return sorted(random.SystemRandom().sample(range(0, size - SAMPLE_BYTES + 1), SAMPLES))


def digest_samples(descriptor: int, offsets: "Iterable[int]") -> bytes:
    """One digest over SAMPLE_BYTES at each offset, in the order given."""
    digest = new_digest()
    for offset in offsets:
        digest.update(os.pread(descriptor, SAMPLE_BYTES, offset))
    return digest.digest()


def tag_of(path: bytes, size: int, mtime: int, digest: bytes) -> int:
    """32 bits that stand for one copy in the sums by which server and backup compare their
    books."""
    mixed = hashlib.blake2b(b"%d %d %s %s" % (size, mtime, digest, path), digest_size=4)
    return int.from_bytes(mixed.digest(), "big")


class Source(namedtuple("Source", "name host path replicas exclude exclude_caches xattrs read_rate"
                                  " bwlimit",
                        defaults=((), False, False, None, None))):
    """A [sources] line.  `exclude`: patterns as gitignore has them, a tuple; `exclude_caches`:
    leave out what a CACHEDIR.TAG marks; `xattrs`: keep extended attributes, which ACLs are, too;
    `read_rate`, `bwlimit`: bytes a second or None."""

    __slots__ = ()


class Backup(namedtuple("Backup", "name host path size reserve read_rate bwlimit leaving",
                        defaults=(None, None, None, None, False))):
    """A [backups] line.  `size`: the most that the files may add up to; `reserve`: bytes that stay
    free; both None where the line has none; `leaving`: its copies are to be made elsewhere."""

    __slots__ = ()


class Wanted(namedtuple("Wanted", "path size mtime mode uid gid version")):
    """A file as a server hands it out: the version that a copy must be of.  `path` is of bytes."""

    __slots__ = ()

    @classmethod
    def from_row(cls, row: "List[Any]") -> "Wanted":
        """Of a row that has the shape WANTED."""
        return cls(as_raw(row[0]), *row[1:])


# ==== 6. Configuration and home ===================================================================

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


class Config:
    """A configuration that has been checked, never changed afterwards.  `text` is what was read, to
    the byte; `values`: what [cluster] sets, the others are as here: times in seconds, rates in
    bytes a second.  `hosts`: name -> (address, port); `sources` and `backups`: name -> line."""

    name = "home"
    port, replicas = 5005, 2
    keep, scrub = 30 * 86400.0, 30 * 86400.0
    scan, scan_min = 900.0, 30.0
    warn_after, alert_after, lost_after = 2 * 86400.0, 86400.0, 14 * 86400.0
    read_rate: "Optional[int]" = None
    bwlimit: "Optional[int]" = None

    def __init__(self, text: str, hosts: "Optional[Dict[str, Tuple[str, int]]]" = None,
                 sources: "Optional[Dict[str, Source]]" = None,
                 backups: "Optional[Dict[str, Backup]]" = None, **values: Any) -> None:
        self.text = text
        self.hosts, self.sources, self.backups = hosts or {}, sources or {}, backups or {}
        vars(self).update(values)

    def address(self, host: str) -> "Tuple[str, int]":
        """Where the server of `host` listens: its [hosts] line, else its name and the cluster's
        port."""
        return self.hosts.get(host) or (host, self.port)

    def all_hosts(self) -> "List[str]":
        named = [s.host for s in self.sources.values()] + [b.host for b in self.backups.values()]
        return sorted(set(self.hosts) | set(named))

    def sources_of(self, host: str) -> "List[Source]":
        return [s for s in self.sources.values() if s.host == host]

    def backups_of(self, host: str) -> "List[Backup]":
        return [b for b in self.backups.values() if b.host == host]

    def lines_about(self, host: str) -> "Dict[str, str]":
        """"source NAME" or "backup NAME" of a host -> its line."""
        out, section = {}, ""
        for line in self.text.splitlines():
            header, entry = re.match(r"\s*\[(\w+)\]", line), re.match(r"\s*([A-Za-z0-9._-]+)\s*=",
                                                                      line)
            section = header.group(1) if header else section
            things: "Dict[str, Any]" = {"sources": self.sources,
                                        "backups": self.backups}.get(section, {})
            if entry and entry.group(1) in things and things[entry.group(1)].host == host:
                out["%s %s" % (section[:-1], entry.group(1))] = line.strip()
        return out

    def too_few_hosts(self, source: "Source") -> str:
        """Why a source cannot have its copies, however much room there is; "" when it can."""
        others = {b.host for b in self.backups.values() if b.host != source.host and not b.leaving}
        if len(others) >= source.replicas:
            return ""
        return "%d copies on different hosts are wanted, and only %s can have a copy" % (
            source.replicas, count_of(len(others), "other host"))

    def names(self) -> "set[str]":
        """All lines of sources and backups, as "sources/photos" and "backups/pi"."""
        return {"sources/" + name for name in self.sources} | {"backups/" + name
                                                               for name in self.backups}

    def rate(self, *lines: "Any", key: str) -> "Optional[int]":
        """The lowest of the cluster's and the given lines' `read_rate` or `bwlimit`; None without
        any."""
        found = {"read_rate": (self.read_rate, [x.read_rate for x in lines]),
                 "bwlimit": (self.bwlimit, [x.bwlimit for x in lines])}[key]
        rates = [rate for rate in [found[0]] + found[1] if rate]
        return min(rates) if rates else None


def _parse_count(word: str) -> int:
    if not word.isdigit() or not 1 <= int(word) <= 100:
        raise ValueError("%r is not a number from 1 to 100" % word)
    return int(word)


def _parse_port(word: str) -> int:
    if not word.isdigit() or not 1 <= int(word) <= 65535:
        raise ValueError("%r is not a port (1 to 65535)" % word)
    return int(word)


def _parse_name(word: str) -> str:
    if not _NAME.match(word):
        raise ValueError("%r is not a name: letters, digits, dot, dash and underscore, 63 at the "
                         "most" % word)
    return word


def _parse_rate(word: str) -> int:
    return max(1, parse_size(word))


CLUSTER_KEYS: "Dict[str, Callable[[str], Any]]" = {
    "name": _parse_name, "port": _parse_port, "replicas": _parse_count, "keep": parse_duration,
    "scan": parse_duration, "scan_min": parse_duration, "scrub": parse_duration,
    "warn_after": parse_duration,
    "alert_after": parse_duration,
    "lost_after": parse_duration, "read_rate": _parse_rate, "bwlimit": _parse_rate}
SOURCE_KEYS: "Dict[str, Callable[[str], Any]]" = {
    "replicas": _parse_count, "exclude": str, "read_rate": _parse_rate, "bwlimit": _parse_rate}
BACKUP_KEYS: "Dict[str, Callable[[str], Any]]" = {
    "size": parse_size, "reserve": parse_size, "read_rate": _parse_rate, "bwlimit": _parse_rate}
FLAGS = {"leaving": BACKUP_KEYS, "exclude_caches": SOURCE_KEYS, "xattrs": SOURCE_KEYS}
"""Keys without a value, and on which lines they are."""
SECTIONS = ("cluster", "hosts", "sources", "backups")


class _Parser:
    """Reads a configuration line by line and collects everything that is wrong with it.

    Not configparser: every error needs its line, `=` and `:` occur in values, and values are quoted
    as in a shell (shlex does that part).
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.problems: "List[Tuple[int, str]]" = []
        self.cluster: "Dict[str, Any]" = {}
        self.hosts: "Dict[str, Tuple[str, Optional[int]]]" = {}
        self.sources: "Dict[str, Dict[str, Any]]" = {}
        self.backups: "Dict[str, Dict[str, Any]]" = {}
        self._lines: "Dict[Tuple[str, str], int]" = {}

    def parse(self) -> None:
        section = None
        for number, line in enumerate(self.text.splitlines(), 1):
            stripped = line.strip()
            if not stripped or stripped.startswith("#"):
                continue
            header = re.match(r"\[\s*([^\]]*?)\s*\]\s*(#.*)?\Z", stripped)
            if header:
                section = header.group(1)
                if section not in SECTIONS:
                    self.problems.append((number, "no section is called [%s]; there are [%s]"
                                          % (section, "], [".join(SECTIONS))))
                continue
            if section in SECTIONS:
                self._line(number, section, stripped)
            elif section is None:
                self.problems.append((number, "a line before the first section"))

    def _line(self, number: int, section: str, line: str) -> None:
        name, equals, value = line.partition("=")
        name = name.strip()
        try:
            lexer = shlex.shlex(value, posix=True, punctuation_chars=False)
            lexer.whitespace_split, lexer.commenters = True, "#"
            words = list(lexer)
            if not equals:
                raise ValueError("not of the form NAME = VALUE: %s" % line)
            if section != "cluster":
                _parse_name(name)
            known = self._lines.setdefault((section, name.lower()), number)
            if known != number:
                raise ValueError("the name %s is used twice; the first time in line %d"
                                 % (name, known))
            {"cluster": self._cluster, "hosts": self._host,
             "sources": self._source, "backups": self._backup}[section](number, name, words)
        except ValueError as error:
            text = {"No closing quotation": "a quotation mark without its partner",
                    "No escaped character": "a backslash at the end"}.get(str(error), str(error))
            self.problems.append((number, text))

    def _cluster(self, number: int, key: str, words: "List[str]") -> None:
        if key not in CLUSTER_KEYS:
            raise ValueError("no key is called %r; there are %s" % (key, ", ".join(CLUSTER_KEYS)))
        if len(words) != 1:
            raise ValueError("%s needs one value" % key)
        self.cluster[key] = CLUSTER_KEYS[key](words[0])

    def _host(self, number: int, name: str, words: "List[str]") -> None:
        if not words:
            raise ValueError("host %s has no address: write %s = ADDRESS or ADDRESS:PORT"
                             % (name, name))
        if len(words) > 1:
            raise ValueError("host %s: one address is enough, found %d words" % (name, len(words)))
        self.hosts[name] = split_address(words[0])

    def _place(self, words: "List[str]",
               keys: "Dict[str, Callable[[str], Any]]") -> "Dict[str, Any]":
        """The common part of a source's and a backup's line: HOST:/PATH key=value ..."""
        if not words:
            raise ValueError("HOST:/PATH is missing")
        host, colon, path = words[0].partition(":")
        if not colon or not path.startswith("/"):
            raise ValueError("%r is not HOST:/PATH with an absolute path" % words[0])
        wrong = []
        found: "Dict[str, Any]" = {"host": _parse_name(host),
                                   "path": os.path.normpath("/" + path.lstrip("/"))}
        for word in words[1:]:
            key, equals, value = word.partition("=")
            try:
                if FLAGS.get(word) is keys:
                    found[word] = True
                    continue
                if key not in keys or not equals:
                    flags = [flag for flag, lines in FLAGS.items() if lines is keys]
                    raise ValueError("%r is not one of %s" % (
                        word, ", ".join([k + "=..." for k in keys] + flags)))
                if key == "exclude":
                    found["exclude"] = found.get("exclude", ()) + (value,)
                elif key in found:
                    raise ValueError("%s is given twice" % key)
                else:
                    found[key] = keys[key](value)
            except ValueError as error:
                wrong.append(str(error))
        if wrong:
            raise ValueError("; ".join(wrong))
        return found

    def _source(self, number: int, name: str, words: "List[str]") -> None:
        self.sources[name] = self._place(words, SOURCE_KEYS)

    def _backup(self, number: int, name: str, words: "List[str]") -> None:
        self.backups[name] = found = self._place(words, BACKUP_KEYS)
        if "size" not in found and "reserve" not in found:
            raise ValueError("backup %s needs size=... or reserve=..." % name)

    def check_places(self) -> None:
        """No backup inside a source, no source inside a backup, no backup inside another, on one
        host."""
        for name, backup in self.backups.items():
            line = self._lines[("backups", name.lower())]
            for source_name, source in self.sources.items():
                if source["host"] == backup["host"] and _inside(backup["path"], source["path"]):
                    self.problems.append((line,
                                          "backup %s lies inside the source %s"
                                          % (name, source_name)))
                elif source["host"] == backup["host"] and _inside(source["path"], backup["path"]):
                    self.problems.append((line,
                                          "backup %s contains the source %s" % (name, source_name)))
            for other_name, other in self.backups.items():
                if other_name != name and other["host"] == backup["host"] \
                        and _inside(backup["path"], other["path"]) \
                        and (other["path"] != backup["path"] or other_name < name):
                    self.problems.append((line,
                                          "backup %s lies inside the backup %s"
                                          % (name, other_name)))


def _inside(path: str, of: str) -> bool:
    return path == of or path.startswith(of.rstrip("/") + "/")


def split_address(word: str) -> "Tuple[str, Optional[int]]":
    """(address, port or None) of `rpi`, `rpi:5006`, `192.168.1.2:5006`, `[fe80::1]:5006` or
    `fe80::1`."""
    match = re.match(r"\[([^\]]+)\](?::(\d+))?\Z", word)
    if match:
        return match.group(1), _parse_port(match.group(2)) if match.group(2) else None
    if word.count(":") == 1:
        address, _, port = word.partition(":")
        if not address:
            raise ValueError("%r has no address" % word)
        return address, _parse_port(port)
    return word, None


def parse_config(text: str, path: str = "cbackup.conf") -> Config:
    """The configuration in `text`.  Raises ConfigError with every problem at once."""
    parser = _Parser(text)
    parser.parse()
    parser.check_places()
    if parser.problems:
        raise ConfigError(path, parser.problems)
    values = dict(parser.cluster)
    port = values.get("port", Config.port)
    replicas = values.get("replicas", Config.replicas)
    return Config(
        text=text,
        hosts={name: (address, own or port) for name, (address, own) in parser.hosts.items()},
        sources={name: Source(name=name, **{"replicas": replicas, **found})
                 for name, found in parser.sources.items()},
        backups={name: Backup(name=name, **found) for name, found in parser.backups.items()},
        **values)


CONFIG_TEMPLATE = """\
# The configuration of a cbackup cluster: the same text on every machine.  `#` starts a comment.
[cluster]
name     = home
port     = 5005
replicas = 2          # every file is kept on so many hosts other than its own
keep     = 30d        # how long previous versions of files are kept

[hosts]               # only for hosts whose name is not their address
# mini = 192.168.1.10
# rpi2 = rpi2.local:5006

[sources]             # NAME = HOST:/PATH [replicas=N] [exclude=PATTERN ...]
# photos = mini:/Volumes/tank/photos replicas=3
# home   = imac:/Users/austin exclude=Library/Caches exclude=*.tmp

[backups]             # NAME = HOST:/PATH size=... | reserve=...
# pi1 = rpi1:/srv/cbackup size=700G
# pi2 = rpi2:"/mnt/big disk/cb" reserve=200G
"""


CONFIG_LIMIT = 1 << 20
"""Longest configuration, bytes: it travels in one message."""

CONFIG_NAMES = 10000
"""Most names of accepted lines that travel with a version."""

CONFIG_HISTORY = 100
"""Versions that are kept in state/, and whose digests travel with a version to tell an edit from a
conflict."""


def sha256_of(text: "Any") -> str:
    """The digest of a configuration, as text or as the bytes of a file."""
    return hashlib.sha256(text if isinstance(text, bytes) else text.encode()).hexdigest()


HELD_LINES = 4
"""A configuration that removes more than half of at least so many sources, or backups, is held
back."""


def removed_at_once(old: Config, new: Config, accepted: "Iterable[str]" = ()) -> str:
    """What a changed configuration removes that must not go by itself: all sources or all backups,
    or more than half of at least HELD_LINES of either; "" when it does not.  accepted: names
    (Config.names) that may go."""
    said = []
    for kind, before in (("sources", old.sources), ("backups", old.backups)):
        gone = sorted(name.partition("/")[2] for name in old.names() - new.names() - set(accepted)
                      if name.startswith(kind))
        if gone and (not any(name.startswith(kind) for name in new.names())
                     or len(before) >= HELD_LINES and 2 * len(gone) > len(before)):
            said.append("%d of %d %s (%s)"
                        % (len(gone), len(before), kind,
                           ", ".join(gone[:5] + ["..."] * (len(gone) > 5))))
    return " and ".join(said)


def config_order(state: "Dict[str, Any]") -> "Tuple[int, int, str]":
    """What decides, everywhere in the same way, which of two versions is the newer one: the number,
    between edits made at the same time the later one, and at last the digest."""
    return state["version"], state["stamp"], state["sha256"]


ROOT_HOME = "/var/lib/cbackup"

PASSES_LIMIT = 1 << 20
"""Bytes of the log of passes: with one every quarter of an hour it reaches back a month or two."""

PASS_COUNTS = ("copied_files", "copied_bytes", "updated_files", "moved_files", "dropped_files",
               "dropped_bytes",
               "wire_bytes", "failed_files")
"""What a pass counts."""


def is_pass_record(record: Any) -> bool:
    """Whether it has the form of what Client.run notes: time, seconds, PASS_COUNTS, unreachable,
    settled, wrong."""
    return isinstance(record, dict) and all(
        isinstance(record.get(key), (int, float)) and abs(record[key]) < 1 << 62
        for key in ("time", "seconds") + PASS_COUNTS) \
        and all(isinstance(record.get(key), list)
                and all(isinstance(word, str) for word in record[key])
                for key in ("unreachable", "wrong"))


def default_home() -> str:
    """The home when nobody says: ~/.cbackup; for root /var/lib/cbackup, unless only ~/.cbackup is
    there already."""
    own = os.path.expanduser("~/.cbackup")
    return ROOT_HOME if os.geteuid() == 0 and (os.path.isdir(ROOT_HOME)
                                               or not os.path.isdir(own)) else own


class Home:
    """All that cbackup knows on this machine: configuration, key, the machine's name, state."""

    def __init__(self, path: "Optional[str]" = None, host: "Optional[str]" = None) -> None:
        self.path = os.path.abspath(os.path.expanduser(path or os.environ.get("CBACKUP_HOME")
                                                       or default_home()))
        self.config_path = os.path.join(self.path, "cbackup.conf")
        self.key_path = os.path.join(self.path, "cluster.pem")
        self.state_path = os.path.join(self.path, "state")
        self._host = host

    def state(self, *names: str) -> str:
        """A path below `state/`, which is made when it is not there."""
        os.makedirs(self.state_path, mode=0o700, exist_ok=True)
        return os.path.join(self.state_path, *names)

    def config(self) -> Config:
        """The checked configuration, entered as a new version when its text is new.  Raises
        ConfigError, or UsageError when there is none."""
        config = self._read_config()[0]
        # a home that cannot be written is good enough for a restore
        with contextlib.suppress(OSError):
            if self.config_state().get("sha256") != sha256_of(config.text):
                with self.lock("config.lock"):
                    # Read again: another machine's version may have come meanwhile, and what was
                    # read is old.
                    config, stamp = self._read_config()
                    self._enter_edit(config.text, stamp)
        return config

    def _read_config(self) -> "Tuple[Config, int]":
        """(the checked configuration as it is in the file, when the file was written)."""
        try:
            with open(self.config_path, "rb") as stream:
                data = stream.read(CONFIG_LIMIT + 1)
                stamp = int(os.fstat(stream.fileno()).st_mtime)
        except OSError as error:
            kept = os.path.join(self.state_path, "config-history")
            raise UsageError("%s: %s; %s" % (
                self.config_path, reason_of(error),
                "the last one is in %s" % kept if os.path.isdir(kept)
                else "`cbackup.pyz init` makes one on the first machine"))
        # what a full disk leaves of an edit must not become everybody's configuration
        if not data.strip():
            raise ConfigError(self.config_path, [(0, "is empty; the last right one is in %s"
                                                  % os.path.join(self.state_path,
                                                                 "config-history"))])
        if len(data) > CONFIG_LIMIT:
            raise ConfigError(self.config_path,
                              [(0, "is longer than %s" % format_size(CONFIG_LIMIT))])
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(self.config_path,
                              [(data.count(b"\n", 0, error.start) + 1, "not UTF-8 text")])
        return parse_config(text, self.config_path), stamp

    def _enter_edit(self, text: str, stamp: int) -> None:
        """Make the file's text the next version when it is not the one in force here.  The caller
        holds config.lock."""
        known, digest = self.config_state(), sha256_of(text)
        if known.get("sha256") != digest:
            history = ([known["sha256"]] if known else []) + known.get("history", [])
            number = max(known.get("version", 0), self.held_config().get("version", 0)) + 1
            self._record({"version": number, "stamp": stamp, "sha256": digest, "mine": True,
                          "history": history[:CONFIG_HISTORY],
                          "accepted": known.get("accepted", [])}, text)

    def config_state(self) -> "Dict[str, Any]":
        """What is known of the version in force here: version, stamp (seconds), sha256, history
        (older sha256s), mine (edited on this machine), accepted (lines that may go, see
        `removed_at_once`); {} before the first."""
        return read_json(os.path.join(self.state_path, "config.json"))

    def _record(self, state: "Dict[str, Any]", text: str) -> None:
        there = parse_config(text, self.config_path).names()
        state["accepted"] = sorted(set(state.get("accepted", [])) - there)[:CONFIG_NAMES]
        kept = self.state("config-history")
        os.makedirs(kept, mode=0o700, exist_ok=True)
        atomic_write(os.path.join(kept, "%06d-%s.conf" % (state["version"], state["sha256"][:12])),
                     text.encode())
        for name in sorted(os.listdir(kept))[:-CONFIG_HISTORY]:
            os.unlink(os.path.join(kept, name))
        atomic_write(self.state("config.json"), json.dumps(state).encode())

    def config_offer(self) -> "Dict[str, Any]":
        """The version in force, with its text, for another machine."""
        if not self.config_state():  # `state/` was lost while a server was running
            self.config()
        state = self.config_state()
        if not state:
            raise Refused("config",
                          "%s cannot be read" % os.path.join(self.state_path, "config.json"))
        return dict({key: state[key] for key in ("version", "stamp", "sha256", "history")},
                    accepted=state.get("accepted", []), text=self._text_in_force(state))

    def _text_in_force(self, state: "Dict[str, Any]") -> str:
        path = os.path.join(self.state_path, "config-history",
                            "%06d-%s.conf" % (state["version"], state["sha256"][:12]))
        with open(path, "rb") as stream:
            return stream.read().decode()

    def held_config(self) -> "Dict[str, Any]":
        """Another machine's version that is held back here until somebody says `accept config`: an
        offer with `removes`, in words, and `since`; {} when there is none, or a newer one is in
        force."""
        held = read_json(os.path.join(self.state_path, "config-held.json"))
        try:
            state = self.config_state()
            return held if held and state and config_order(held) > config_order(state) \
                and held["removes"] else {}
        except (KeyError, TypeError):
            return {}

    def _hold(self, offer: "Dict[str, Any]") -> bool:
        """Whether an offer removes too much to be put in force by itself; then it is kept.  The
        caller holds config.lock."""
        state = self.config_state()
        try:
            old = parse_config(self._text_in_force(state), self.config_path)
        except (KeyError, OSError, ValueError,
                ConfigError):  # before the first version, or its text was lost
            return False
        removes = removed_at_once(old, parse_config(offer["text"], "a configuration"),
                                  offer.get("accepted", []))
        if removes and self.held_config().get("sha256") != offer["sha256"]:
            atomic_write(self.state("config-held.json"),
                         json.dumps(dict(offer, removes=removes, since=clock.now())).encode())
        return bool(removes)

    def accept_config(self) -> str:
        """Let what was removed so far go: put the version that is held back here in force, and have
        the one in force here taken by those that hold it back.  Returns what is accepted, in
        words."""
        self.config()
        held = self.held_config()
        gone: "set[str]" = set()
        kept = os.path.join(self.state_path, "config-history")
        for name in sorted(os.listdir(kept)):
            with contextlib.suppress(OSError, ValueError,
                                     ConfigError), open(os.path.join(kept, name), "rb") as stream:
                gone |= parse_config(stream.read().decode(), name).names()
        if held:
            self.take_config(dict(held, accepted=sorted(gone | set(held.get("accepted", [])))))
            return held["removes"]
        with self.lock("config.lock"):
            state = self.config_state()
            self._record(dict(state, accepted=sorted(gone | set(state.get("accepted", [])))),
                         self._text_in_force(state))
        return ""

    def take_config(self, offer: "Dict[str, Any]") -> bool:
        """Put another machine's newer version in force here; False when ours is the newer one, or
        when it is held back (`held_config`).  Raises ConfigError for a text that is wrong.  An edit
        made here that the new version does not know is kept beside it.

        The same text under a higher number is taken too, or an edit made here later would get a
        number that loses.
        """
        text, digest = offer["text"], sha256_of(offer["text"])
        if digest != offer["sha256"]:
            raise ProtocolError("a configuration that is not what its digest says")
        if not text.strip():
            raise ConfigError("a configuration from another machine", [(0, "is empty")])
        parse_config(text, "a configuration from another machine")
        ours = self.config_state().get("version")
        if offer["version"] > (VERSION_FIRST if ours is None else ours + VERSION_JUMP):
            raise ProtocolError("a configuration that claims to be version %d, where %s is known"
                                % (offer["version"], "none" if ours is None else ours))
        with contextlib.suppress(CBackupError):
            self.config()  # an edit that nothing has read yet is a version like any other
        with self.lock("config.lock"):
            state = self.config_state()
            if state and config_order(offer) <= config_order(state):
                return False
            if self._hold(offer):
                return False
            lost = state and state.get("mine") and state["sha256"] not in offer["history"] \
                and state["sha256"] != digest
            there = None
            with contextlib.suppress(OSError):
                with open(self.config_path, "rb") as stream:
                    there = stream.read()
            if there != text.encode():
                # the second: a wrong one
                if there is not None and (lost or sha256_of(there) != state.get("sha256")):
                    self._keep_aside(there)
                atomic_write(self.config_path, text.encode())
            mine = state.get("sha256") == digest and state["mine"]
            self._record({"version": offer["version"], "stamp": offer["stamp"], "sha256": digest,
                          "mine": mine,
                          "history": offer["history"][:CONFIG_HISTORY],
                          "accepted": offer.get("accepted", [])}, text)
        return True

    def take_part(self, offer: "Dict[str, Any]") -> None:
        """The configuration of the cluster that is being joined.  A home that was in it before, and
        has lost its key or all but `state/`, goes on from the version that it had.  Raises
        UsageError when what is here is of another cluster."""
        state, there = self.config_state(), os.path.lexists(self.config_path)
        ours, theirs = ({v["sha256"]} | set(v.get("history", [])) if v else set()
                        for v in (state, offer))
        if there and not ours & theirs:
            raise UsageError("%s is not of this cluster: no version of it is known there.  Move it "
                             "away, then join with a new token" % self.config_path)
        if not there and state:
            text = None
            with contextlib.suppress(OSError):
                text = self.config_offer()["text"]
            if text is not None and ours & theirs:
                atomic_write(self.config_path, text.encode())
            else:
                os.unlink(self.state("config.json"))
        self.take_config(offer)

    def _keep_aside(self, data: bytes) -> None:
        """Write an edit that lost beside the configuration, under a name that nothing has yet."""
        name = "%s.conflict-%s" % (self.config_path,
                                   time.strftime("%Y%m%d-%H%M%S", time.localtime(clock.now())))
        names = [name] + ["%s-%d" % (name, number) for number in range(2, 1000)]
        atomic_write(next(name for name in names if not os.path.lexists(name)), data)

    def conflicts(self) -> "List[str]":
        """The names of edits that lost against another machine's, kept beside the configuration."""
        with contextlib.suppress(OSError):
            return sorted(name for name in os.listdir(self.path)
                          if name.startswith("cbackup.conf.conflict-"))
        return []

    def last_answers(self) -> "Dict[str, Tuple[float, Any]]":
        """host -> (seconds ago, what its server answered to `status` then), as `note_answers` kept
        it; unchecked."""
        found = read_json(os.path.join(self.state_path, "heard.json"))
        return {host: (max(0.0, clock.now() - row[0]), row[1]) for host, row in found.items()
                if isinstance(row, list) and len(row) == 2 and isinstance(row[0], (int, float))}

    def note_answers(self, answers: "Dict[str, Any]", hosts: "Iterable[str]") -> None:
        """Keep what servers answered just now, for the time when they are asleep; of no others than
        `hosts`.  A home that cannot be written to remembers nothing."""
        with contextlib.suppress(OSError), self.lock("heard.lock"):
            found = read_json(self.state("heard.json"))
            found.update((host, [clock.now(), answer]) for host, answer in answers.items())
            kept = {host: row for host, row in found.items() if host in hosts}
            atomic_write(self.state("heard.json"), json.dumps(kept).encode())

    def to_forget(self) -> "Dict[str, List[str]]":
        """backup -> the sources, no longer configured, whose copies in it may go: somebody said
        `forget`."""
        found = read_json(os.path.join(self.state_path, "forget.json")).get("todo")
        return found if isinstance(found, dict) else {}

    def note_forget(self, source: str, backups: "Iterable[str]", forget: bool = True) -> None:
        """Enter that `source` may be deleted from `backups`; with `forget` false, that it was, or
        may no longer.

        What was said must not outlive its being done: the name may be another source's one day."""
        with self.lock("forget.lock"):
            todo = self.to_forget()
            for backup in backups:
                names = set(todo.get(backup, [])) - {source} | ({source} if forget else set())
                todo[backup] = sorted(names)
            atomic_write(self.state("forget.json"),
                         json.dumps({"todo": {b: n for b, n in todo.items() if n}}).encode())

    def note_pass(self, record: "Dict[str, Any]") -> None:
        """Append what a pass did to the log in `state/`; beyond PASSES_LIMIT its older half goes.
        A log that cannot be written stops nothing."""
        with contextlib.suppress(OSError), self.lock("passes.lock"):
            path = self.state("passes.jsonl")
            with open(path, "ab") as stream:
                stream.write(json.dumps(record).encode() + b"\n")
                size = stream.tell()
            if size > PASSES_LIMIT:
                with open(path, "rb") as stream:
                    stream.seek(size // 2)
                    stream.readline()
                    kept = stream.read()
                atomic_write(path, kept)

    def passes(self) -> "Iterator[Dict[str, Any]]":
        """What the passes of this host did, the newest first, as Client.run notes it; damaged lines
        are left out."""
        try:
            with open(os.path.join(self.state_path, "passes.jsonl"), "rb") as stream:
                lines = stream.read().splitlines()
        except OSError:
            return
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                record = json.loads(line.decode())
                if is_pass_record(record):
                    yield record

    def void_forgets(self, config: Config) -> None:
        """A source that is configured again is no longer to be forgotten."""
        for backup, names in self.to_forget().items():
            for name in set(names) & set(config.sources):
                self.note_forget(name, [backup], forget=False)

    @contextlib.contextmanager
    def lock(self, name: str, wait: bool = True) -> "Iterator[None]":
        """Hold a lock file in `state/`.  Raises Busy when another process has it and `wait` is
        false."""
        with open(self.state(name), "a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError:
                raise Busy("%s is in use by another cbackup" % self.path)
            yield

    def own_name(self) -> str:
        """This machine's name: --host, else the file `host`, else the short host name."""
        if self._host:
            return self._host
        path = os.path.join(self.path, "host")
        try:
            with open(path) as stream:
                name = stream.read().strip()
            if name:
                return name
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            pass
        except OSError as error:  # it is there, and says another name than the system's
            raise CBackupError("%s: %s" % (path, reason_of(error)))
        return socket.gethostname().split(".")[0]

    def host(self, config: Config) -> str:
        """`own_name`, when the configuration knows it; else UsageError that says the way out."""
        name = self.own_name()
        if name not in config.all_hosts():
            raise UsageError("this machine is %r, which %s does not mention (it has: %s); give "
                             "--host NAME or write the name into %s"
                             % (name, self.config_path, ", ".join(config.all_hosts()) or "no host",
                                os.path.join(self.path, "host")))
        return name

    def outside(self, path: str) -> str:
        """Why the configuration may not place a source or a backup of this host at `path`: with a
        file `paths` in the home, only below the directories that it lists.  "" when it may."""
        limits = os.path.join(self.path, "paths")
        try:
            with open(limits, "rb") as stream:
                lines = [os.fsdecode(line.strip()) for line in stream.read().split(b"\n")]
        except FileNotFoundError:
            return ""
        except OSError as error:
            return "%s: %s; nothing is done for %s until it can be read" % (limits, reason_of(
                error), path)
        real = os.path.realpath(path)
        for top in (os.path.realpath(line) for line in lines if line.startswith("/")):
            if real == top or real.startswith(top.rstrip("/") + "/"):
                return ""
        return "%s is not below a directory that %s lists: if that is right, add a line to it" \
            % (path, limits)

    def news_of_lines(self, who: str, config: Config, host: str) -> "List[str]":
        """What an edit made on another machine has changed in the configuration's lines about this
        host, since `who` (server, client or status) was told last: each is told to each of them
        once."""
        now, known = config.lines_about(host), read_json(os.path.join(self.state_path,
                                                                      "lines.json"))
        before = known.get(who)
        if before == now:
            return []
        with contextlib.suppress(OSError):
            with self.lock("lines.lock"):
                known = dict(read_json(self.state("lines.json")), **{who: now})
                atomic_write(self.state("lines.json"), json.dumps(known).encode())
        if not isinstance(before, dict) or self.config_state().get("mine"):
            return []
        return ["the configuration has changed elsewhere: %s" % (
            "this host has no %s any more (it was: %s)" % (key, before[key]) if key not in now else
            "this host's %s is now: %s%s"
            % (key, now[key], " (it was: %s)" % before[key] if key in before else ""))
            for key in sorted(set(before) | set(now)) if before.get(key) != now.get(key)]

    def check_key(self) -> None:
        """Refuse a missing key and one that others can read."""
        try:
            mode = os.stat(self.key_path).st_mode
        except OSError as error:
            raise UsageError("%s: %s; on the first machine run `cbackup.pyz init`; else say "
                             "`cbackup.pyz invite` on a machine of the cluster, and here what it "
                             "prints (if no machine has the key any more: `init` here, and `client "
                             "--adopt NAME` for each backup)" % (self.key_path, reason_of(error)))
        if mode & 0o077:
            raise UsageError("%s can be read by others: chmod 600 %s"
                             % (self.key_path, shlex.quote(self.key_path)))

    def cluster_id(self) -> str:
        """The SHA-256 of the cluster's certificate, 64 hex digits: what makes two clusters
        different."""
        with open(self.key_path) as stream:
            match = re.search("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----",
                              stream.read(), re.S)
        if not match:
            raise UsageError("%s holds no certificate; copy it again from a machine of the cluster"
                             % self.key_path)
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(match.group(0))).hexdigest()


CERTIFICATE_REQUEST = """\
[req]
distinguished_name = dn
x509_extensions = v3
prompt = no
[dn]
CN = cbackup cluster
[v3]
basicConstraints = critical, CA:TRUE
keyUsage = critical, digitalSignature, keyCertSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
"""
"""All extensions written out: a certificate without them fails under Python 3.13's strictness
(measured)."""


def make_cluster_key(path: str) -> None:
    """Write a new certificate with its private key to `path`, 0600.  Needs the `openssl`
    program."""
    if not shutil.which("openssl"):
        raise UsageError("openssl is not installed, and `init` needs it once: %s"
                         % install_hint("openssl"))
    with tempfile.TemporaryDirectory(prefix="cbackup-") as scratch:
        request, key = os.path.join(scratch, "request"), os.path.join(scratch, "key")
        with open(request, "w") as stream:
            stream.write(CERTIFICATE_REQUEST)
        try:
            made = subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout",
                                   "-out", key],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  stdin=subprocess.DEVNULL)
            made.check_returncode()
            made = subprocess.run(["openssl", "req", "-new", "-x509", "-sha256", "-days", "36500",
                                   "-key", key,
                                   "-config", request], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE,
                                  stdin=subprocess.DEVNULL)
            made.check_returncode()
        except subprocess.CalledProcessError:
            raise CBackupError("openssl failed: %s"
                               % made.stderr.decode(errors="replace").strip().splitlines()[-1:])
        with open(key, "rb") as stream:
            atomic_write(path, made.stdout + stream.read(), 0o600)


# ==== 7. The server's books =======================================================================

TODO_MOVE, TODO_UPDATE, TODO_RETIRE, TODO_TOUCH = 1, 2, 4, 8
"""What a backup must still hear about one of its copies; bits of `copies.todo`."""

BOOKS_SCHEMA_VERSION = 6

BOOKS_SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value);

-- state: ok | held.  gen: the open catalog generation.
CREATE TABLE sources(
    id INTEGER PRIMARY KEY, name TEXT UNIQUE, path TEXT, replicas INTEGER, active INTEGER,
    device INTEGER, fsid INTEGER, state TEXT DEFAULT 'ok', cause TEXT, reason TEXT,
    gen INTEGER DEFAULT 1, scanned REAL, special INTEGER DEFAULT 0, problems TEXT);

-- What is in the sources.  id: grows in the order of the walk, so that a directory's files are
-- mostly neighbours.  kind: f, d or l.  version: changes with the content.  blocked: cannot be
-- copied (unreadable, or rotten).
-- digest: of the present version, a fact or presumed.  doubt: since when it is presumed (seconds
-- since 1970): the server has not read its file since; NULL: read in full, or there is no digest.
-- basis: where the digest is from: p the file itself (read for this or an earlier inode and ctime)
-- | c a copy that was just made | r a copy of which new books heard. other: the digest that was
-- read instead, while it is not decided yet whether that is a mass change. xattrs: extended
-- attributes as in CatalogRow, JSON; NULL: not asked for; a blank before them: the file had been
-- changed just then, and they are to be looked at once more.
CREATE TABLE entries(
    id INTEGER PRIMARY KEY AUTOINCREMENT, source INTEGER, parent INTEGER, path BLOB, kind TEXT,
    size INTEGER,
    mtime INTEGER, mode INTEGER, uid INTEGER, gid INTEGER, ino INTEGER, ctime INTEGER,
    nlink INTEGER,
    target BLOB, version INTEGER, digest BLOB, blocked TEXT, gen INTEGER, grp INTEGER,
    doubt REAL, basis TEXT, other BLOB, xattrs TEXT);
CREATE UNIQUE INDEX entries_path ON entries(source, path);
CREATE INDEX entries_parent ON entries(parent);
CREATE INDEX entries_gen ON entries(source, gen);
CREATE INDEX entries_grp ON entries(grp) WHERE grp IS NOT NULL;  -- with the id in it
CREATE INDEX entries_size ON entries(grp, size) WHERE grp IS NOT NULL;
CREATE INDEX entries_doubt ON entries(source, doubt) WHERE doubt IS NOT NULL;
CREATE INDEX entries_other ON entries(source) WHERE other IS NOT NULL;

-- Files that are gone but still lie in backups that have not heard of it.
CREATE TABLE gone(id INTEGER PRIMARY KEY, source INTEGER, path BLOB);
CREATE INDEX gone_path ON gone(source, path);

-- Paths that are no longer in the catalog, for those who have an older one.
CREATE TABLE graves(source INTEGER, path BLOB, gen INTEGER, PRIMARY KEY(source,
    path)) WITHOUT ROWID;
CREATE INDEX graves_gen ON graves(source, gen);

-- changed: 1 when something of the source did, 0 when there was only news of who has it.
CREATE TABLE generations(source INTEGER, gen INTEGER, time REAL, changed INTEGER DEFAULT 1,
    PRIMARY KEY(source, gen))
    WITHOUT ROWID;

-- The last words of each backup.  heard: when, in seconds of this server's running time.
-- fruitless: passes that began with claims of an earlier one, since the last that brought a copy.
CREATE TABLE backups(
    id INTEGER PRIMARY KEY, name TEXT UNIQUE, host TEXT, configured INTEGER DEFAULT 1,
    lost INTEGER DEFAULT 0,
    leaving INTEGER DEFAULT 0, identity TEXT, capacity INTEGER, free INTEGER,
    want INTEGER DEFAULT 0, used INTEGER,
    files INTEGER, heard REAL, heard_date REAL, period REAL, fruitless INTEGER DEFAULT 0);

-- state: k confirmed copy | c claim | s older version, update expected | o older version, no longer
-- waited for
--        | r to be retired: gone at the source, or others have the present version.
-- checked: the version whose contents were confirmed, before `placed`.
-- path: where the backup has it when that is not the entry's path.  tag, held_size, held_mtime:
-- what it has.
CREATE TABLE copies(
    file INTEGER, backup INTEGER, source INTEGER, state TEXT, checked INTEGER, path BLOB,
    tag INTEGER,
    held_size INTEGER, held_mtime INTEGER, expires REAL, todo INTEGER DEFAULT 0, seen INTEGER,
    PRIMARY KEY(file, backup)) WITHOUT ROWID;
CREATE INDEX copies_todo ON copies(backup, source, file) WHERE todo > 0;
CREATE INDEX copies_expires ON copies(backup, expires) WHERE expires IS NOT NULL;
CREATE INDEX copies_backup ON copies(backup, source, file);
CREATE INDEX copies_path ON copies(backup, source, path) WHERE path IS NOT NULL;

-- What a scan that holds a source found: the files that are gone or have changed, HELD_FILES of
-- either at most.
CREATE TABLE held_files(source INTEGER, path BLOB, change TEXT, PRIMARY KEY(source,
    path)) WITHOUT ROWID;

-- Which backups have told new books everything that they hold (see Books.recovering).
CREATE TABLE caught_up(backup INTEGER, source INTEGER, PRIMARY KEY(backup, source)) WITHOUT ROWID;

CREATE TABLE declines(
    file INTEGER, backup INTEGER, version INTEGER, until REAL, reason TEXT, PRIMARY KEY(file,
    backup)) WITHOUT ROWID;

-- Files held by the same backups in the same way are one group: placing looks at groups, not at
-- files. key: "id+" for a confirmed copy, "id-" for a claim, also of backups that do not count now,
-- joined by commas; a leading "!" means blocked.  What each backup is to that says `backups`, so
-- that no file is touched when it changes. n: distinct hosts with a claim or a copy that stays; k:
-- distinct hosts with a copy. Triggers keep files and bytes; for new files add_entries does, and
-- for those that move from one group to another Groups.regroup.
CREATE TABLE groups(
    id INTEGER PRIMARY KEY, source INTEGER, key TEXT, n INTEGER, k INTEGER,
    files INTEGER DEFAULT 0, bytes INTEGER DEFAULT 0, UNIQUE(source, key));
CREATE INDEX groups_level ON groups(source, n) WHERE files > 0;
CREATE TRIGGER entries_out AFTER DELETE ON entries WHEN OLD.grp IS NOT NULL BEGIN
    UPDATE groups SET files = files - 1, bytes = bytes - OLD.size WHERE id = OLD.grp; END;
CREATE TRIGGER entries_change AFTER UPDATE OF size ON entries
    WHEN NEW.grp IS NOT NULL AND OLD.size IS NOT NEW.size BEGIN
    UPDATE groups SET bytes = bytes - OLD.size + NEW.size WHERE id = NEW.grp; END;

-- The sum of what each backup holds of each source, to be compared with the backup's own (see
-- tag_of).  No OR IGNORE in the triggers: the conflict policy of the statement that fires them
-- would overrule it.
CREATE TABLE sums(
    backup INTEGER, source INTEGER, files INTEGER, bytes INTEGER, tags INTEGER, PRIMARY KEY(backup,
    source)) WITHOUT ROWID;
CREATE TRIGGER copies_in AFTER INSERT ON copies WHEN NEW.tag IS NOT NULL BEGIN
    INSERT INTO sums SELECT NEW.backup, NEW.source, 0, 0, 0 WHERE NOT EXISTS(
        SELECT 1 FROM sums WHERE backup=NEW.backup AND source=NEW.source);
    UPDATE sums SET files = files + 1, bytes = bytes + NEW.held_size, tags = tags + NEW.tag
        WHERE backup = NEW.backup AND source = NEW.source; END;
CREATE TRIGGER copies_out AFTER DELETE ON copies WHEN OLD.tag IS NOT NULL BEGIN
    UPDATE sums SET files = files - 1, bytes = bytes - OLD.held_size, tags = tags - OLD.tag
        WHERE backup = OLD.backup AND source = OLD.source; END;
CREATE TRIGGER copies_change AFTER UPDATE OF tag, held_size ON copies
    WHEN OLD.tag IS NOT NEW.tag OR OLD.held_size IS NOT NEW.held_size BEGIN
    INSERT INTO sums SELECT NEW.backup, NEW.source, 0, 0, 0 WHERE NOT EXISTS(
        SELECT 1 FROM sums WHERE backup=NEW.backup AND source=NEW.source);
    UPDATE sums SET files = files - (OLD.tag IS NOT NULL) + (NEW.tag IS NOT NULL),
        bytes = bytes - COALESCE(OLD.held_size, 0) + COALESCE(NEW.held_size, 0),
        tags = tags - COALESCE(OLD.tag, 0) + COALESCE(NEW.tag, 0)
        WHERE backup = NEW.backup AND source = NEW.source; END;
"""


BOOKS_UPGRADES: "Dict[int, str]" = {1: """
ALTER TABLE backups ADD COLUMN fruitless INTEGER DEFAULT 0;
CREATE INDEX copies_path ON copies(backup, source, path) WHERE path IS NOT NULL;
CREATE TABLE held_files(source INTEGER, path BLOB, change TEXT,
    PRIMARY KEY(source, path)) WITHOUT ROWID;
ALTER TABLE generations ADD COLUMN changed INTEGER DEFAULT 1;
ALTER TABLE entries ADD COLUMN doubt REAL;
ALTER TABLE entries ADD COLUMN basis TEXT;
ALTER TABLE entries ADD COLUMN other BLOB;
ALTER TABLE entries ADD COLUMN xattrs TEXT;
CREATE INDEX entries_doubt ON entries(source, doubt) WHERE doubt IS NOT NULL;
CREATE INDEX entries_other ON entries(source) WHERE other IS NOT NULL;
-- What layout 1 calls the digest of a file over 256 KiB was compared by samples only.
UPDATE entries SET basis='p' WHERE digest IS NOT NULL AND size<=262144;
UPDATE entries SET basis='r', doubt=CAST(strftime('%s', 'now') AS REAL)
    WHERE digest IS NOT NULL AND size>262144;
""", 2: """
INSERT OR REPLACE INTO meta VALUES('regroup', 0);
""", 3: """
DROP TRIGGER entries_change;
CREATE TRIGGER entries_change AFTER UPDATE OF size ON entries
    WHEN NEW.grp IS NOT NULL AND OLD.size IS NOT NEW.size BEGIN
    UPDATE groups SET bytes = bytes - OLD.size + NEW.size WHERE id = NEW.grp; END;
""", 4: """
DROP INDEX entries_rnd;
CREATE INDEX entries_grp ON entries(grp) WHERE grp IS NOT NULL;
""", 5: """
DROP TRIGGER IF EXISTS entries_in;
"""}
"""Layout -> the SQL that makes the next layout of the server's books of it."""


APPLY_CHUNK, SLICE = 500, 125
"""Rows of a scan, of a claim, of a confirmation that are entered in one transaction, and rows of
which each costs more: others wait for their answers meanwhile."""

AMONG = 1, 20, 500
"""How many items one query of Store.rows_among asks for: an old SQLite takes 999."""


def open_database(path: str, schema: str, version: int, journal: str,
                  upgrades: "Optional[Dict[int, str]]" = None) -> "sqlite3.Connection":
    """A database of ours, made when absent, brought to the present layout when it is older.  One
    that SQLite calls damaged is set aside and a new one made: everything in our databases can be
    rebuilt.  Raises CBackupError for one of a newer cbackup."""
    if _wrong_header(path):
        set_database_aside(path, "its first bytes are not SQLite's")
    keep_private(path)
    for attempt in (1, 2):
        connection = sqlite3.connect(path, timeout=60, isolation_level=None,
                                     check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=%s" % journal)
            # Durable when a commit returns: with a deleted journal that takes EXTRA, and on macOS
            # more than fsync(2).
            connection.execute("PRAGMA synchronous=EXTRA")
            connection.execute("PRAGMA fullfsync=1")
            connection.execute("PRAGMA checkpoint_fullfsync=1")
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                connection.executescript("BEGIN IMMEDIATE;" + schema
                                         + "PRAGMA user_version=%d;COMMIT;" % version)
            while 0 < found < version and upgrades and found in upgrades:
                connection.executescript("BEGIN IMMEDIATE;" + upgrades[found]
                                         + "PRAGMA user_version=%d;COMMIT;" % (found + 1))
                found += 1
            if not 0 <= found < 1000:  # a layout that no version of this program will ever have
                raise sqlite3.DatabaseError("malformed")
            if found not in (0, version):
                raise CBackupError("%s was written by another version of cbackup (layout %d, this "
                                   "one has %d)"
                                   % (path, found, version))
            if attempt == 1 and (_unclean(path) or os.path.getsize(path) < CHECKED_BELOW):
                if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                    raise sqlite3.DatabaseError("malformed")
            return connection
        except sqlite3.DatabaseError as error:
            connection.close()
            if attempt == 2 or not is_damage(error):
                raise CBackupError("%s: %s" % (path, database_words(error, path)))
            set_database_aside(path, str(error))
            keep_private(path)
    raise AssertionError("not reached")


def keep_private(path: str) -> None:
    """Make a database's file, empty, when there is none, and for us alone whatever the umask is: it
    has the names of all files.  SQLite gives what it puts beside it the same mode."""
    with contextlib.suppress(OSError):  # what is wrong SQLite will say
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        if stat.S_IMODE(os.lstat(path).st_mode) & 0o077:
            os.chmod(path, 0o600)


CHECKED_BELOW = 1 << 20
"""Databases up to this many bytes are checked whenever they are opened (15 ms), larger ones when
they were not closed: what else is wrong with them shows when it is read."""


def _wrong_header(path: str) -> bool:
    """Whether a file is there that SQLite would not take for its own, or only for reading."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(100)
    except OSError:
        return False
    return len(head) == 100 and (head[:16] != b"SQLite format 3\0" or head[18] not in (1, 2)
                                 or head[19] not in (1, 2))


def database_words(error: BaseException, path: str) -> str:
    """What a database's error means; a full disk has many names in SQLite, and is called as the
    system does."""
    with contextlib.suppress(OSError):
        info = os.statvfs(os.path.dirname(path))
        if "is full" in str(error) or "I/O" in str(error) \
                and info.f_bavail * info.f_frsize < 64 << 10:
            return os.strerror(errno.ENOSPC)
    return str(error)


def _unclean(path: str) -> bool:
    """Whether the last user of a database did not close it: only then its whole structure is
    checked."""
    return os.path.exists(path + "-wal") and os.path.getsize(path + "-wal") > 0


def is_damage(error: "sqlite3.Error") -> bool:
    """Whether SQLite says that the file itself is wrong, not that it is locked or its disk full."""
    return isinstance(error, sqlite3.DatabaseError) and any(
        word in str(error)
        for word in ("malformed", "not a database", "corrupt", "unsupported file format",
                     "no such table",
                     "Could not decode"))


def set_database_aside(path: str, why: str) -> None:
    aside = "%s.damaged-%d" % (path, int(time.time()))
    log.warning("%s is damaged (%s): kept as %s, a new one is made", path, why, aside)
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(path + suffix, aside + suffix)


class Store:
    """One SQLite database with a lock: what the server's books and a backup's database have in
    common.

    One connection, guarded by `lock`.  Whoever inherits from it opens `db` (see open_database) and
    keeps its SQL there.
    """

    db: "sqlite3.Connection"

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._writing, self._lasting = False, True  # the latter: how its transactions are committed

    @contextlib.contextmanager
    def write(self, lasting: bool = True) -> "Iterator[sqlite3.Connection]":
        """One transaction; nested uses join the outer one.  Committed durably before it returns.

        lasting: False for what may be forgotten in a power failure: it is durable with the next
        transaction that is lasting and changes something, and nobody waits for a disk.  Only in a
        database with a WAL, which a power failure leaves as it was at some commit.
        """
        with self.lock:
            if self._writing:
                yield self.db
                return
            try:
                if lasting != self._lasting:  # before, not after: what comes between may fail
                    self.db.execute("PRAGMA synchronous=" + ("EXTRA" if lasting else "NORMAL"))
                    self._lasting = lasting
                self.db.execute("BEGIN IMMEDIATE")
                self._writing = True
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                self._rolled_back()
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise
            finally:
                self._writing = False

    def _rolled_back(self) -> None:
        """What was remembered of a transaction that comes to nothing is to be forgotten."""

    def rows(self, sql: str, *values: Any) -> "List[Tuple[Any, ...]]":
        with self.lock:
            return self.db.execute(sql, values).fetchall()

    def one(self, sql: str, *values: Any) -> "Optional[Tuple[Any, ...]]":
        with self.lock:
            return self.db.execute(sql, values).fetchone()

    def rows_among(self, sql: str, items: "Iterable[Any]", *values: Any) -> "List[Tuple[Any, ...]]":
        """The rows of an SQL query that has AMONG where it asks for one of many `items`, as its
        last parameter behind `values`: some hundred items a query, which costs far less than one
        each."""
        found: "List[Tuple[Any, ...]]" = []
        for some in in_batches(items):
            # few texts: SQLite keeps them prepared
            width = next(width for width in AMONG if width >= len(some))
            some += [some[-1]] * (width - len(some))
            found += self.rows(sql.replace("AMONG", "IN (%s)" % ",".join("?" * width)), *values,
                               *some)
        return found

    def meta(self, key: str) -> Any:
        row = self.one("SELECT value FROM meta WHERE key=?", key)
        return row[0] if row else None

    def set_meta(self, key: str, value: Any) -> None:
        with self.write() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES(?,?)", (key, value))


def members_of(key: str) -> "List[Tuple[int, bool]]":
    """(backup, True for a copy, False for a claim) of a group's key."""
    return [(int(word[:-1]), word[-1] != "-") for word in key.lstrip("!").split(",") if word]


class Group:
    """What is known of one row of `groups`.

    members: backup id -> True for a copy, False for a claim; leaving: those of them that are to be
    unplugged; hosts: with a claim or a copy that stays; copy_hosts: with a copy.
    """

    __slots__ = ("id", "members", "leaving", "hosts", "copy_hosts", "blocked", "n", "k", "files",
                 "bytes")

    def __init__(self, row: "Tuple[Any, ...]",
                 facts_of: "Callable[[int], Tuple[str, bool, bool]]") -> None:
        """facts_of: Groups.facts_of_backup."""
        self.id, key, self.n, self.k, self.files, self.bytes = row
        self.blocked = key.startswith("!")
        self.members: "Dict[int, bool]" = {}
        self.leaving: "set[int]" = set()
        self.hosts: "set[str]" = set()
        self.copy_hosts: "set[str]" = set()
        for backup, copy in members_of(key):
            host, counts, leaving = facts_of(backup)
            if not counts or leaving and not copy:
                continue
            self.members[backup] = copy
            if leaving:
                self.leaving.add(backup)
            else:
                self.hosts.add(host)
            if copy:
                self.copy_hosts.add(host)

    def copies_without(self, backup: int, host_of: "Callable[[int], str]") -> int:
        """Distinct hosts that would have a copy, and keep it, if `backup` had none."""
        return len({host_of(b) for b, copy in self.members.items() if copy and b != backup
                    and b not in self.leaving})


class Groups(Store):
    """Who is there, and who has what: the sources and backups that the books know, and the groups
    of files that the same backups have in the same way.

    Every method is short, except those that say otherwise.  Methods that change something open a
    transaction of their own, or join the caller's (`with books.write():`).
    """

    def __init__(self, path: str, host: str) -> None:
        super().__init__()
        self.path, self.host = path, host
        self.random = random.Random()
        try:
            self._open()
        except sqlite3.DatabaseError as error:  # whichever page was hit
            if not is_damage(error):
                raise
            self.db.close()
            set_database_aside(self.path, str(error))
            self._open()

    def _open(self) -> None:
        self.db = open_database(self.path, BOOKS_SCHEMA, BOOKS_SCHEMA_VERSION, "WAL",
                                BOOKS_UPGRADES)
        self._group_ids: "Dict[Tuple[int, str], int]" = {}
        self._hosts: "Dict[int, Tuple[str, bool, bool]]" = {}
        self._shapes: "Dict[int, Group]" = {}
        self._started = clock.steady()
        self._up_before = float(self.meta("up") or 0)
        if self.meta("regroup") is not None:
            self._regroup_all()
        self.id = self.meta("books")
        if not self.id:
            self.id = secrets.token_hex(8)
            self.set_meta("books", self.id)

    def reader(self) -> "sqlite3.Connection":
        """Another connection, for who only reads, or has tables of its own: it waits for nobody,
        and nobody for it."""
        return sqlite3.connect(self.path, timeout=60, isolation_level=None,
                               check_same_thread=False)

    def close(self) -> None:
        with self.lock:
            self.save_up()
            self.db.close()

    def _rolled_back(self) -> None:
        self._group_ids.clear()
        self._forget_shapes()

    # -- time and versions --

    def up(self) -> float:
        """Seconds that servers with these books have run: what leases and absence are measured in,
        so that neither a wrong date nor a machine that was off makes anything expire."""
        return self._up_before + max(0.0, clock.steady() - self._started)

    def save_up(self) -> None:
        self.set_meta("up", self.up())

    def _next_version(self, count: int = 1) -> int:
        """The first of `count` numbers that no version has had."""
        row = self.db.execute("SELECT value FROM meta WHERE key='version'").fetchone()
        last = row[0] if row else 0
        self.db.execute("INSERT OR REPLACE INTO meta VALUES('version',?)", (last + count,))
        return last + 1

    # -- sources and backups --

    def source_row(self, name: str) -> "Dict[str, Any]":
        """The row of an active source of this host.  Raises Refused("unknown")."""
        with self.lock:
            cursor = self.db.execute("SELECT * FROM sources WHERE name=? AND active=1", (name,))
            row = cursor.fetchone()
            if not row:
                raise Refused("unknown", "%s has no source %s" % (self.host, name))
            return dict(zip((column[0] for column in cursor.description), row))

    def active_sources(self) -> "List[str]":
        return [row[0] for row in self.rows(
            "SELECT name FROM sources WHERE active=1 ORDER BY name")]

    def changeable(self, name: str) -> "Dict[str, Any]":
        """Like source_row, for callers that let something change.  Raises Refused("held")."""
        row = self.source_row(name)
        if row["state"] != "ok":
            raise Refused("held", "source %s is held: %s" % (name, row["reason"]))
        return row

    def backup_id(self, name: str) -> int:
        row = self.one("SELECT id FROM backups WHERE name=? AND configured=1", name)
        if not row:
            raise Refused("unknown",
                          "%s knows no backup %s: is its configuration the same?"
                          % (self.host, name))
        return row[0]

    def source_name(self, source: int) -> "Optional[str]":
        """The name of an active source by its number."""
        row = self.one("SELECT name FROM sources WHERE id=? AND active=1", source)
        return row[0] if row else None

    def _forget_shapes(self) -> None:
        """Whenever what `host_of` says may have changed, or a new group may have been rolled
        back."""
        self._hosts.clear()
        self._shapes.clear()

    def host_of(self, backup: int) -> str:
        return self.facts_of_backup(backup)[0]

    def facts_of_backup(self, backup: int) -> "Tuple[str, bool, bool]":
        """(host, whether its copies count, whether it is leaving)."""
        if backup not in self._hosts:
            host, configured, lost, leaving = self.one(
                "SELECT host, configured, lost, leaving FROM backups WHERE id=?", backup)
            self._hosts[backup] = (host, bool(configured and not lost and host != self.host),
                                   bool(leaving))
        return self._hosts[backup]

    # -- groups --

    def _group_id(self, source: int, key: str) -> int:
        known = self._group_ids.get((source, key))
        if known is not None:
            return known
        row = self.db.execute("SELECT id FROM groups WHERE source=? AND key=?",
                              (source, key)).fetchone()
        if row is None:
            shape = Group((0, key, 0, 0, 0, 0), self.facts_of_backup)
            row = (self.db.execute("INSERT INTO groups(source, key, n, k) VALUES(?,?,?,?)",
                                   (source, key, len(shape.hosts),
                                    len(shape.copy_hosts))).lastrowid,)
        self._group_ids[(source, key)] = row[0]
        return row[0]

    def _group_of(self, source: int, blocked: "Optional[str]", copies: "Optional[str]") -> int:
        """The group of files of which `copies` says "backup, state" of each, joined by commas in
        any order."""
        members = sorted((int(word[:-1]), word[-1]) for word in (copies or "").split(",") if word)
        return self._group_id(source, ("!" if blocked else "") + ",".join(
            "%d%s" % (backup, "+" if state == "k" else "-") for backup, state in members))

    def regroup(self, files: "Iterable[int]") -> None:
        """Put files into the group that their rows in `copies` ask for.  Call after every change of
        `copies`."""
        moved: "Dict[int, int]" = {}
        steps: "Dict[Tuple[int, int], List[int]]" = {}  # from one group to another: files, bytes
        group_of: "Dict[Tuple[Any, ...], int]" = {}
        for some in in_batches(files):
            for number, grp, size, source, blocked, copies in self.rows_among(
                    "SELECT e.id, e.grp, e.size, e.source, e.blocked, "
                    "(SELECT group_concat(c.backup || c.state) FROM copies c "
                    "WHERE c.file=e.id AND c.state IN ('k', 'c', 's')) "
                    "FROM entries e WHERE e.kind='f' AND e.id AMONG", some):
                group = group_of.get((source, blocked, copies))
                if group is None:
                    group = self._group_of(source, blocked, copies)
                    group_of[source, blocked, copies] = group
                if group != grp and number not in moved:
                    moved[number] = group
                    step = steps.setdefault((grp, group), [0, 0])
                    step[0], step[1] = step[0] + 1, step[1] + size
        self.db.executemany("UPDATE entries SET grp=? WHERE id=?",
                            [(group, number) for number, group in moved.items()])
        for (before, after), (count, size) in steps.items():
            self.db.executemany("UPDATE groups SET files=files+?, bytes=bytes+? WHERE id=?",
                                [(-count, -size, before), (count, size, after)])

    def recount_groups(self) -> None:
        """After a backup began or ceased to count, or moved to another host."""
        with self.write() as db:
            self._forget_shapes()
            for number, key in db.execute("SELECT id, key FROM groups").fetchall():
                shape = Group((0, key, 0, 0, 0, 0), self.facts_of_backup)
                db.execute("UPDATE groups SET n=?, k=? WHERE id=?",
                           (len(shape.hosts), len(shape.copy_hosts), number))

    def _regroup_all(self) -> None:
        """For books of layout 2, whose groups say less of a file.  Once, and then it takes a
        while."""
        while True:
            with self.write():
                after = self.meta("regroup")
                files = [row[0] for row in self.rows("SELECT id FROM entries "
                                                     "WHERE id>? AND kind='f' ORDER BY id LIMIT ?",
                                                     after, APPLY_CHUNK)]
                self.regroup(files)
                if not files:
                    self.recount_groups()
                    self.db.execute("DELETE FROM meta WHERE key='regroup'")
                    return
                self.set_meta("regroup", files[-1])

    def groups(self, source: int, which: str = "1", *values: Any) -> "List[Group]":
        """The groups of a source that have files, those of them for which the condition `which`
        (SQL) is true."""
        found = []
        with self.lock:
            if len(self._shapes) > SHAPES:
                self._shapes.clear()
            for row in self.db.execute("SELECT id, key, n, k, files, bytes FROM groups "
                                       "WHERE source=? AND files>0 AND "
                                       + which, (source,) + values):
                shape = self._shapes.get(row[0])
                if shape is None:
                    shape = self._shapes[row[0]] = Group(row, self.facts_of_backup)
                # The rest changes with `recount_groups` only, which forgets the shapes; who still
                # reads the old ones gets newer figures.
                shape.files, shape.bytes = row[4:]
                found.append(shape)
        return found

    def holders_in(self, group: "Optional[int]") -> "Tuple[str, ...]":
        """The names of the backups that have a copy of each file of a group."""
        row = self.one("SELECT key FROM groups WHERE id=?", group)
        return tuple(self.one("SELECT name FROM backups WHERE id=?", backup)[0]
                     for backup, copy in (members_of(row[0]) if row else ()) if copy)

    def underserved(self, source: int, replicas: int, backup: int) -> "List[Group]":
        """The groups that lack copies of which `backup` could have one, the lowest level first."""
        host = self.host_of(backup)
        return sorted((group for group in self.groups(source, "n<?", replicas)
                       if host not in group.hosts and not group.blocked), key=lambda group: group.n)

    def file_counts(self, source: int) -> "Tuple[int, int]":
        """(files, bytes) of a source, from the groups."""
        files, size = self.one("SELECT SUM(files), SUM(bytes) FROM groups WHERE source=?", source)
        return files or 0, size or 0


class Inventory(Groups):
    """What the sources consist of: entries, what is no longer there, what a scan found.  What
    becomes of the copies by it is written down for their backups to hear."""

    FACTS = ("id", "version", "size", "mtime", "ino", "ctime", "digest", "doubt", "blocked", "path",
             "source")

    def version_of(self, source: int, path: bytes) -> "Optional[Dict[str, Any]]":
        """Facts of a file's present version, for a confirmation; None when there is no such
        file."""
        return self.versions_of(source, [path]).get(path)

    def versions_of(self, source: int, paths: "Iterable[bytes]") -> "Dict[bytes, Dict[str, Any]]":
        """The same of many files, by their paths."""
        rows = self.rows_among("SELECT path, %s FROM entries "
                               "WHERE source=? AND kind='f' AND path AMONG"
                               % ", ".join(self.FACTS), paths, source)
        return {row[0]: dict(zip(self.FACTS, row[1:])) for row in rows}

    def files_of(self, source: int, paths: "Iterable[bytes]") -> "set[bytes]":
        """Those of `paths` that are files of a source."""
        return {row[0] for row in self.rows_among(
            "SELECT path FROM entries WHERE source=? AND kind='f' AND path AMONG", paths, source)}

    def facts_of(self, number: int) -> "Optional[Dict[str, Any]]":
        """What `version_of` says, by the file's number."""
        row = self.one("SELECT %s FROM entries WHERE id=? AND kind='f'" % ", ".join(self.FACTS),
                       number)
        return dict(zip(self.FACTS, row)) if row else None

    # -- what the scanner found --

    ENTRY = "id, kind, size, mtime, mode, uid, gid, ino, ctime, nlink, target, blocked, " \
        "CASE WHEN xattrs LIKE ' %' THEN -1 ELSE xattrs LIKE '%:null%' END"

    def entry_at(self, source: int, path: bytes) -> "Optional[Tuple[Any, ...]]":
        """(id, kind, size, mtime, mode, uid, gid, ino, ctime, nlink, target, blocked, xattrs) of a
        path; xattrs: None: not asked for; -1: to be looked at once more; else whether some may have
        been left out."""
        return self.one("SELECT %s FROM entries WHERE source=? AND path=?" % self.ENTRY,
                        source, path)

    def xattrs_of(self, number: int) -> "Optional[str]":
        """The extended attributes of an entry as they are in the books."""
        row = self.one("SELECT xattrs FROM entries WHERE id=?", number)
        return row[0] if row else None

    def directory_id(self, source: int, path: bytes) -> "Optional[int]":
        row = self.one("SELECT id FROM entries WHERE source=? AND path=? AND kind='d'", source,
                       path)
        return row[0] if row else None

    OPEN_GEN = "(SELECT gen FROM sources WHERE id=?)"
    """The open catalog generation of a source, read where it is written: a row that a caller has
    read before may be of one that was closed since, and what is written there no backup would
    hear."""

    def _are_news(self, numbers: "Iterable[int]") -> None:
        """Entries that belong into the next generation: the catalog has their facts, and names
        their holders."""
        self.db.executemany("UPDATE entries SET gen=? WHERE id=?", self.rows_among(
            "SELECT s.gen, e.id FROM entries e JOIN sources s ON s.id=e.source "
            "WHERE e.gen<>s.gen AND e.id AMONG", numbers))

    def _open_gen(self, source: int) -> int:
        """What OPEN_GEN says, for all that is written in one transaction."""
        return self.db.execute("SELECT " + self.OPEN_GEN, (source,)).fetchone()[0]

    def _grave(self, source: "Dict[str, Any]", path: bytes) -> None:
        self.db.execute("INSERT OR REPLACE INTO graves VALUES(?,?,%s)" % self.OPEN_GEN,
                        (source["id"], path, source["id"]))

    def bury(self, source: "Dict[str, Any]", number: int, path: bytes, kind: str) -> None:
        """An entry that is no longer in the source: backups that hold it are to retire it."""
        db = self.db
        db.execute("DELETE FROM entries WHERE id=?", (number,))
        db.execute("DELETE FROM declines WHERE file=?", (number,))
        self._grave(source, path)
        if kind == "f":
            db.execute("DELETE FROM copies WHERE file=? AND state='c'", (number,))
            if db.execute("UPDATE copies SET state='r', todo=?, expires=NULL, "
                          "path=COALESCE(path, ?) "
                          "WHERE file=?",
                          (TODO_RETIRE, path, number)).rowcount:
                db.execute("INSERT INTO gone VALUES(?,?,?)", (number, source["id"], path))

    def add_entries(self, source: "Dict[str, Any]",
                    rows: "List[Tuple[Dict[str, Any], int]]") -> None:
        """New paths: (row, number of the directory).  A file that lies in backups under this path,
        and was retired, is taken up again."""
        db, number = self.db, source["id"]
        db.executemany("DELETE FROM graves WHERE source=? AND path=?", self.rows_among(
            "SELECT source, path FROM graves WHERE source=? AND path AMONG",
            [row["path"] for row, _ in rows], number))
        known = dict(self.rows_among("SELECT path, id FROM gone WHERE source=? AND path AMONG",
                                     [row["path"] for row, _ in rows if row["kind"] == "f"],
                                     number))
        groups = {blocked: self._group_id(number, "!" if blocked else "")
                  for blocked in {bool(row["blocked"]) for row, _ in rows if row["kind"] == "f"}}
        versions = itertools.count(self._next_version(len(rows)))
        gen = self._open_gen(number)
        db.executemany(
            "INSERT INTO entries(id, source, parent, path, kind, size, mtime, mode, uid, gid, ino, "
            "ctime, nlink, target, version, blocked, gen, grp, xattrs) "
            "VALUES(%s)"
            % ",".join(["?"] * 19),
            [(known.get(row["path"]) if row["kind"] == "f" else None, number, parent, row["path"],
              row["kind"], row["size"],
              row["mtime"], row["mode"], row["uid"], row["gid"], row["ino"], row["ctime"],
              row["nlink"], row["target"])
             + ((next(versions), row["blocked"], gen, groups[bool(row["blocked"])])
                if row["kind"] == "f"
                else (0, row["blocked"], gen, None)) + (row["xattrs"],)
             for row, parent in rows])
        for blocked, group in groups.items():
            sizes = [row["size"] for row, _ in rows
                     if row["kind"] == "f" and bool(row["blocked"]) == blocked]
            db.execute("UPDATE groups SET files=files+?, bytes=bytes+? WHERE id=?",
                       (len(sizes), sum(sizes), group))
        for path, file in known.items():
            db.execute("DELETE FROM gone WHERE id=?", (file,))
            db.execute("UPDATE copies SET state='s', todo=?, expires=?, "
                       "path=CASE WHEN path=? THEN NULL ELSE path END "
                       "WHERE file=?", (TODO_UPDATE, self.up() + STALE_LEASE, path, file))
        self.regroup(known.values())

    def change_entry(self, source: "Dict[str, Any]", number: int, row: "Dict[str, Any]",
                     how: str) -> None:
        """A known path with new facts.  `how`: "content" (a new version), "metadata" (mode or
        owner), "attributes" (which only the catalog has), "silent" (nothing that anybody must
        hear). row["doubt"]: the content is presumed to be the same, and is to be read."""
        db = self.db
        db.execute("UPDATE entries SET size=?, mtime=?, mode=?, uid=?, gid=?, ino=?, ctime=?, "
                   "nlink=?, target=?, blocked=?, xattrs=? "
                   "WHERE id=?", (
                       row["size"], row["mtime"], row["mode"], row["uid"], row["gid"], row["ino"],
                       row["ctime"], row["nlink"], row["target"], row["blocked"], row["xattrs"],
                       number))
        if row["doubt"]:
            self._doubt(source, number)
        if how == "silent":
            return
        self._are_news([number])
        if row["kind"] != "f" or how == "attributes":
            return
        db.execute("DELETE FROM declines WHERE file=?", (number,))
        if how == "metadata":
            # Also what is only claimed: it is on its way with the mode that it had before.
            db.execute("UPDATE copies SET todo=todo|? WHERE file=?", (TODO_TOUCH, number))
        else:
            db.execute("UPDATE entries SET version=?, digest=NULL, doubt=NULL, basis=NULL, "
                       "other=NULL "
                       "WHERE id=?",
                       (self._next_version(), number))
            self._copies_are_old(number)
        self.regroup([number])

    def _copies_are_old(self, number: int) -> None:
        """What the backups have is not the file's present content; the caller regroups."""
        self.db.execute(
            "UPDATE copies SET checked=NULL, state=CASE state WHEN 'k' THEN 's' ELSE state END, "
            "expires=CASE state WHEN 'k' THEN ? ELSE expires END, "
            "todo=CASE WHEN state IN ('c', 'r') THEN todo ELSE todo|? END "
            "WHERE file=?",
            (self.up() + STALE_LEASE, TODO_UPDATE, number))

    def _doubt(self, source: "Dict[str, Any]", number: int) -> None:
        """From now on a digest is only presumed: the file is not, to the inode and ctime, the one
        that was read."""
        self.db.execute("UPDATE entries SET doubt=COALESCE(doubt, ?), other=NULL, gen=%s "
                        "WHERE id=? AND digest IS NOT NULL"
                        % self.OPEN_GEN, (clock.now(), source["id"], number))

    def lift(self, number: int) -> None:
        """First half of a move: free the entry's path, so that swaps and chains do not collide."""
        path = self.db.execute("SELECT path FROM entries WHERE id=?", (number,)).fetchone()[0]
        self.db.execute("UPDATE copies SET path=COALESCE(path, ?), "
                        "todo=todo|CASE state WHEN 'r' THEN 0 ELSE ? END "
                        "WHERE file=? AND state!='c'",
                        (path, TODO_MOVE, number))  # what is retired is not moved before
        self.db.execute("UPDATE entries SET path=? WHERE id=?", (b"\0%d" % number, number))

    def settle_move(self, source: "Dict[str, Any]", number: int, old: bytes, row: "Dict[str, Any]",
                    parent: int) -> None:
        """Second half: the file has its new path and metadata; its content and copies are presumed
        to be the same.  With the ctime that it had when it was read they are known to be: its
        directory was renamed."""
        db = self.db
        ctime = db.execute("SELECT ctime FROM entries WHERE id=?", (number,)).fetchone()[0]
        # whole seconds: inodes may be used again within one
        if ctime != row["ctime"] or ctime % 1000000000 == 0:
            self._doubt(source, number)
        if not db.execute("SELECT 1 FROM entries WHERE source=? AND path=?",
                          (source["id"], old)).fetchone():
            self._grave(source, old)
        db.execute("DELETE FROM graves WHERE source=? AND path=?", (source["id"], row["path"]))
        owner = db.execute("SELECT mode, uid, gid FROM entries WHERE id=?", (number,)).fetchone()
        if owner != (row["mode"], row["uid"], row["gid"]):
            db.execute("UPDATE copies SET todo=todo|? WHERE file=? AND state!='c'",
                       (TODO_TOUCH, number))
        db.execute("UPDATE entries SET path=?, parent=?, mode=?, uid=?, gid=?, ctime=?, nlink=?, "
                   "blocked=?, gen=%s, xattrs=? "
                   "WHERE id=?" % self.OPEN_GEN, (
                       row["path"], parent, row["mode"], row["uid"], row["gid"], row["ctime"],
                       row["nlink"], row["blocked"], source["id"], row["xattrs"], number))
        # Claims on the old path are void: rsync would not find it.
        db.execute("DELETE FROM copies WHERE file=? AND state='c'", (number,))
        db.execute("UPDATE copies SET path=NULL, todo=todo&~? WHERE file=? AND path=?",
                   (TODO_MOVE, number, row["path"]))
        self.regroup([number])

    # -- how a scan ended --

    def finish_scan(self, name: str, **facts: Any) -> None:
        """Record a scan's own facts: scanned, device, fsid, state, cause, reason, special,
        problems."""
        with self.write() as db:
            db.execute("UPDATE sources SET %s WHERE name=?"
                       % ", ".join("%s=?" % key for key in facts),
                       list(facts.values()) + [name])

    def held_page(self, source: int, after: bytes, limit: int) -> "List[Tuple[bytes, str]]":
        """(path, "gone" or "changed") of files for which a source is held, by path."""
        return self.rows("SELECT path, change FROM held_files WHERE source=? AND path>? "
                         "ORDER BY path LIMIT ?",
                         source, after, limit)

    def keep_held(self, source: int, rows: "List[Tuple[bytes, str]]") -> None:
        """Keep (path, "gone" or "changed") of the files for which a scan holds a source."""
        with self.write() as db:
            db.execute("DELETE FROM held_files WHERE source=?", (source,))
            db.executemany("INSERT OR IGNORE INTO held_files VALUES(?,?,?)",
                           [(source,) + row for row in rows])

    def list_held(self, source: int, cause: "Optional[str]") -> None:
        """Keep the files for which a source is held, when it was no scan that found them: other
        contents ("bytes"), or copies that the source does not have ("report")."""
        with self.write() as db:
            db.execute("DELETE FROM held_files WHERE source=?", (source,))
            if cause == "bytes":
                db.execute("INSERT INTO held_files SELECT source, path, 'changed' FROM entries "
                           "WHERE source=? AND other IS NOT NULL ORDER BY path LIMIT ?",
                           (source, HELD_FILES))
            elif cause == "report":
                db.execute("INSERT OR IGNORE INTO held_files SELECT c.source, "
                           "COALESCE(e.path, c.path), "
                           "CASE WHEN e.id IS NULL THEN 'gone' ELSE 'changed' END "
                           "FROM copies c LEFT JOIN entries e ON e.id=c.file "
                           "WHERE c.source=? AND c.tag IS NOT NULL AND %s "
                           "AND COALESCE(e.path, c.path) IS NOT NULL "
                           "LIMIT ?" % self.NOT_LIKE_THAT,
                           (source, HELD_FILES))

    NOT_LIKE_THAT = "(e.id IS NULL OR e.size IS NOT c.held_size " \
        "OR COALESCE(ABS(e.mtime-c.held_mtime)>=2000000000, 1))"

    def mismatch(self, source: int) -> "Tuple[int, int]":
        """(copies that backups hold of something that the source does not have like that, all
        copies).  A disk may have kept its time in steps of 2 s."""
        bad, total = self.one(
            "SELECT COALESCE(SUM(%s), 0), COUNT(*) "
            "FROM copies c LEFT JOIN entries e ON e.id=c.file "
            "WHERE c.source=? AND c.tag IS NOT NULL" % self.NOT_LIKE_THAT, source)
        return bad, total


class News(Inventory):
    """The catalogs that backups fetch: generations of entries and of paths that are no more."""

    def close_generation(self, source: "Dict[str, Any]") -> int:
        """The newest complete catalog generation; what changed since the last one becomes a new
        one."""
        with self.write() as db:
            number = source["id"]
            gen, = db.execute("SELECT gen FROM sources WHERE id=?", (number,)).fetchone()
            changed = db.execute("SELECT 1 FROM entries WHERE source=? AND gen=? LIMIT 1",
                                 (number, gen)).fetchone() or \
                db.execute("SELECT 1 FROM graves WHERE source=? AND gen=? LIMIT 1",
                           (number, gen)).fetchone()
            if not changed:
                return gen - 1
            mark = "changed:%d" % number
            db.execute("INSERT OR REPLACE INTO generations VALUES(?,?,?,?)",
                       (number, gen, clock.now(), int(self.meta(mark) is not None)))
            db.execute("DELETE FROM meta WHERE key=?", (mark,))
            db.execute("UPDATE sources SET gen=gen+1 WHERE id=?", (number,))
            return gen

    def raise_generation(self, source: int, least: int) -> None:
        """After the books were lost: go on above the generations that backups already have, and
        wait for their reports."""
        with self.write() as db:
            row = db.execute("SELECT gen FROM sources WHERE id=?", (source,)).fetchone()
            if row and row[0] <= least:
                self.set_meta("recovering:%d" % source, self.up() + RECOVERY_WAIT)
                db.execute("UPDATE entries SET gen=? WHERE source=? AND gen=?",
                           (least + 1, source, row[0]))
                db.execute("UPDATE graves SET gen=? WHERE source=? AND gen=?",
                           (least + 1, source, row[0]))
                # Something is news in any case: the next catalog is one of these books, and newer
                # than all others.
                db.execute("UPDATE entries SET gen=? WHERE source=? AND path=x''",
                           (least + 1, source))
                db.execute("UPDATE sources SET gen=? WHERE id=?", (least + 1, source))

    def note_list(self, backup: int, source: int, newest: int) -> None:
        """How far the list is that `backup` begins with.  When it has had a newer one it was put
        back as it was then: what it holds under which name its sums tell, but not the modes and
        owners that changed since."""
        mark = "list:%d:%d" % (backup, source)
        known = self.meta(mark)
        if known == newest:
            return
        with self.write() as db:
            if known is not None and newest < known:
                db.execute("UPDATE copies SET todo=todo|? "
                           "WHERE backup=? AND state<>'c' "
                           "AND file IN (SELECT id FROM entries WHERE source=? AND gen>=?)",
                           (TODO_TOUCH, backup, source, newest))
            self.set_meta(mark, newest)

    def note_change(self, source: int) -> None:
        """The next generation is one in which something of the source changed."""
        self.set_meta("changed:%d" % source, 1)

    def generations(self, source: int) -> "List[Tuple[int, float, int]]":
        """(generation, time, whether something of the source changed) of the newest catalogs, the
        newest first; time 0 of one of which it is not known, as in `generation_time`."""
        rows = self.rows("SELECT gen, time, changed FROM generations WHERE source=? "
                         "ORDER BY gen DESC LIMIT ?", source, PAGE)
        gen, = self.one("SELECT gen FROM sources WHERE id=?", source)
        unknown = gen > 1 and (not rows or rows[0][0] < gen - 1)
        return [(gen - 1, 0.0, 1)] + rows if unknown else rows

    def generation_time(self, source: int, gen: int) -> float:
        row = self.one("SELECT time FROM generations WHERE source=? AND gen=?", source, gen)
        return row[0] if row else 0.0

    def catalog_entries(self, source: int, since: int, upto: int, after: "Tuple[int, int]",
                        ) -> "Tuple[List[Tuple[Any, ...]], bool]":
        """A page of live entries of generations in (since, upto], after the cursor (gen, id): these
        and the first 14 columns of CatalogRow, without the names of user and group; whether there
        may be more.  It is short where names or extended attributes are long."""
        rows: "List[Tuple[Any, ...]]" = []
        parts = [("gen>? AND gen<=?", max(since, after[0]), upto)]
        if since < after[0] <= upto:  # each part goes by its index
            parts.insert(0, ("gen=? AND id>?", *after))
        for which, *values in parts:
            rows += self.rows(
                "SELECT gen, id, path, kind, size, mtime, mode, uid, gid, "
                "CASE WHEN nlink>1 AND kind='f' THEN ino END, target, digest, grp, "
                "kind<>'f' "
                "OR digest IS NOT NULL AND doubt IS NULL, LENGTH(xattrs), "
                "blocked IS NOT 'unreadable' FROM entries "
                "WHERE source=? AND %s AND NOT (kind='l' AND target=x'') "
                "ORDER BY gen, id LIMIT ?" % which, source, *values, PAGE - len(rows))
        holders: "Dict[Optional[int], Tuple[str, ...]]" = {}
        page: "List[Tuple[Any, ...]]" = []
        size = 0
        for row in first_page(rows):
            if row[12] not in holders:
                holders[row[12]] = self.holders_in(row[12])
            if row[14] is not None:
                size += row[14]
                if page and size > XATTRS_PAGE:
                    break
                row = row[:14] + (json.loads(self.xattrs_of(row[1]) or "null"), row[15])
            page.append(row[:12] + (holders[row[12]],) + row[13:])
        return page, len(page) == PAGE or len(page) < len(rows)

    def catalog_graves(self, source: int, since: int, upto: int,
                       after: bytes) -> "Tuple[List[bytes], bool]":
        """A page of paths that are no more, by path; whether there may be more."""
        return with_more([row[0] for row in self.rows(
            "SELECT path FROM graves WHERE source=? AND gen>? AND gen<=? AND path>? ORDER BY path "
            "LIMIT ?",
            source, since, upto, after, PAGE)])


class Proof(News):
    """What our own files have in them: which digests are facts, and what follows where one was
    wrong."""

    def unread(self, source: int, before: "Tuple[float, int]",
               limit: int) -> "List[Dict[str, Any]]":
        """Facts (see version_of) of files whose digest is presumed, those of which it was presumed
        last first; behind `before`, the (doubt, id) of the last one."""
        return [dict(zip(self.FACTS, row)) for row in self.rows(
            "SELECT %s FROM entries "
            "WHERE source=? AND doubt IS NOT NULL AND doubt<=? AND (doubt<? OR id<?) "
            "AND other IS NULL "
            "ORDER BY doubt DESC, id DESC LIMIT ?" % ", ".join(self.FACTS),
            source, before[0], before[0], before[1], limit)]

    def unread_count(self, source: int) -> "Tuple[int, Optional[float]]":
        """(files whose digest is presumed, since when the first of them is)."""
        return self.one("SELECT COUNT(*), MIN(doubt) FROM entries "
                        "WHERE source=? AND doubt IS NOT NULL", source)

    def prove_all(self, source: "Dict[str, Any]",
                  read: "List[Tuple[Dict[str, Any], bytes, bool]]") -> "List[str]":
        """The server has read files in full: (facts, digest, sure).  facts: what a file was before
        and after; sure: some copy has this content, so it is no mass change.  In slices.

        Returns for each "proven"; "changed" (the books know another version by now); "rotten" (it
        was proven before, and nothing but the content changed); "copies" (its copies were not of
        this content: they are out of date now); or "other": it is not what its copies have, and
        whether that is a change or a mass change is for `settle_others` to say.
        """
        return [verdict for some in in_batches(read, APPLY_CHUNK)
                for verdict in self._prove_some(source, some)]

    def _prove_some(self, source: "Dict[str, Any]",
                    read: "List[Tuple[Dict[str, Any], bytes, bool]]") -> "List[str]":
        with self.write(lasting=False) as db:  # what is forgotten of it is read again
            known = {row[0]: row[1:] for row in self.rows_among(
                "SELECT id, size, mtime, ino, ctime, digest, doubt, basis FROM entries "
                "WHERE kind='f' AND id AMONG",
                [facts["id"] for facts, _, _ in read])}
            verdicts, news, gen = [], [], self._open_gen(source["id"])
            for facts, own, sure in read:
                row = known.get(facts["id"])
                if not row or row[:4] != (facts["size"], facts["mtime"], facts["ino"],
                                          facts["ctime"]):
                    verdicts.append("changed")
                elif row[4] in (None, own):
                    verdicts.append("proven")
                    if row[5] is not None or row[4] is None:
                        news.append((own, gen, facts["id"]))
                else:
                    verdicts.append(self._disprove(source, facts["id"], own, *row[5:], sure))
                    # it is another version now: who names it twice is told so
                    del known[facts["id"]]
            db.executemany("UPDATE entries SET digest=?, doubt=NULL, basis='p', other=NULL, gen=? "
                           "WHERE id=?", news)
            return verdicts

    def _disprove(self, source: "Dict[str, Any]", number: int, own: bytes, doubt: "Optional[float]",
                  basis: "Optional[str]",
                  sure: bool) -> str:
        """A file has another content than its digest says: what that means, see `prove_all`."""
        if doubt is None:
            self.db.execute("UPDATE entries SET blocked=? WHERE id=?", (ROTTEN, number))
            self.regroup([number])
            return "rotten"
        self.db.execute("UPDATE entries SET other=? WHERE id=?", (own, number))
        if basis != "c" and not sure:
            return "other"
        self._take_other(source, number)
        return "copies"

    def _take_other(self, source: "Dict[str, Any]", number: int) -> None:
        """What was read is a file's content from now on.  Where another content had been read
        before it is a new version; else only its copies were wrong."""
        self.db.execute("UPDATE entries SET version=CASE basis WHEN 'p' THEN ? ELSE version END, "
                        "digest=other, doubt=NULL, basis='p', other=NULL, gen=%s "
                        "WHERE id=?" % self.OPEN_GEN,
                        (self._next_version(), source["id"], number))
        self.db.execute("DELETE FROM declines WHERE file=?", (number,))
        self._copies_are_old(number)
        self.regroup([number])
        self.note_change(source["id"])

    def settle_others(self, source: "Dict[str, Any]", equal: int, consent: bool = False) -> None:
        """Decide about files that were found to have another content while size and times are the
        same: taken over one by one, unless more than half of a source may be so.  Then it waits
        until that is known, and the source is held.

        equal: how many of its files were read meanwhile and were as presumed; consent: somebody
        said `accept`.
        """
        with self.write() as db:
            others = [row[0] for row in db.execute(
                "SELECT id FROM entries WHERE source=? AND other IS NOT NULL ORDER BY id",
                (source["id"],))]
            files, unread = self.file_counts(source["id"])[0], \
                self.unread_count(source["id"])[0] - len(others)
            small = files < HELD_SHARE_OF
            if not others or source["state"] != "ok" and not consent:
                return
            if consent or small or len(others) <= equal or (len(others) + unread) * 2 <= files:
                for number in others:
                    self._take_other(source, number)
            elif self.mostly_other(source["id"]):
                self.finish_scan(source["name"], state="held", cause="bytes", reason=(
                    "of the %s in %s, %s have another content than before, while size and time of "
                    "change are the same"
                    % (count_of(files, "file"), source["path"], format(len(others), ","))))
                self.list_held(source["id"], "bytes")

    def mostly_other(self, source: int) -> bool:
        """Whether more than half of a source's files are known to have another content than
        presumed."""
        others = self.one("SELECT COUNT(*) FROM entries WHERE source=? AND other IS NOT NULL",
                          source)[0]
        files = self.file_counts(source)[0]
        return files >= HELD_SHARE_OF and others * 2 > files


class Placement(Proof):
    """Which copies are missing, and who should have them: reads, decides, writes nothing (the rules
    of a pass are in section 13)."""

    def candidates(self, backup: int, source: int, replicas: int, free: int,
                   batch: "Tuple[int, int]",
                   ) -> "Iterator[Tuple[int, int]]":
        """(file id, size) to claim for `backup`, best first: a random sample of the lowest
        level that has any; large enough for a choice when `batch` (files, bytes) is wanted.  What
        is drawn of a group are neighbours: whole directories cost half of what the same files cost
        when each is of another one.

        On that level, files whose present holders have the most free room together come first: a
        host with room can never take the same file twice, so its files must go to others.  Last of
        all come those (not without any copy) of which hosts that will be short of files could take
        every copy that is missing.
        """
        room: "Dict[str, int]" = {}
        for other_host, other_free in self.rows("SELECT host, free FROM backups "
                                                "WHERE configured=1 AND lost=0 AND leaving=0"):
            room[other_host] = room.get(other_host, 0) + max(0, other_free or 0)
        levels: "Dict[Tuple[bool, int], List[Group]]" = {}
        short = self._short_of_files(source, replicas, room) - {self.host_of(backup)}
        for group in self.underserved(source, replicas, backup):
            theirs = group.n > 0 and len(short.difference(group.hosts)) >= replicas - group.n
            levels.setdefault((theirs, group.n), []).append(group)
        for (_, level), groups in sorted(levels.items()):
            none = True
            files, size = sum(group.files for group in groups), sum(group.bytes for group in groups)
            sample = max(CANDIDATES,
                         CHOICE * min(batch[0], int(batch[1] * files / max(1, size)) + 1))
            sample = min(sample, 2 * files)
            drawn: "Dict[int, int]" = {}
            if len(groups) == 1:
                drawn[groups[0].id] = sample
            else:
                for group in self.random.choices(groups, weights=[group.files for group in groups],
                                                 k=sample):
                    drawn[group.id] = drawn.get(group.id, 0) + 1
            scores = sorted((-sum(room.get(host, 0) for host in group.hosts), self.random.random(),
                             group.id)
                            for group in groups if group.id in drawn)
            for _, _, number in scores:
                for row in self._sample(number, backup, free, min(drawn[number], batch[0])):
                    none = False
                    yield row
            if none:
                for row in self._that_fit(groups, backup, source, level, free):
                    none = False
                    yield row
            if not none:
                return

    def _short_of_files(self, source: int, replicas: int, room: "Dict[str, int]") -> "set[str]":
        """Hosts whose room is not much less than all that they can still take of a source: when
        others take it, room is left there for which there are no files, until others are relieved
        of some that were placed already."""
        missing = [group for group in self.groups(source, "n<?", replicas) if not group.blocked]
        lacking = dict.fromkeys(room, sum(group.bytes for group in missing))
        for group in missing:
            for host in group.hosts:
                if host in lacking:
                    lacking[host] -= group.bytes
        return {host for host in room if host != self.host
                and 0 < lacking[host] <= SHORT_OF_FILES * room[host]}

    ACCEPT = "AND size<=? AND NOT EXISTS(SELECT 1 FROM declines d WHERE d.file=x.id " \
        "AND d.backup=? AND d.until>?)"

    def _sample(self, group: int, backup: int, free: int,
                count: int) -> "List[Tuple[int, int]]":
        """(file id, size) of up to `count` files of a group, from a random one on, that fit into
        `free` and were not declined."""
        first, last = self.one("SELECT (SELECT MIN(id) FROM entries WHERE grp=?1), "
                               "(SELECT MAX(id) FROM entries WHERE grp=?1)", group)
        start, found = self.random.randint(first or 0, last or 0), []
        for side in (">=", "<"):
            found += self.rows(
                "SELECT id, size "
                "FROM (SELECT id, size FROM entries WHERE grp=? AND id%s? ORDER BY id LIMIT ?) x "
                "WHERE 1 %s LIMIT ?"
                % (side, self.ACCEPT), group, start, max(200, 2 * count), free, backup, self.up(),
                count - len(found))
            if len(found) >= count:
                break
        return found

    def _that_fit(self, groups: "List[Group]", backup: int, source: int, level: int,
                  free: int) -> "List[Tuple[int, int]]":
        """(file id, size) of the largest files of `groups` that fit, where a random sample
        had none."""
        some = {row[0] for row in self.rows(
            "SELECT id FROM groups g "
            "WHERE source=? AND files>0 AND n=? "
            "AND EXISTS(SELECT 1 FROM entries WHERE grp=g.id AND size<=?)", source, level, free)}
        found: "List[Tuple[int, int]]" = []
        for group in groups:
            if group.id in some and len(found) < CANDIDATES:
                found += self.rows(
                    "SELECT id, size FROM entries x WHERE grp=? %s ORDER BY size DESC LIMIT ?"
                    % self.ACCEPT, group.id, free, backup, self.up(), CANDIDATES)
        return found

    def smallest_underserved(self, backup: int, source: "Dict[str, Any]", above: int, most: int,
                             ) -> "Optional[Tuple[bytes, int]]":
        """(path, size) of the smallest file larger than `above`, at most `most`, on the lowest
        level that has one which `backup` could take if it had room."""
        levels: "Dict[int, List[int]]" = {}
        for group in self.underserved(source["id"], source["replicas"], backup):
            levels.setdefault(group.n, []).append(group.id)
        for level in sorted(levels):
            found = [row for row in (self.one(
                "SELECT size, path FROM entries x "
                "WHERE grp=? AND size>? AND size<=? "
                "AND NOT EXISTS(SELECT 1 FROM declines d WHERE d.file=x.id AND d.backup=? AND "
                "d.until>?) "
                "ORDER BY size LIMIT 1",
                number, above, most, backup, self.up()) for number in levels[level]) if row]
            if found:
                size, path = min(found)
                return path, size
        return None

    # -- making room --

    def droppable(self, backup: int, source: "Dict[str, Any]",
                  need: int) -> "List[Tuple[bytes, int]]":
        """(path, size) of overserved files that `backup` holds: the smallest one of at least `need`
        bytes, and the largest smaller ones, up to `need`."""
        numbers = [group.id for group in self.groups(source["id"], "k>=? AND key GLOB ?",
                                                     source["replicas"],
                                                     "*%d+*" % backup)
                   if group.members.get(backup)
                   and group.copies_without(backup, self.host_of) >= source["replicas"]]
        return self._around(numbers, need, 1 << 62, backup)

    def _around(self, groups: "List[int]", need: int, most: int, backup: int, filling: bool = False,
                ) -> "List[Tuple[bytes, int]]":
        """The smallest file of at least `need` bytes, and the largest smaller ones: until they are
        together as much, or with `filling` such as fit together into `need`; none over `most`, none
        that `backup` declined."""
        above: "List[Tuple[int, bytes]]" = []
        below: "List[Tuple[int, bytes]]" = []
        free_of_declines = "NOT EXISTS(SELECT 1 FROM declines d WHERE d.file=x.id " \
            "AND d.backup=%d AND d.until>%f)" % (backup, self.up())
        for number in groups:
            above += self.rows("SELECT size, path FROM entries x "
                               "WHERE grp=? AND size>=? AND size<=? AND %s ORDER BY size LIMIT 1"
                               % free_of_declines, number, need, most)
            total, limit = 0, min(need - 1, most)
            while limit >= 0:
                page = self.rows("SELECT size, path FROM entries x WHERE grp=? AND size<=? AND %s "
                                 "ORDER BY size DESC LIMIT 500"
                                 % free_of_declines, number, limit)
                limit = -1
                for row in page:
                    if filling and total + row[0] > need:
                        limit = need - total
                        break
                    if total >= need:
                        break
                    below.append(row)
                    total += row[0]
        chosen, total = ([(path, size) for size, path in [min(above)]] if above else []), 0
        for size, path in sorted(below, reverse=True):
            if total >= need or len(chosen) > 1000:
                break
            if not filling or total + size <= need:
                chosen.append((path, size))
                total += size
        return chosen

    def relief_offers(self, backup: int, source: "Dict[str, Any]", relieved: int, gap: int,
                      free: int,
                      ) -> "List[Tuple[bytes, int]]":
        """(path, size) of files with exactly N claims or copies that `relieved` holds and
        `backup`'s host lacks: the smallest one of at least `gap` bytes, and the largest smaller
        ones up to `gap`; none over `free`."""
        host = self.host_of(backup)
        inside = self.host_of(relieved) == host
        numbers = [group.id for group in self.groups(source["id"], "n=? AND key GLOB ?",
                                                     source["replicas"],
                                                     "*%d+*" % relieved)
                   if group.members.get(relieved) and not group.blocked
                   and (backup not in group.members if inside else host not in group.hosts)]
        return self._around(numbers, gap, free, backup, filling=True)

    def lacking(self, backup: int, source: "Dict[str, Any]", most: int) -> "Tuple[int, int]":
        """(bytes, files) that are underserved, at most `most` bytes each, and that `backup` lacks
        and may hold."""
        size = files = 0
        for group in self.underserved(source["id"], source["replicas"], backup):
            large = (0, 0) if group.bytes <= most else self.one(
                "SELECT COALESCE(SUM(size), 0), COUNT(*) FROM entries WHERE grp=? AND size>?",
                group.id, most)
            size, files = size + group.bytes - large[0], files + group.files - large[1]
        declined = self.one(
            "SELECT COALESCE(SUM(e.size), 0), COUNT(*) "
            "FROM declines d CROSS JOIN entries e ON e.id=d.file JOIN groups g ON g.id=e.grp "
            "WHERE d.backup=? AND d.until>? AND e.source=? AND g.n<? AND e.size<=?",
            backup, self.up(), source["id"], source["replicas"], most)
        return max(0, size - declined[0]), max(0, files - declined[1])

    def room_of_others(self, backup: int) -> "Dict[int, int]":
        """backup -> free bytes, as far as it is to be expected that they are offered to our files
        in its next pass."""
        return {number: free for number, free in self.rows(
            "SELECT id, free FROM backups "
            "WHERE configured=1 AND lost=0 AND leaving=0 AND id<>? AND host<>? AND free>0 "
            "AND heard>=?-3*COALESCE(period, 3600)", backup, self.host, self.up())}

    def beyond_room(self, source: "Dict[str, Any]", room: "Dict[int, int]") -> int:
        """Bytes of missing copies for which there is no place in `room` (backup -> bytes); what has
        one is taken off it.

        Only for these is it worth to make room elsewhere: the others will be taken by who has the
        room, without help.
        """
        beyond, declined = 0, self.one("SELECT 1 FROM declines WHERE until>? LIMIT 1", self.up())
        for group in sorted(self.groups(source["id"], "n<?", source["replicas"]),
                            key=lambda g: g.n):
            left = 0 if group.blocked else (source["replicas"] - group.n) * group.bytes
            taken: "Dict[str, int]" = {}
            for backup in sorted(room, key=lambda b: (-room[b], b)) if left else ():
                host = self.host_of(backup)
                if host in group.hosts:
                    continue
                fits = group.bytes if room[backup] >= group.bytes and not declined else self.one(
                    "SELECT COALESCE(SUM(size), 0) FROM entries x "
                    "WHERE grp=? AND size<=? "
                    "AND NOT EXISTS(SELECT 1 FROM declines d WHERE d.file=x.id AND d.backup=? AND "
                    "d.until>?)", group.id,
                    room[backup], backup, self.up())[0]
                able = min(fits, room[backup], left, group.bytes - taken.get(host, 0))
                taken[host] = taken.get(host, 0) + able
                room[backup] -= able
                left -= able
            beyond += left
        return beyond

    def last_words(self) -> "List[Dict[str, Any]]":
        """What every configured backup said last, and the bytes that it can drop of this host's
        sources, now or when what is claimed has arrived: or several would relieve it of the same
        bytes at once."""
        spare: "Dict[int, int]" = {}
        for source, replicas in self.rows("SELECT id, replicas FROM sources "
                                          "WHERE active=1 AND state='ok'"):
            for group in self.groups(source, "n>?", replicas):
                for backup, copy in group.members.items():
                    if copy and len({self.host_of(b) for b in group.members if b != backup
                                     and b not in group.leaving}
                                    ) >= replicas:
                        spare[backup] = spare.get(backup, 0) + group.bytes
        now = self.up()
        return [{"name": name, "host": host, "capacity": capacity, "free": free, "want": want,
                 "used": used,
                 "files": files, "age": None if date is None else max(0.0, now - heard),
                 "period": period,
                 "lost": bool(lost), "droppable": spare.get(number, 0)}
                for number, name, host, capacity, free, want, used, files, heard, date, period,
                lost in self.rows(
                    "SELECT id, name, host, capacity, free, want, used, files, heard, heard_date, "
                    "period, lost "
                    "FROM backups WHERE configured=1 ORDER BY name")]

    # -- figures --

    def unclaimed_bytes(self, source: "Dict[str, Any]") -> int:
        """Bytes of copies that nobody has or has claimed: the source's demand (`missing` in the
        rules)."""
        return self.one("SELECT COALESCE(SUM((? - n) * bytes), 0) FROM groups "
                        "WHERE source=? AND files>0 AND n<? AND key NOT LIKE '!%'",
                        source["replicas"], source["id"],
                        source["replicas"])[0]

    def short_count(self, source: "Dict[str, Any]") -> int:
        """How many files have fewer than N confirmed copies."""
        return self.one("SELECT COALESCE(SUM(files), 0) FROM groups "
                        "WHERE source=? AND files>0 AND k<?",
                        source["id"], source["replicas"])[0]

    def duties(self) -> "Dict[str, int]":
        """For each backup that is leaving: how many copies in it have not been made elsewhere
        yet."""
        out = {}
        for number, name in self.rows("SELECT id, name FROM backups "
                                      "WHERE leaving=1 AND configured=1"):
            out[name] = sum(group.files for source,
                            replicas in self.rows("SELECT id, replicas FROM sources WHERE active=1")
                            for group in self.groups(source, "key GLOB ?", "*%d+*" % number)
                            if number in group.leaving
                            and group.copies_without(number, self.host_of) < replicas)
        return out

    def plan_facts(self, source: "Dict[str, Any]") -> "Dict[str, Any]":
        """For `plan`: files, bytes and the largest file of a source; files without any copy
        (`bare`); and for each host with copies what is short of copies without it (`without`: host
        -> [files, bytes that are to be copied again])."""
        out: "Dict[str, Any]" = {"replicas": source["replicas"], "files": 0, "bytes": 0,
                                 "bare": [0, 0], "without": {}}
        for group in self.groups(source["id"]):
            out["files"] += group.files
            out["bytes"] += group.bytes
            staying = {self.host_of(b) for b, copy in group.members.items() if copy
                       and b not in group.leaving}
            if not group.copy_hosts:
                out["bare"] = [out["bare"][0] + group.files, out["bare"][1] + group.bytes]
            for host in staying if len(staying) <= source["replicas"] else ():
                files, size = out["without"].get(host, (0, 0))
                out["without"][host] = [files + group.files, size + group.bytes]
        largest = self.one("SELECT size, path FROM entries WHERE source=? AND kind='f' "
                           "ORDER BY size DESC LIMIT 1",
                           source["id"])
        out["largest"] = [largest[0], as_text(largest[1])] if largest else [0, ""]
        return out

    def figures(self, source: "Dict[str, Any]") -> "Dict[str, Any]":
        """What `status` says of one source; costs the same with a thousand files and with a
        million."""
        replicas, histogram = source["replicas"], {}
        out = {"files": 0, "bytes": 0, "underserved_files": 0, "underserved_bytes": 0,
               "overserved_files": 0,
               "missing_bytes": 0, "claimed_files": 0, "blocked_files": 0}
        for k, n, blocked, files, size in self.rows(
                "SELECT k, n, key LIKE '!%', SUM(files), SUM(bytes) FROM groups "
                "WHERE source=? AND files>0 GROUP BY 1, 2, 3",
                source["id"]):
            out["files"] += files
            out["bytes"] += size
            histogram[k] = histogram.get(k, 0) + files
            if k < replicas:
                out["underserved_files"] += files
                out["underserved_bytes"] += size
                out["missing_bytes"] += (replicas - k) * size
            if k > replicas:
                out["overserved_files"] += files
            if n > k:
                out["claimed_files"] += files
            if blocked:
                out["blocked_files"] += files
        out["copies"] = {str(k): histogram[k] for k in sorted(histogram)}
        out["unproven_files"], since = self.unread_count(source["id"])
        out["unproven_since"] = None if since is None else max(0.0, clock.now() - since)
        return out

    def short_since(self, source: int, replicas: int) -> "Optional[float]":
        """For how many seconds at most, by their ctime, files have been as they are and short of
        copies; None: there is none."""
        oldest = self.one("SELECT MIN(e.ctime) FROM groups g JOIN entries e ON e.grp=g.id "
                          "WHERE g.source=? AND g.k<? AND g.files>0", source, replicas)[0]
        return None if oldest is None else max(0.0, clock.now() - oldest / 1e9)

    def stuck_files(self, source: int, replicas: int,
                    limit: int) -> "Tuple[int, List[Tuple[bytes, str]]]":
        """(how many, (path, why) of some) of files that are short of copies because backups could
        not take them, or because their contents cannot be trusted; without those that cannot be
        read, which the scan names, and those that were being written to."""
        rows = self.rows(
            "SELECT e.path, e.blocked FROM groups g CROSS JOIN entries e ON e.grp=g.id "
            "WHERE g.source=?1 AND g.k<?2 AND g.files>0 AND g.key GLOB '!*' "
            "AND e.blocked<>'unreadable' "
            "UNION SELECT e.path, MIN(d.reason) "
            "FROM declines d CROSS JOIN entries e ON e.id=d.file CROSS JOIN groups g ON g.id=e.grp "
            "WHERE g.source=?1 AND g.k<?2 AND d.version=e.version "
            "AND d.reason NOT IN ('no room', 'changed') "
            "GROUP BY e.id ORDER BY 1", source, replicas)
        return len(rows), rows[:limit]

    def short_files(self, source: int, replicas: int, limit: int) -> "List[Tuple[bytes, int, str]]":
        """(path, size, why) of files that are short of copies, the largest first: what fits nowhere
        is among them."""
        largest: "Dict[str, int]" = {}
        for host, capacity in self.rows("SELECT host, capacity FROM backups "
                                        "WHERE configured=1 AND lost=0 AND leaving=0 AND host<>? "
                                        "AND capacity IS NOT NULL", self.host):
            largest[host] = max(capacity, largest.get(host, 0))
        found, short = [], []
        for (group,) in self.rows("SELECT id FROM groups WHERE source=? AND files>0 AND k<?",
                                  source, replicas):
            # Group by group, which is by index: a pass asks for this, also when a million are short.
            short += self.rows(
                "SELECT path, size, "
                "COALESCE(blocked, (SELECT d.reason FROM declines d WHERE d.file=e.id LIMIT 1), "
                "'') "
                "FROM entries e WHERE grp=? ORDER BY size DESC LIMIT ?", group, limit)
        for path, size, why in sorted(short, key=lambda row: -row[1])[:limit]:
            able = sum(capacity >= size for capacity in largest.values())
            if not why and largest and able < replicas:
                why = "it fits into no backup" if not able \
                    else "it fits into the backups of only %s" % count_of(able, "host")
            found.append((path, size, why))
        return found


class Ledger(Placement):
    """Copies, from the claim to where they count (`count_copies`), and the grant that lets one go
    (`grant_drop`): nobody else grants."""

    # -- backups: their last words, absence, leases --

    def hear(self, name: str, words: "Dict[str, Any]") -> int:
        """Remember the last words of a backup (`capacity`, `free`, `want`, `used`, `files`,
        `identity`; those that are given) and renew its claims.  Returns its id."""
        number = self.backup_id(name)
        now = self.up()
        known = {key: value for key, value in words.items() if value is not None}
        first = bool(known.pop("first", None))
        if not first and self._heard_just_now(number, known, now):
            return number
        with self.write() as db:
            row = db.execute("SELECT lost, heard, period, fruitless FROM backups WHERE id=?",
                             (number,)).fetchone()
            known.update(heard=now, heard_date=clock.now())
            if first:
                # What changed while it was copied may stand still now, also when it has no new
                # version.
                db.execute("DELETE FROM declines WHERE backup=? AND reason='changed'", (number,))
                known["fruitless"] = row[3] + 1 if db.execute(
                    "SELECT 1 FROM copies WHERE backup=? AND expires>0 AND state='c' LIMIT 1",
                    (number,)).fetchone() else 0
                if row[1] is not None:
                    known["period"] = max(1.0, now - row[1])
            db.execute("UPDATE backups SET %s WHERE id=?"
                       % ", ".join("%s=?" % key for key in known),
                       list(known.values()) + [number])
            if known.get("fruitless", row[3]) < FRUITLESS_PASSES:  # else others are to have a try
                db.execute("UPDATE copies SET expires=? WHERE backup=? AND state='c' AND expires<?",
                           (now + CLAIM_LEASE, number, now + CLAIM_LEASE * 0.9))
            if row[0]:
                db.execute("UPDATE backups SET lost=0 WHERE id=?", (number,))
                self.recount_groups()
        return number

    def _heard_just_now(self, number: int, words: "Dict[str, Any]", now: float) -> bool:
        """Whether a backup has said the same a moment ago: nothing is to be written then, which
        would be waiting for a disk."""
        keys = sorted(words)
        lost, heard, *known = self.one("SELECT %s FROM backups WHERE id=?"
                                       % ", ".join(["lost", "heard"] + keys), number)
        return not lost and heard is not None and 0 <= now - heard < HEARD_WITHIN \
            and known == [words[key] for key in keys]

    def renew_updates(self, backup: int, files: "List[Tuple[int, bytes]]") -> None:
        """`backup` is at work on these (source, path) of which it has an older version: others are
        to wait for longer."""
        with self.write() as db:
            db.executemany("UPDATE copies SET expires=? "
                           "WHERE backup=? AND state='s' "
                           "AND file=(SELECT id FROM entries WHERE source=? AND path=?)",
                           [(self.up() + STALE_LEASE, backup) + each for each in files])

    def expire(self, lost_after: float) -> None:
        """End claims and update leases that ran out, and stop counting backups unheard of for
        `lost_after`."""
        now = self.up()
        with self.lock:
            due = self.rows("SELECT file, backup, state FROM copies "
                            "WHERE backup IN (SELECT id FROM backups) AND expires<=?",
                            now)
            lost = self.rows("SELECT id, name FROM backups "
                             "WHERE lost=0 AND configured=1 AND heard<?", now - lost_after)
            if not due and not lost:
                return
            with self.write() as db:
                for number, backup, state in due:
                    if state == "c":
                        db.execute("DELETE FROM copies WHERE file=? AND backup=?", (number, backup))
                    else:
                        db.execute("UPDATE copies SET state='o', expires=NULL "
                                   "WHERE file=? AND backup=?",
                                   (number, backup))
                self.regroup(row[0] for row in due)
                for number, _, _ in due:
                    self._retire_outdated(number)
                for number, name in lost:
                    log.warning("backup %s has not been heard of for %s: its copies no longer "
                                "count", name, format_seconds(lost_after))
                    db.execute("UPDATE backups SET lost=1 WHERE id=?", (number,))
                if lost:
                    self.recount_groups()

    # -- claims --

    WANTED = "e.path, e.size, e.mtime, e.mode, e.uid, e.gid, e.version"

    def own_claims(self, backup: int, source: int, limit: int) -> "List[Tuple[Any, ...]]":
        """Claims that this backup already has, for a client that comes back after it was killed."""
        return self.rows("SELECT e.id, %s FROM copies c JOIN entries e ON e.id=c.file "
                         "WHERE c.backup=? AND c.source=? AND c.state='c' ORDER BY e.path LIMIT ?"
                         % self.WANTED, backup, source,
                         limit)

    def on_their_way(self, source: int, most: int) -> "List[bytes]":
        """Paths of files that some backup has claimed, or has an older version of."""
        return [row[0] for row in self.rows(
            "SELECT DISTINCT e.path FROM copies c JOIN entries e ON e.id=c.file "
            "WHERE c.source=? AND c.state IN ('c', 's', 'o') AND e.kind='f' LIMIT ?", source, most)]

    def claim(self, backup: int, source: "Dict[str, Any]", free: int, max_files: int,
              max_bytes: int,
              ) -> "List[Tuple[Any, ...]]":
        """Claim a batch of underserved files for `backup`: rows of WANTED, sorted by path.  In
        slices, between which others are served: who is cut off has what is claimed so far, see
        own_claims.  After a power failure it may be nobody's, and others claim it, too."""
        taken, size = [], 0
        while len(taken) < max_files and size < max_bytes:
            with self.write(lasting=False) as db:
                some = self._choose(backup, source, free - size, (
                    min(APPLY_CHUNK, max_files - len(taken)), max_bytes - size), not taken)
                self._insert_claims([number for number, _ in some], backup, source["id"])
                now = sum(each for _, each in some)
                db.execute("UPDATE backups SET free=free-? WHERE id=?", (now, backup))
            taken += [number for number, _ in some]
            size += now
            if not some or size + 1 > max_bytes:
                break
        wanted = self._wanted(taken)
        rows = first_page(wanted)
        if len(rows) < len(wanted):
            with self.write() as db:
                self._end_claims(backup, [row[0] for row in wanted[len(rows):]])
                db.execute("UPDATE backups SET free=free+? WHERE id=?",
                           (sum(row[2] for row in wanted[len(rows):]), backup))
        return [row[1:] for row in rows]

    def _choose(self, backup: int, source: "Dict[str, Any]", free: int, batch: "Tuple[int, int]",
                any_size: bool) -> "List[Tuple[int, int]]":
        """(file id, size) of the best of `candidates` that fit into `free`, as many as `batch`
        (files, bytes) asks for.  any_size: the first of them may be larger than that."""
        chosen: "List[Tuple[int, int]]" = []
        size = 0
        for number, each in self.candidates(backup, source["id"], source["replicas"], free, batch):
            if len(chosen) >= batch[0] \
                    or (chosen or not any_size) and size + each > batch[1]:
                break
            if each <= free - size:
                chosen.append((number, each))
                size += each
        return chosen

    def _insert_claims(self, numbers: "List[int]", backup: int, source: int) -> None:
        until = self.up() + CLAIM_LEASE
        self.db.executemany("INSERT INTO copies(file, backup, source, state, expires) "
                            "VALUES(?,?,?,'c',?) "
                            "ON CONFLICT(file, backup) DO UPDATE SET state='s', "
                            "expires=excluded.expires",
                            [(number, backup, source, until) for number in numbers])
        self.regroup(numbers)

    def _wanted(self, numbers: "Iterable[int]") -> "List[Tuple[Any, ...]]":
        return sorted(self.rows_among("SELECT e.id, %s FROM entries e WHERE e.id AMONG"
                                      % self.WANTED, numbers),
                      key=lambda row: row[1])

    def claim_paths(self, backup: int, source: "Dict[str, Any]", paths: "List[bytes]",
                    relieved: "Optional[int]",
                    ) -> "List[Tuple[Any, ...]]":
        """Claim named files, those that the rules still allow: underserved ones, or with `relieved`
        such as that backup holds and that have exactly N.  Returns rows of WANTED."""
        host, taken = self.host_of(backup), []
        with self.write():
            for path in paths:
                row = self.one("SELECT e.id, g.id, g.key, g.n, g.k, g.files, g.bytes "
                               "FROM entries e JOIN groups g ON g.id=e.grp "
                               "WHERE e.source=? AND e.path=?", source["id"], path)
                if not row:
                    continue
                group = Group(row[1:], self.facts_of_backup)
                if relieved is None:
                    allowed = group.n < source["replicas"] and host not in group.hosts
                else:
                    same_host = self.host_of(relieved) == host and backup not in group.members
                    allowed = group.n == source["replicas"] \
                        and group.members.get(relieved) is True \
                        and (host not in group.hosts or same_host)
                if allowed and not group.blocked:
                    self._insert_claims([row[0]], backup, source["id"])
                    taken.append(row[0])
        return [row[1:] for row in self._wanted(taken)]

    def release(self, backup: int, source: int, paths: "Optional[List[bytes]]") -> None:
        """Give claims back: those of `paths`, or all of this backup."""
        with self.write():
            if paths is None:
                files = [row[0] for row in self.rows(
                    "SELECT file FROM copies WHERE backup=? AND source=? AND state='c'", backup,
                    source)]
            else:
                files = [row[0] for row in (self.one(
                    "SELECT c.file FROM entries e JOIN copies c ON c.file=e.id "
                    "WHERE e.source=? AND e.path=? AND c.backup=? AND c.state='c'",
                    source, path, backup) for path in paths)
                         if row]
            self._end_claims(backup, files)

    def _end_claims(self, backup: int, files: "List[int]") -> None:
        self.db.executemany("DELETE FROM copies WHERE file=? AND backup=? AND state='c'",
                            [(number, backup) for number in files])
        self.regroup(files)

    def decline(self, backup: int, source: int, rows: "List[Tuple[bytes, int, str]]") -> None:
        """`backup` could not take these (path, version, reason): others may, for a while it is not
        asked again."""
        with self.write() as db:
            for path, version, reason in rows:
                row = self.one("SELECT id, version FROM entries "
                               "WHERE source=? AND path=? AND kind='f'", source, path)
                if not row:
                    continue
                db.execute("DELETE FROM copies WHERE file=? AND backup=? AND state='c'",
                           (row[0], backup))
                db.execute("UPDATE copies SET state='o', expires=NULL "
                           "WHERE file=? AND backup=? AND state='s'",
                           (row[0], backup))
                if row[1] == version:
                    db.execute("INSERT OR REPLACE INTO declines VALUES(?,?,?,?,?)",
                               (row[0], backup, version, self.up() + DECLINE_FOR, reason[:200]))
                self.regroup([row[0]])
                self._retire_outdated(row[0])

    def _retire_outdated(self, number: int) -> None:
        """Older versions for which nobody waits any more go to the attic when enough other hosts
        have the present one: their backups had no room for it, or were away for long."""
        if self.one("SELECT 1 FROM copies WHERE file=? AND state='o'", number) and self.one(
                "SELECT 1 "
                "FROM entries e JOIN groups g ON g.id=e.grp JOIN sources s ON s.id=e.source "
                "WHERE e.id=? AND g.k>=s.replicas", number):
            self.db.execute("UPDATE copies SET state='r', todo=? WHERE file=? AND state='o'",
                            (TODO_RETIRE, number))

    # -- confirmations --

    def record_check(self, backup: int, source: "Dict[str, Any]",
                     results: "List[Tuple[int, int, bytes]]") -> "List[int]":
        """Note that `backup` has the right contents of (file id, version, digest), as far as
        samples tell; the first digest of a version is presumed until our own file was read.
        Returns the ids for which the version is still the same.  In slices."""
        return [number for some in in_batches(results, APPLY_CHUNK)
                for number in self._note_checks(backup, source, some)]

    def _note_checks(self, backup: int, source: "Dict[str, Any]",
                     results: "List[Tuple[int, int, bytes]]") -> "List[int]":
        with self.write(lasting=False) as db:  # what is forgotten of it does not count
            numbers = [number for number, _, _ in results]
            known = {row[0]: row[1:] for row in self.rows_among(
                "SELECT e.id, e.version, e.digest, c.file, c.tag FROM entries e "
                "LEFT JOIN copies c ON c.file=e.id AND c.backup=? WHERE e.id AMONG",
                numbers, backup)}
            noted = [(number, version, digest) for number, version, digest in results
                     if number in known and known[number][0] == version
                     and known[number][1] in (None, digest)]
            gen = self._open_gen(source["id"])
            db.executemany(
                "UPDATE entries SET digest=?, doubt=?, basis=?, other=NULL, gen=? "
                "WHERE id=? AND digest IS NULL",
                [(digest, clock.now(), "c" if known[number][3] is None else "r", gen, number)
                 for number, _, digest in noted if known[number][1] is None])
            db.executemany("UPDATE copies SET checked=? WHERE file=? AND backup=?",
                           [(version, number, backup) for number, version, _ in noted])
            new = {number: version for number, version, _ in noted if known[number][2] is None}
            db.executemany("INSERT INTO copies(file, backup, source, state, checked, expires) "
                           "VALUES(?,?,?,'c',?,?)",
                           [(number, backup, source["id"], version, self.up() + CLAIM_LEASE)
                            for number, version in new.items()])
            self.regroup(new)
        return [number for number, _, _ in noted]

    def count_copies(self, backup: int, source: int,
                     rows: "List[Tuple[bytes, int, int]]") -> "List[bytes]":
        """The second step of a confirmation: (path, version, tag) are durable at their place in
        `backup`. Returns the paths that count from now on; the others are of a version that is no
        longer known.  In slices; all of them are durable when it returns."""
        counted = [path for some in in_batches(rows, APPLY_CHUNK)
                   for path in self._count_some(backup, source, some)]
        if counted:
            self.save_up()  # a lasting one, and it always changes something
        return counted

    def _count_some(self, backup: int, source: int,
                    rows: "List[Tuple[bytes, int, int]]") -> "List[bytes]":
        with self.write(lasting=False) as db:
            known = {row[0]: row[1:] for row in self.rows_among(
                "SELECT e.path, e.id, e.version, c.checked, e.size, e.mtime, "
                "EXISTS(SELECT 1 FROM copies o WHERE o.file=e.id AND o.state='o'), "
                "EXISTS(SELECT 1 FROM declines d WHERE d.file=e.id AND d.backup=c.backup) "
                "FROM entries e CROSS JOIN copies c ON c.file=e.id AND c.backup=? "
                "WHERE e.source=? AND e.kind='f' AND e.path AMONG",
                [row[0] for row in rows], backup, source)}
            counted = [(path, tag) + known[path] for path, version, tag in rows
                       if path in known and known[path][1] == known[path][2] == version]
            db.executemany("UPDATE copies SET state='k', tag=?, held_size=?, held_mtime=?, "
                           "path=NULL, expires=NULL, todo=todo&? "
                           "WHERE file=? AND backup=?",
                           [(tag, size, mtime, TODO_TOUCH, number, backup)
                            for _, tag, number, _, _, size, mtime, *_ in counted])
            db.executemany("DELETE FROM declines WHERE file=? AND backup=?",
                           [(number, backup) for _, _, number, *_, declined in counted if declined])
            numbers = [row[2] for row in counted]
            self._are_news(numbers)
            self.regroup(numbers)
            for _, _, number, *_, outdated, _ in counted:
                if outdated:
                    self._retire_outdated(number)
            if counted:
                db.execute("UPDATE backups SET fruitless=0 WHERE id=? AND fruitless>0", (backup,))
        return [row[0] for row in counted]

    # -- drops --

    def grant_drop(self, backup: int, source: "Dict[str, Any]",
                   paths: "List[bytes]") -> "List[bytes]":
        """Those of `paths` that `backup` may delete: N confirmed copies on N distinct hosts remain
        without it, of a content that our own file was read to have.

        The grant is committed before it is returned.  A caller that dies now still has the bytes:
        its sum differs from ours then, it reports everything, and the copy counts again.
        """
        granted = []
        with self.write() as db:
            for path in paths:
                row = self.one("SELECT e.id, g.id, g.key, g.n, g.k, g.files, g.bytes "
                               "FROM entries e JOIN groups g ON g.id=e.grp "
                               "WHERE e.source=? AND e.path=? AND e.doubt IS NULL "
                               "AND e.digest IS NOT NULL",
                               source["id"], path)
                if not row:
                    continue
                group = Group(row[1:], self.facts_of_backup)
                if group.members.get(backup) \
                        and group.copies_without(backup, self.host_of) >= source["replicas"]:
                    db.execute("DELETE FROM copies WHERE file=? AND backup=?", (row[0], backup))
                    self._are_news([row[0]])
                    self.regroup([row[0]])
                    granted.append(path)
        return granted


class Books(Ledger):
    """Everything that the server of one host knows, in one SQLite database: each of the classes
    above is one reason to open it.  Here is what backups tell of their copies and are told of them,
    and what the configuration says."""

    gone = False
    """Whether damaged books were closed and there are no new ones yet: their disk failed then."""

    def start_again(self, config: Config, why: str) -> None:
        """Damaged books are set aside; new ones are filled by the next scans and by what the
        backups report.  What it raises leaves them `gone`: to be called again."""
        with self.lock:
            with contextlib.suppress(sqlite3.Error):
                self.db.close()
            again, self.gone = self.gone, True
            if not again:
                set_database_aside(self.path, why)
            self._open()
            self.configure(config)
            self.gone = False

    # -- configuration --

    def configure(self, config: Config) -> None:
        """Take over what the configuration says about sources of this host and all backups."""
        with self.write() as db:
            again = dict(db.execute("SELECT name, id FROM sources WHERE active=0"))
            db.execute("UPDATE sources SET active=0")
            for source in config.sources_of(self.host):
                db.execute("INSERT OR IGNORE INTO sources(name) VALUES(?)", (source.name,))
                db.execute("UPDATE sources SET path=?, replicas=?, active=? WHERE name=?",
                           (source.path, source.replicas, int(source.name not in again),
                            source.name))
            before = dict((row[0], row[1:]) for row in db.execute(
                "SELECT id, host, configured, leaving FROM backups"))
            # one that comes back counts when it was heard
            db.execute("UPDATE backups SET lost=1 WHERE configured=0")
            db.execute("UPDATE backups SET configured=0")
            for backup in config.backups.values():
                db.execute("INSERT OR IGNORE INTO backups(name, heard) VALUES(?,?)",
                           (backup.name, self.up()))
                db.execute("UPDATE backups SET host=?, configured=1, leaving=? WHERE name=?",
                           (backup.host, int(backup.leaving), backup.name))
            self._forget_shapes()
            after = dict((row[0], row[1:])
                         for row in db.execute("SELECT id, host, configured, leaving FROM backups"))
            if any(after[number] != facts for number, facts in before.items()):
                self.recount_groups()
        for source in config.sources_of(self.host):
            if source.name in again:
                self._count_anew(again[source.name])

    def _count_anew(self, source: int) -> None:
        """A source is configured again: its copies may have been deleted meanwhile (`forget`).
        They count when the backups have reported them; until then nothing is copied again.  In
        slices, and it is active only after the last one: who is cut off begins again."""
        for (backup,) in self.rows("SELECT id FROM backups"):
            files = [0]
            while files:
                with self.write() as db:
                    files = [row[0] for row in self.rows(
                        "SELECT file FROM copies WHERE backup=? AND source=? LIMIT ?", backup,
                        source, APPLY_CHUNK)]
                    db.executemany("DELETE FROM copies WHERE file=? AND backup=?",
                                   [(file, backup) for file in files])
                    self.regroup(files)
                    if files:
                        self.set_meta("recovering:%d" % source, self.up() + RECOVERY_WAIT)
        with self.write() as db:
            db.execute("DELETE FROM caught_up WHERE source=?", (source,))
            db.execute("UPDATE sources SET active=1 WHERE id=?", (source,))

    # -- what a backup must hear --

    def todo(self, backup: int, source: int, kind: int, after: int) -> "List[Tuple[Any, ...]]":
        """A page of rows (cursor, path as the backup has it, tag, digest that a counted copy has,
        WANTED columns or Nones when retired)."""
        return self.rows(
            "SELECT c.file, COALESCE(c.path, e.path, g.path), c.tag, "
            "CASE c.state WHEN 'k' THEN e.digest END, %s "
            "FROM copies c LEFT JOIN entries e ON e.id=c.file LEFT JOIN gone g ON g.id=c.file "
            "WHERE c.backup=? AND c.source=? AND c.todo>0 AND c.todo&? AND c.file>? "
            "ORDER BY c.file LIMIT ?" % self.WANTED, backup, source, kind, after, PAGE)

    def todo_counts(self, backup: int, source: int) -> int:
        return self.one("SELECT COUNT(*) FROM (SELECT 1 FROM copies WHERE backup=? AND source=? "
                        "AND todo>0 LIMIT ?)",
                        backup, source, PAGE)[0]

    def done(self, backup: int, source: int, kind: int,
             rows: "List[Tuple[int, Optional[int]]]") -> None:
        """`backup` has done what it was told for (cursor, new tag or None): moved, touched or
        retired it."""
        with self.write() as db:
            for number, tag in rows:
                if kind == TODO_RETIRE:
                    if db.execute("DELETE FROM copies WHERE file=? AND backup=? AND state='r'",
                                  (number, backup)).rowcount:
                        self._after_retire(number)
                elif kind == TODO_MOVE:
                    # A copy that was never reported or confirmed has no tag, and gets none by being
                    # moved.
                    db.execute("UPDATE copies SET path=NULL, "
                               "tag=CASE WHEN tag IS NOT NULL THEN COALESCE(?, tag) END, "
                               "todo=todo&~? "
                               "WHERE file=? AND backup=?",
                               (tag, TODO_MOVE, number, backup))
                else:
                    db.execute("UPDATE copies SET todo=todo&~? WHERE file=? AND backup=?",
                               (kind, number, backup))

    def sum_of(self, backup: int, source: int) -> "Tuple[int, int, int]":
        """(files, bytes, sum of tags) that these books believe `backup` holds of a source."""
        row = self.one("SELECT files, bytes, tags FROM sums WHERE backup=? AND source=?", backup,
                       source)
        return (row[0], row[1], row[2]) if row else (0, 0, 0)

    # -- what a backup reports --

    def forget_copies(self, backup: int, source: int, paths: "List[bytes]") -> None:
        """`backup` says that it does not (or no longer) hold what the books say it has under these
        paths."""
        with self.write() as db:
            for path in paths:
                for (number,) in self.rows(
                        "SELECT file FROM copies WHERE backup=? AND source=? AND path=? "
                        "UNION SELECT c.file "
                        "FROM entries e CROSS JOIN copies c ON c.file=e.id AND c.backup=? "
                        "WHERE e.source=? AND e.path=? AND c.path IS NULL UNION SELECT c.file "
                        "FROM gone g CROSS JOIN copies c ON c.file=g.id AND c.backup=? "
                        "WHERE g.source=? AND g.path=? AND c.path IS NULL",
                        *(backup, source, path) * 3):
                    db.execute("DELETE FROM copies WHERE file=? AND backup=?", (number, backup))
                    self._after_retire(number)
                    self._are_news([number])
                    self.regroup([number])

    def _after_retire(self, number: int) -> None:
        if not self.db.execute("SELECT 1 FROM copies WHERE file=?", (number,)).fetchone():
            self.db.execute("DELETE FROM gone WHERE id=?", (number,))

    def start_report(self) -> int:
        serial = int(self.meta("report") or 0) + 1
        self.set_meta("report", serial)
        return serial

    def report(self, backup: int, source: "Dict[str, Any]", serial: int,
               rows: "List[Tuple[bytes, int, int, int]]") -> None:
        """Take over (path, size, mtime, tag) that `backup` holds.  What is not counted yet becomes
        an update to do: the backup confirms anew what has the present version's size and mtime, and
        fetches the rest."""
        for some in in_batches(rows, SLICE):
            with self.write():
                known = dict(self.rows_among("SELECT path, id FROM entries "
                                             "WHERE source=? AND kind='f' AND path AMONG",
                                             [row[0] for row in some], source["id"]))
                self._report_some(backup, source, serial, some, known)

    def _report_some(self, backup: int, source: "Dict[str, Any]", serial: int,
                     rows: "List[Tuple[bytes, int, int, int]]",
                     known: "Dict[bytes, int]") -> None:
        seen, new = [], []
        held = {row[0]: row[1:] for row in self.rows_among(
            "SELECT file, state, tag FROM copies WHERE backup=? AND file AMONG", known.values(),
            backup)}
        for path, size, mtime, tag in rows:
            number, moved = known.get(path), None
            if number is None:
                moved = self.one("SELECT c.file FROM copies c JOIN entries e ON e.id=c.file "
                                 "WHERE c.backup=? AND c.source=? AND c.todo&? AND c.path=?",
                                 backup, source["id"],
                                 TODO_MOVE, path)
                number = moved[0] if moved else self._gone_id(source["id"], path)
                held[number] = self.one("SELECT state, tag FROM copies WHERE file=? AND backup=?",
                                        number, backup)
            state, had = held.get(number) or (None, None)
            if state and had == tag and (state != "c" or moved):
                seen.append((serial, number, backup))
            else:
                new.append((number, backup, source["id"], "s" if path in known else "r", tag, size,
                            mtime,
                            self.up() + STALE_LEASE if path in known else None,
                            TODO_UPDATE if path in known else TODO_RETIRE, None if path in known
                            else path, serial))
        self.db.executemany("UPDATE copies SET seen=? WHERE file=? AND backup=?", seen)
        self.db.executemany(
            "INSERT INTO copies(file, backup, source, state, tag, held_size, held_mtime, expires, "
            "todo, path, seen) "
            "VALUES(?,?,?,?,?,?,?,?,?,?,?) "
            "ON CONFLICT(file, backup) DO UPDATE SET state=excluded.state, tag=excluded.tag, "
            "held_size=excluded.held_size, held_mtime=excluded.held_mtime, "
            "expires=excluded.expires, todo=excluded.todo, path=excluded.path, seen=excluded.seen",
            new)
        self.regroup(row[0] for row in new)

    def _gone_id(self, source: int, path: bytes) -> int:
        row = self.one("SELECT id FROM gone WHERE source=? AND path=?", source, path)
        if row:
            return row[0]
        # An id that no entry will ever have: AUTOINCREMENT never goes back.
        number = self.db.execute("INSERT INTO entries(source, path, kind) VALUES(?,?,'x')",
                                 (source, b"\0gone")).lastrowid
        self.db.execute("DELETE FROM entries WHERE id=?", (number,))
        self.db.execute("INSERT INTO gone VALUES(?,?,?)", (number, source, path))
        return number

    def end_report(self, backup: int, source: "Dict[str, Any]", serial: int) -> None:
        """The report is complete: what was not in it is not there.  A source of which these books
        have never counted a copy, and that has less than half of what is reported, is held."""
        after = 0
        while True:  # who is cut off meanwhile has another sum, and reports again
            page = self.rows("SELECT file, tag IS NOT NULL AND seen IS NOT ? FROM copies "
                             "WHERE backup=? AND source=? AND file>? ORDER BY file LIMIT ?",
                             serial, backup, source["id"], after, APPLY_CHUNK)
            for some in in_batches((number for number, missing in page if missing), SLICE):
                with self.write() as db:
                    for number in some:
                        db.execute("DELETE FROM copies WHERE file=? AND backup=?", (number, backup))
                        self._after_retire(number)
                    self.regroup(some)
            if len(page) < APPLY_CHUNK:
                break
            after = page[-1][0]
        with self.write():
            counted = self.one("SELECT COALESCE(SUM(files), 0) FROM groups WHERE source=? AND k>0",
                               source["id"])[0]
            if source["state"] != "ok" or counted or self.meta("accepted:" + source["name"]):
                return
            bad, total = self.mismatch(source["id"])  # reads all that is known of copies
            empty = total and bad == total and not self.file_counts(source["id"])[0]
            if empty or total >= HELD_SHARE_OF and bad * 2 > total:
                self.finish_scan(source["name"], state="held", cause="report",
                                 reason="backups hold %s of it, and %s of these are not in it like "
                                        "that now"
                                 % (count_of(total, "file"), format(bad, ",")))
                self.list_held(source["id"], "report")

    def recovering(self, source: int) -> bool:
        """Whether these books are new and some backup has not yet told them what it holds: until
        then nobody is given files to copy that another may have.  For RECOVERY_WAIT at most: a host
        may be down."""
        until = self.meta("recovering:%d" % source)
        if until is None:
            return False
        waiting = self.one("SELECT 1 FROM backups b "
                           "WHERE configured=1 AND lost=0 AND host<>? "
                           "AND NOT EXISTS(SELECT 1 FROM caught_up c WHERE c.backup=b.id AND "
                           "c.source=?) "
                           "LIMIT 1",
                           self.host, source)
        if waiting and until > self.up():
            return True
        with self.write() as db:
            db.execute("DELETE FROM meta WHERE key=?", ("recovering:%d" % source,))
        return False

    def catch_up(self, backup: int, source: int) -> None:
        with self.write() as db:
            db.execute("INSERT OR IGNORE INTO caught_up VALUES(?,?)", (backup, source))


# ==== 8. The scanner, and what the server reads of its own files ==================================

SCAN_TABLES = """
CREATE TEMP TABLE found(
    path BLOB PRIMARY KEY, above BLOB, known INTEGER, how TEXT, doubt INTEGER, kind TEXT,
    size INTEGER, mtime INTEGER,
    mode INTEGER, uid INTEGER, gid INTEGER, ino INTEGER, ctime INTEGER, nlink INTEGER, target BLOB,
    blocked TEXT, xattrs TEXT) WITHOUT ROWID;
CREATE TEMP TABLE lost(
    id INTEGER PRIMARY KEY, path BLOB, kind TEXT, size INTEGER, mtime INTEGER, ino INTEGER,
    replaced INTEGER);
CREATE INDEX temp.lost_ino ON lost(ino);
CREATE INDEX temp.lost_path ON lost(path);
CREATE TEMP TABLE moves(lost INTEGER PRIMARY KEY, path BLOB UNIQUE);
"""
"""What one scan found to be different.  how: new | replaced (another file) | content | metadata |
attributes | silent.  doubt: the content is presumed to be the same.  lost: entries that are gone,
and those that were replaced."""

REPRESENTABLE = 1 << 62
"""Times in nanoseconds have to be below: so far they travel (until 2116)."""

FOUND_COLUMNS = ("path", "above", "known", "how", "doubt", "kind", "size", "mtime", "mode", "uid",
                 "gid", "ino", "ctime", "nlink",
                 "target", "blocked", "xattrs")
_FOUND = operator.itemgetter(*FOUND_COLUMNS)


class Held(CBackupError):
    """A scan's verdict: nothing may change.  `cause` is one word, for the books."""

    def __init__(self, cause: str, text: str) -> None:
        self.cause = cause
        super().__init__(text)


UNACCEPTABLE = ("gone", "restore", "paths")
"""Causes of which `accept` is not the way out: nothing is there that could be accepted."""


def held_config_text(hosts: "List[str]", removes: str) -> str:
    return "%s held back on %s: it removes %s; if that is right: cbackup.pyz accept config; if " \
        "not: correct cbackup.conf on any machine" % ("a changed configuration is", ", ".join(hosts), removes)


def held_advice(name: str, facts: "Dict[str, Any]") -> str:
    """What to do about a held source: `facts` have its reason and cause."""
    if facts.get("cause") == "gone":
        return "%s If the disk is dead: put in another (at another path: change its line in " \
            "cbackup.conf), then: cbackup.pyz restore %s" % (facts["reason"], name)
    if facts.get("cause") in UNACCEPTABLE:
        return str(facts["reason"])
    return "%s; if that is right: cbackup.pyz accept %s; if not, this puts back what was there: " \
        "cbackup.pyz restore %s --force" % (facts["reason"], name, name)


_NAMED_CLASS = re.compile(r"\[:([^\]]*):\]")
_NAMED_CLASSES = {
    "alnum": "0-9A-Za-z", "alpha": "A-Za-z", "blank": " \\t", "cntrl": "\\x00-\\x1f\\x7f",
    "digit": "0-9", "graph": "!-~", "lower": "a-z", "print": " -~", "punct": "!-/:-@\\[-`{-~",
    "space": " \\t\\n\\r\\f\\v", "upper": "A-Z", "xdigit": "0-9A-Fa-f"}


def _class_regex(pattern: str, at: int) -> "Optional[Tuple[str, int]]":
    """(regular expression, where it ends) of the `[...]` that begins at `at`; None when it is none,
    and matches nothing."""
    negated = pattern[at + 1:at + 2] in ("!", "^")
    begin = at = at + 1 + negated
    items: "List[str]" = []
    before = ""  # what a `-` would make a range with
    while at == begin or pattern[at:at + 1] != "]":
        char, named = pattern[at:at + 1], _NAMED_CLASS.match(pattern, at)
        ranged = char == "-" and before and pattern[at + 1:at + 2] not in ("", "]")
        if named:
            if named.group(1) not in _NAMED_CLASSES:
                return None
            items.append(_NAMED_CLASSES[named.group(1)])
            before, at = "", named.end()
            continue
        at += bool(ranged)
        at += pattern[at:at + 1] == "\\"
        char = pattern[at:at + 1]
        if not char:
            return None
        if not ranged:
            items.append(re.escape(char))
        elif before <= char:
            items.append("%s-%s" % (re.escape(before), re.escape(char)))
        before = "" if ranged else char
        at += 1
    if negated:
        return "[^/%s]" % "".join(items), at + 1
    return ("(?!/)[%s]" % "".join(items) if items else "(?!)"), at + 1


def _glob_regex(pattern: str) -> "Optional[str]":
    """A pattern of gitignore's, without its `!` and its last `/`, as a regular expression; None: it
    can match nothing."""
    out: "List[str]" = []
    at = 0
    while at < len(pattern):
        char, rest = pattern[at], pattern[at:].lstrip("*")
        step = 1
        if char == "*":
            step = len(pattern) - at - len(rest)
            deep = step > 1 and pattern[at - 1:at] in ("", "/") and rest[:1] in ("", "/")
            out.append("[^/]*" if not deep else "(?:.*/)?" if rest else ".*")
            if deep and rest:
                step += 1
                if out[-2:] == out[-1:] * 2:  # the same again says nothing new, and costs
                    out.pop()
        elif char == "?":
            out.append("[^/]")
        elif char == "[":
            found = _class_regex(pattern, at)
            if found is None:
                return None
            out.append(found[0])
            step = found[1] - at
        elif char == "\\":
            if at + 1 == len(pattern):
                return None
            out.append(re.escape(pattern[at + 1]))
            step = 2
        else:
            out.append(re.escape(char))
        at += step
    return "".join(out)


def compile_excludes(patterns: "Iterable[str]") -> "Callable[[bytes, bool], bool]":
    """A test (path below the source, whether it is a directory) -> excluded, by the rules of
    gitignore.

    Of several patterns that match, the last one decides.  The test is for one entry of a directory
    that is not excluded itself: what is below an excluded one must not be asked for, or a `!` would
    bring it back.
    """
    rules = []
    for pattern in reversed(list(patterns)):
        keep = pattern.startswith("!")
        body = pattern[1:] if keep else pattern
        only_directories = body.endswith("/")
        body = body[:-1] if only_directories else body
        anchored = "/" in body
        regex = _glob_regex(body[1:] if body.startswith("/") else body)
        if regex:
            rules.append((re.compile(regex + r"\Z", re.S), anchored, only_directories, not keep))

    def excluded(path: bytes, directory: bool) -> bool:
        whole = as_text(path)
        name = whole.rpartition("/")[2]
        for regex, anchored, only_directories, verdict in rules:
            if (directory or not only_directories) and regex.match(whole if anchored else name):
                return verdict
        return False
    return excluded if rules else lambda path, directory: False


CACHE_TAG, CACHE_SIGNATURE = b"CACHEDIR.TAG", b"Signature: 8a477f597d28d172789f06886806bc55"
"""The file that marks a directory as a cache, and how it begins (bford.info/cachedir)."""


def restore_unfinished(root: bytes) -> bool:
    """Whether a source is just being restored, or was, and not everything came back."""
    return os.path.exists(os.path.join(root, RESTORE_DIR, RESTORE_MARK))


class LeftOut:
    """What of a source is in no catalog: what its line says, and what is cbackup's own there."""

    def __init__(self, source: Source) -> None:
        self.root, self.caches = os.fsencode(source.path), source.exclude_caches
        self._patterns, self._excluded = source.exclude, compile_excludes(source.exclude)

    def entry(self, path: bytes, directory: bool) -> bool:
        """Whether an entry of a directory that is not left out itself is left out."""
        return path == RESTORE_DIR or path.startswith(BEFORE_RESTORE) and b"/" not in path \
            or self._excluded(path, directory)

    def is_all_of(self, directory: bytes) -> bool:
        """Whether for each entry of a directory it is known without a look at its name that it is
        not left out by `entry`."""
        return directory != b"" and not self._patterns

    def is_cache(self, directory: bytes) -> bool:
        """Whether of a directory nothing but its CACHE_TAG is wanted.  Never of the root, which the
        line names itself."""
        if not self.caches or not directory:
            return False
        try:
            tag = os.open(os.path.join(self.root, directory, CACHE_TAG),
                          os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        with os.fdopen(tag, "rb") as stream, contextlib.suppress(OSError):
            return stream.read(len(CACHE_SIGNATURE)) == CACHE_SIGNATURE
        return False

    def those_in(self, paths: "Iterable[bytes]") -> "Iterator[bytes]":
        """Those of many files, the best sorted, that are not left out: neither themselves, nor with
        a directory above them."""
        above, out, caches = b"", False, []
        for path in paths:
            directory = path.rpartition(b"/")[0]
            if directory != above:
                above = directory
                parts = above.split(b"/") if above else []
                above_it = [b"/".join(parts[:count]) for count in range(1, len(parts) + 1)]
                out = any(self.entry(one, True) for one in above_it)
                caches = [one + b"/" + CACHE_TAG for one in above_it if self.is_cache(one)]
            if not out and not self.entry(path, False) \
                    and (not caches or caches == [path]):
                yield path


class Findings:
    """What one scan found to be different from the books, in tables of a connection of its own that
    only reads the books: nobody waits while all of it is gone through.  May touch: these tables,
    which end with it."""

    def __init__(self, books: Books) -> None:
        self._db = books.reader()
        self._db.executescript(SCAN_TABLES)

    def close(self) -> None:
        self._db.close()

    def _many(self, sql: str, rows: "List[Tuple[Any, ...]]") -> None:
        self._db.execute("BEGIN")
        self._db.executemany(sql, rows)
        self._db.execute("COMMIT")

    def _count(self, sql: str) -> int:
        return self._db.execute(sql).fetchone()[0]

    def _pages(self, sql: str) -> "Iterator[Tuple[Any, ...]]":
        """The rows of a query that has the first column of the row before and the number of rows as
        its parameters."""
        after: Any = -1  # before every path, too
        while True:
            page = self._db.execute(sql, (after, APPLY_CHUNK)).fetchall()
            yield from page
            if len(page) < APPLY_CHUNK:
                return
            after = page[-1][0]

    # -- what the walk finds --

    def children(self, parent: int) -> "Dict[bytes, Tuple[Any, ...]]":
        """The entries that the books have of one directory: path -> what `entry_at` says.  One may
        be large, and nobody waits meanwhile."""
        return {row[0]: row[1:] for row in self._db.execute(
            "SELECT path, %s FROM entries WHERE parent=?" % Books.ENTRY, (parent,))}

    def enter(self, rows: "List[Dict[str, Any]]") -> None:
        self._many("INSERT OR REPLACE INTO found VALUES(%s)" % ",".join("?" * len(FOUND_COLUMNS)),
                   list(map(_FOUND, rows)))
        self._many("INSERT OR REPLACE INTO lost SELECT id, path, kind, size, mtime, ino, 1 "
                   "FROM entries WHERE id=?",
                   [(row["known"],) for row in rows if row["how"] == "replaced"])

    def lose(self, source: int, known: "List[Tuple[bytes, int, str]]") -> None:
        """(path, number, kind) of entries of the books that are no longer there, with all that was
        below them."""
        into = "INSERT OR REPLACE INTO lost SELECT id, path, kind, size, mtime, ino, 0 " \
            "FROM entries "
        self._many(into + "WHERE id=?", [(number,) for _, number, _ in known])
        self._many(into + "WHERE source=? AND path>? AND path<?",
                   [(source, path + b"/", path + b"0") for path, _, kind in known if kind == "d"])

    def match_moves(self) -> None:
        """A file that is lost under one path and found under another, with inode, size and mtime,
        was moved."""
        self._db.execute(
            "INSERT OR IGNORE INTO moves SELECT l.id, f.path "
            "FROM found f JOIN lost l ON l.ino=f.ino AND l.size=f.size AND l.mtime=f.mtime "
            "WHERE f.kind='f' AND l.kind='f' AND f.how IN ('new', 'replaced') AND f.path<>l.path "
            "ORDER BY f.path, l.path")

    # -- how much it is --

    STAYS = "NOT EXISTS(SELECT 1 FROM moves m WHERE m.lost=%s)"
    GONE = "FROM lost WHERE kind='f' AND replaced=0 AND " + STAYS % "lost.id"
    REPLACED = "how='replaced' AND " + STAYS % "found.known"

    def gone(self) -> int:
        """Files that are nowhere now."""
        return self._count("SELECT COUNT(*) " + self.GONE)

    def changed(self) -> int:
        """Files that have another content, or that another file took the place of."""
        return self._count("SELECT COUNT(*) FROM found WHERE " + self.REPLACED) \
            + self._count("SELECT COUNT(*) FROM found WHERE kind='f' AND how='content'")

    def any_file(self) -> bool:
        return self._count("SELECT EXISTS(SELECT 1 FROM found WHERE kind='f')") > 0

    def gone_paths(self) -> "Iterator[bytes]":
        """The paths of the files that are gone, by path."""
        return (path for (path,) in self._pages(
            "SELECT path " + self.GONE + " AND path>? ORDER BY path LIMIT ?"))

    def changed_paths(self) -> "Iterator[bytes]":
        return (path for (path,) in self._pages(
            "SELECT path FROM found WHERE kind='f' AND (how='content' OR " + self.REPLACED
            + ") AND path>? ORDER BY path LIMIT ?"))

    # -- what is to be done --

    def lost(self) -> "Iterator[Tuple[int, bytes, str]]":
        """(number, path, kind) of entries that are to be buried."""
        return self._pages(  # type: ignore
            "SELECT id, path, kind FROM lost l WHERE " + self.STAYS % "l.id"
            + " AND (replaced=0 OR EXISTS(SELECT 1 FROM moves m WHERE m.path=l.path)) "
            "AND id>? ORDER BY id LIMIT ?")

    MOVES = "SELECT m.path, m.lost, l.path FROM moves m JOIN lost l ON l.id=m.lost WHERE %s (" \
        "EXISTS(SELECT 1 FROM lost p JOIN moves o ON o.lost=p.id WHERE p.path=m.path) " \
        "OR EXISTS(SELECT 1 FROM moves o WHERE o.path=l.path) " \
        "OR EXISTS(SELECT 1 FROM found f WHERE f.path=l.path AND f.kind='d')) " \
        "AND m.path>? ORDER BY m.path LIMIT ?"

    def moves(self, entangled: bool) -> "Iterator[Tuple[bytes, int, bytes]]":
        """(new path, number, old path).  entangled: of swaps, chains, and where a directory is to
        be made; or of the others."""
        return self._pages(self.MOVES % ("" if entangled else "NOT"))  # type: ignore

    def is_moved(self, number: int) -> bool:
        return self._db.execute("SELECT 1 FROM moves WHERE lost=?",
                                (number,)).fetchone() is not None

    def _rows(self, condition: str) -> "Iterator[Dict[str, Any]]":
        """By path: a directory comes before what is in it."""
        return (dict(zip(FOUND_COLUMNS, row)) for row in self._pages(
            "SELECT %s FROM found WHERE %s AND path>? ORDER BY path LIMIT ?"
            % (", ".join(FOUND_COLUMNS), condition)))

    def new_directories(self) -> "Iterator[Dict[str, Any]]":
        return self._rows("kind='d' AND how='new'")

    def rest(self) -> "Iterator[Dict[str, Any]]":
        """New files and symlinks, and all changes in place."""
        return self._rows("NOT (kind='d' AND how='new') "
                          "AND NOT EXISTS(SELECT 1 FROM moves m WHERE m.path=found.path)")

    def at(self, path: bytes) -> "Dict[str, Any]":
        row = self._db.execute("SELECT %s FROM found WHERE path=?" % ", ".join(FOUND_COLUMNS),
                               (path,)).fetchone()
        return dict(zip(FOUND_COLUMNS, row))


class Scan:
    """One look at one source: compares the tree with the books, judges, and applies what is
    different.

    Reads no contents.  Memory is that of the largest single directory.  Raises Held when the
    difference is one that must not reach the backups by itself.
    """

    def __init__(self, books: Books, source: Source, skip: "Iterable[str]" = (),
                 pace: "Optional[Pace]" = None,
                 consent: bool = False) -> None:
        """consent: somebody said `accept`.  It is for what this scan finds, and ends with it,
        however it ends."""
        self.books, self.source, self.consent = books, source, consent
        self.found = Findings(books)
        self.root = os.fsencode(source.path)
        self.left_out = LeftOut(source)
        self.xattrs = source.xattrs and hasattr(os, "listxattr")
        self.pace = pace or Pace(None)
        self.special = 0
        self.problems: "List[str]" = []
        self.problem_count = 0
        self.skip = set()
        for path in skip:
            with contextlib.suppress(OSError):
                info = os.stat(path)
                self.skip.add((info.st_dev, info.st_ino))

    def close(self) -> None:
        self.found.close()

    def run(self) -> bool:
        """Scan and apply; once.  Returns whether anything was different."""
        row = self.books.source_row(self.source.name)
        self.row = row
        self.known_files = self.books.file_counts(row["id"])[0]
        self._look_at_root()
        self._walk()
        self.found.match_moves()
        if not self.consent:
            self._judge()
        changed = self._apply()
        self._finish(changed)
        return changed

    def _look_at_root(self) -> None:
        try:
            info = os.stat(self.root)
            names = os.listdir(self.root)
        except OSError as error:
            raise Held("gone", "%s cannot be read (%s): is its disk mounted?"
                       % (self.source.path, reason_of(error)))
        if RESTORE_DIR in names and restore_unfinished(self.root):
            raise Held("restore",
                       "a restore into %s is not finished: run it again until it says that "
                       "everything is back, or delete %s to go on without what is missing"
                       % (self.source.path, os.path.join(self.source.path, RESTORE_DIR.decode())))
        self.device, self.fsid = info.st_dev, _fsid(self.root)
        self.root_info = info

    # -- the walk --

    def _walk(self) -> None:
        root_row = self._facts(b"", b"", self.root_info, "d")
        known = self.books.entry_at(self.row["id"], b"")
        if self.source.xattrs != self.xattrs:
            self._problem(b"", "its line says `xattrs`, and on this system Python cannot read "
                          "extended attributes")
        self._enter([self._compare(root_row, known)])
        pending: "List[Tuple[bytes, Optional[int]]]" = [(b"", known[0] if known else None)]
        while pending:
            directory, number = pending.pop()
            pending += self._walk_directory(directory, number)

    def _walk_directory(self, directory: bytes,
                        number: "Optional[int]") -> "List[Tuple[bytes, Optional[int]]]":
        """Compare one directory with the books; returns its subdirectories that are to be
        walked."""
        known = self.found.children(number) if number is not None else {}
        try:
            entries = os.scandir(os.path.join(self.root, directory) if directory else self.root)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._problem(directory, reason_of(error))
            return []
        different, below = [], []
        cache, prefix = self.left_out.is_cache(directory), directory + b"/" if directory else b""
        by_name = not self.left_out.is_all_of(directory)
        try:
            with entries:
                for entry in entries:
                    if cache and entry.name != CACHE_TAG:
                        continue
                    path = prefix + entry.name
                    info = self._look_at(entry, path, known, by_name)
                    if info is None:
                        continue
                    if path in known and self._is_as_it_was(info, known[path]):
                        del known[path]
                        self.pace.spent(512)
                        continue
                    row = self._row_of(path, directory, info, known)
                    if row is None:
                        continue
                    old = known.pop(path, None)
                    if row["kind"] == "d" and row["walk"]:
                        below.append((path, old[0] if old and old[1] == "d" else None))
                    different.append(self._compare(row, old))
                    self.pace.spent(512)
        except OSError as error:
            self._problem(directory, reason_of(error))
            return []
        self._enter(different)
        if known:
            self._lose(known)
        return below

    def _look_at(self, entry: "os.DirEntry[bytes]", path: bytes,
                 known: "Dict[bytes, Tuple[Any, ...]]",
                 by_name: bool) -> "Optional[os.stat_result]":
        """The stat of one directory entry; None when it is not for the catalog.  by_name: its name
        may say that it is left out."""
        try:
            if by_name and self.left_out.entry(path, entry.is_dir(follow_symlinks=False)):
                return None
            info = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._problem(path, reason_of(error))
            known.pop(path, None)
            return None
        return None if (info.st_dev, info.st_ino) in self.skip else info

    def _is_as_it_was(self, info: os.stat_result, old: "Tuple[Any, ...]") -> bool:
        """Whether an entry is a file of which nothing is different or to be said: the shortest
        way for most of what a scan looks at."""
        return old[1:9] == (
            "f", info.st_size, info.st_mtime_ns, info.st_mode & 0o7777, info.st_uid, info.st_gid,
            info.st_ino, info.st_ctime_ns) and old[11] is None \
            and old[12] == (0 if self.xattrs else None) and stat.S_ISREG(info.st_mode)

    def _row_of(self, path: bytes, directory: bytes, info: os.stat_result,
                known: "Dict[bytes, Tuple[Any, ...]]") -> "Optional[Dict[str, Any]]":
        """The facts of one directory entry; None when it is not for the catalog."""
        if not (-REPRESENTABLE < info.st_mtime_ns < REPRESENTABLE
                and -REPRESENTABLE < info.st_ctime_ns < REPRESENTABLE) or info.st_ino >> 63:
            self._problem(path, "its time cannot be represented (%d s since 1970)" % info.st_mtime
                          if info.st_ino >> 63 == 0
                          else "its inode number cannot be represented (%d)" % info.st_ino)
            known.pop(path, None)
            return None
        if stat.S_ISDIR(info.st_mode):
            row = self._facts(path, directory, info, "d")
            row["walk"] = info.st_dev == self.device
            return row
        if stat.S_ISREG(info.st_mode):
            return self._facts(path, directory, info, "f")
        if stat.S_ISLNK(info.st_mode):
            return self._facts(path, directory, info, "l")
        self.special += 1
        return None

    def _facts(self, path: bytes, above: bytes, info: os.stat_result,
               kind: str) -> "Dict[str, Any]":
        return {"path": path, "above": above, "kind": kind, "size": info.st_size if kind == "f"
                else 0,
                "mtime": info.st_mtime_ns, "mode": stat.S_IMODE(info.st_mode), "uid": info.st_uid,
                "gid": info.st_gid,
                "ino": info.st_ino, "ctime": info.st_ctime_ns, "nlink": info.st_nlink if kind == "f"
                else 1,
                "target": None, "blocked": None, "xattrs": None,
                "fresh": self.xattrs and is_fresh(info), "known": None, "how": "new", "doubt": 0}

    def _compare(self, row: "Dict[str, Any]",
                 old: "Optional[Tuple[Any, ...]]") -> "Optional[Dict[str, Any]]":
        """`row` with `known` and `how` filled in; None when nothing is different."""
        full = os.path.join(self.root, row["path"]) if row["path"] else self.root
        if old is None or old[1] != row["kind"]:
            if old is not None:
                self._lose({row["path"]: old})
            self._read_more(row, full)
            return row
        number, _, size, mtime, mode, uid, gid, ino, ctime, nlink, target, blocked, xattrs = old
        same_owner = (mode, uid, gid) == (row["mode"], row["uid"], row["gid"])
        if same_owner and (size, mtime, ino, ctime) == (row["size"], row["mtime"], row["ino"],
                                                        row["ctime"]) \
                and blocked in (None, ROTTEN) and xattrs in ((0, 1) if self.xattrs else (None,)):
            if blocked:
                self._problem(row["path"],
                              "has rotted: its content changed, its size and times did not; bring "
                              "it back with `restore`, or `touch` it if it is right")
            if xattrs:
                self._name_left_out(row["path"], self.books.xattrs_of(number))
            return None
        row["known"] = number
        self._read_more(row, full)
        if row["kind"] == "d":
            row["how"] = "silent" if same_owner and mtime == row["mtime"] else "metadata"
        elif row["kind"] == "l":
            row["how"] = "silent" if same_owner and (mtime,
                                                     target) == (row["mtime"],
                                                                 row["target"]) else "content"
        else:
            row["how"] = self._file_change(row, old, same_owner)
        if row["how"] != "silent":
            return row
        return self._with_attributes(row, (ino, ctime, nlink, blocked), xattrs is not None)

    def _with_attributes(self, row: "Dict[str, Any]", old: "Tuple[Any, ...]", had: bool,
                         ) -> "Optional[Dict[str, Any]]":
        """A row that is as it was, but maybe for its extended attributes.  old: (inode, ctime,
        links, blocked); None when these are the same, too.  had: the books have attributes."""
        before = self.books.xattrs_of(row["known"]) if had else None
        if (before or "{}").strip() != (row["xattrs"] or "{}").strip():
            row["how"] = "attributes"
        elif before == row["xattrs"] and old == tuple(
                row[key] for key in ("ino", "ctime", "nlink", "blocked")):
            return None
        return row

    def _file_change(self, row: "Dict[str, Any]", old: "Tuple[Any, ...]", same_owner: bool) -> str:
        """What became of a known file.  The same size and time at the same path is presumed to be
        the same content, also in another inode: a package that was installed again, a disk that was
        replaced.  With the same ctime besides it is known to be: file systems without inodes of
        their own number them anew at each mount."""
        _, _, size, mtime, _, _, _, ino, ctime, nlink, _, blocked, _ = old
        if (size, mtime) != (row["size"], row["mtime"]):
            return "replaced" if ino != row["ino"] and ctime != row["ctime"] else "content"
        row["doubt"] = int(ctime != row["ctime"])
        return "silent" if same_owner and blocked == row["blocked"] and nlink == row["nlink"] \
            else "metadata"

    def _read_more(self, row: "Dict[str, Any]", full: bytes) -> None:
        if row["kind"] == "l":
            try:
                row["target"] = os.readlink(full)
            except OSError as error:
                # in no catalog, and looked at again by the next scan
                row["target"], row["blocked"] = b"", "unreadable"
                self._problem(row["path"], reason_of(error))
        elif row["kind"] == "f" and not os.access(full, os.R_OK):
            row["blocked"] = "unreadable"
            self._problem(row["path"], "cannot be read by the server")
        if self.xattrs:
            row["xattrs"] = self._read_xattrs(row, full)
            self._name_left_out(row["path"], row["xattrs"])

    def _read_xattrs(self, row: "Dict[str, Any]", full: bytes) -> str:
        """The extended attributes of an entry, as the books have them; those that cannot be read,
        or are too much, without a value."""
        found: "Dict[str, Optional[str]]" = {}
        size, again = 0, row["fresh"]
        try:
            for name in sorted(list_xattrs(full, follow=False)):
                value = found[name] = None
                with contextlib.suppress(OSError):
                    value = os.getxattr(full, name, follow_symlinks=False)
                size += len(os.fsencode(name)) + len(value or b"")
                if value is not None and size <= XATTRS_LIMIT:
                    found[name] = base64.b64encode(value).decode()
        except OSError as error:
            again = True
            self._problem(row["path"], "extended attributes: %s" % reason_of(error))
        return " " * again + json.dumps(found, sort_keys=True, separators=(",", ":"))

    def _name_left_out(self, path: bytes, xattrs: "Optional[str]") -> None:
        lacking = [name for name, value in json.loads(xattrs or "{}").items() if value is None]
        if lacking:
            self._problem(path, "extended attributes that cannot be read, or are more than %s "
                          "together: %s" % (format_size(XATTRS_LIMIT), ", ".join(
                              shown(os.fsencode(name)) for name in lacking)))

    def _problem(self, path: bytes, why: str) -> None:
        self.problem_count += 1
        if len(self.problems) < 20:
            self.problems.append("%s: %s" % (shown(path) or ".", why))

    def _enter(self, rows: "List[Optional[Dict[str, Any]]]") -> None:
        different = [row for row in rows if row is not None]
        if different:
            self.found.enter(different)

    def _lose(self, known: "Dict[bytes, Tuple[Any, ...]]") -> None:
        self.found.lose(self.row["id"], [(path, old[0], old[1]) for path, old in known.items()])

    # -- the verdict --

    def _judge(self) -> None:
        gone, changed = self.found.gone(), self.found.changed()
        path, known = self.source.path, self.known_files
        elsewhere = self.row["device"] is not None and self.row["device"] != self.device \
            and (self.row["fsid"] != self.fsid or not self.fsid)
        if known and gone == known and not self.found.any_file():
            left_out = self._left_out(gone)
            why = "`exclude` on its line leaves out everything in %s" if left_out == known \
                else "%s is empty"
            raise Held("empty", why % path + "; it had " + count_of(known, "file"))
        if elsewhere and gone + changed:
            raise Held("device",
                       "%s is on another file system than before, and %s of its %s are gone or "
                       "different there"
                       % (path, format(gone + changed, ","), count_of(known, "file")))
        if known >= HELD_SHARE_OF and (gone + changed) * 2 > known:
            left_out = self._left_out(gone)
            words = "%s are left out now by `exclude` on its line, " % format(left_out, ",")
            raise Held("mass", "of the %s in %s, %s%s are gone and %s have changed since the last "
                               "look" % (count_of(known, "file"), path, words if left_out else "",
                                         format(gone - left_out, ","), format(changed, ",")))

    def _left_out(self, gone: int) -> int:
        """How many of the files that are gone from the catalog are what the source's line leaves
        out."""
        return gone - sum(1 for _ in self.left_out.those_in(self.found.gone_paths()))

    def keep_list(self, held: bool) -> None:
        """Have the books keep what was found, so that it can be seen what `accept` would let
        through; or forget it, unless something else holds the source."""
        number = self.row["id"]
        if not held:
            row = self.books.source_row(self.source.name)
            if row["state"] == "held" or self.books.held_page(number, b"", 1):
                self.books.list_held(number, row["cause"] if row["state"] == "held" else None)
            return
        gone = itertools.islice(self.found.gone_paths(), HELD_FILES)
        changed = itertools.islice(self.found.changed_paths(), HELD_FILES)
        self.books.keep_held(number, [(path, "gone") for path in gone]
                             + [(path, "changed") for path in changed])

    # -- applying --

    def _parent_id(self, row: "Dict[str, Any]") -> int:
        if row["path"] == b"":
            return 0
        if self._parent_known[0] != row["above"]:
            number = self.books.directory_id(self.row["id"], row["above"])
            self._parent_known = (row["above"], number or 0)
        return self._parent_known[1]

    @contextlib.contextmanager
    def _slice(self) -> "Iterator[None]":
        """One transaction.  What claims and reports did since the one before concerns other
        columns; the generation may have moved on."""
        with self.books.write():
            self.row = self.books.source_row(self.source.name)
            yield

    def _apply(self) -> bool:
        """In short transactions: each of them is true by itself, and the next scan finds the
        rest."""
        self._parent_known: "Tuple[Optional[bytes], int]" = (None, 0)
        different = False
        for lost in in_batches(self.found.lost(), SLICE):
            with self._slice():
                for number, path, kind in lost:
                    self.books.bury(self.row, number, path, kind)
            different = True
        entangled = list(self.found.moves(entangled=True))
        directories = self.found.new_directories()
        if entangled:  # all at once
            with self._slice():
                self._lift(entangled)
                self._make(directories)
                self._settle(entangled)
        for some in in_batches(directories, SLICE):
            with self._slice():
                self._make(some)
            different = True
        for moved in in_batches(self.found.moves(entangled=False), SLICE):
            with self._slice():
                self._lift(moved)
                self._settle(moved)
            different = True
        test_point("scan-half")
        return self._apply_rest() or different or bool(entangled)

    def _make(self, directories: "Iterable[Dict[str, Any]]") -> None:
        """One by one: what is in it wants its number."""
        for row in directories:
            self.books.add_entries(self.row, [(row, self._parent_id(row))])
        self._parent_known = (None, 0)

    def _lift(self, moved: "List[Tuple[bytes, int, bytes]]") -> None:
        """First half of moves: (new path, number, old path) of files that are elsewhere now."""
        for _, number, _ in moved:
            self.books.lift(number)

    def _settle(self, moved: "List[Tuple[bytes, int, bytes]]") -> None:
        for path, number, old in moved:
            row = self.found.at(path)
            self.books.settle_move(self.row, number, old, row, self._parent_id(row))

    def _apply_rest(self) -> bool:
        """New files and symlinks and all changes in place."""
        different = False
        for some in in_batches(self.found.rest(), APPLY_CHUNK):
            new = []
            with self._slice():
                for row in some:
                    different = different or row["how"] != "silent"
                    if self._is_new(row):
                        new.append((row, self._parent_id(row)))
                    else:
                        self.books.change_entry(self.row, row["known"], row,
                                                "content" if row["how"] == "replaced"
                                                else row["how"])
                self.books.add_entries(self.row, new)
        return different

    def _is_new(self, row: "Dict[str, Any]") -> bool:
        """Whether a path needs an entry: also when that which it had goes elsewhere with a file
        that was moved."""
        return row["how"] == "new" or row["how"] == "replaced" and self.found.is_moved(row["known"])

    def _finish(self, changed: bool) -> None:
        """The scan's own facts; what others than a scan had held stays held until they say
        otherwise, or with consent."""
        books, row = self.books, self.row
        facts: "Dict[str, Any]" = {
            "device": self.device, "fsid": self.fsid, "scanned": clock.now(),
            "special": self.special,
            "problems": json.dumps({"count": self.problem_count, "some": self.problems})}
        with books.write():
            if changed:
                books.note_change(row["id"])
            if self.consent:
                # these books need not ask again what backups report
                books.set_meta("accepted:" + self.source.name, 1)
                books.settle_others(row, 0, consent=True)
            elif row["state"] == "held" and row["cause"] == "report":
                bad, total = books.mismatch(row["id"])
                held = bad * 2 > total
            else:
                held = row["state"] == "held" and row["cause"] == "bytes" \
                    and books.mostly_other(row["id"])
            if self.consent or not held:
                facts.update(state="ok", cause=None, reason=None)
            books.finish_scan(self.source.name, **facts)


def _fsid(path: bytes) -> int:
    """The file system's own number, kept over a reboot where st_dev is not; 0 when there is none.
    SQLite's integers are signed: the number is folded."""
    try:
        number = getattr(os.statvfs(path), "f_fsid", 0)
    except OSError:
        return 0
    return number - (1 << 64) if number >= 1 << 63 else number


def run_scan(books: Books, source: Source, skip: "Iterable[str]" = (),
             pace: "Optional[Pace]" = None,
             consent: bool = False) -> bool:
    """One scan, its verdict recorded.  Returns whether anything was different."""
    with contextlib.closing(Scan(books, source, skip, pace, consent)) as scan:
        try:
            changed = scan.run()
            scan.keep_list(False)
            return changed
        except Held as held:
            scan.keep_list(held.cause not in UNACCEPTABLE)
            record_held(books, source, held)
            return False


def record_held(books: Books, source: Source, held: Held) -> None:
    before = books.source_row(source.name)
    if before["state"] != "held" or before["reason"] != str(held):
        log.warning("source %s is held: %s", source.name, held)
    books.finish_scan(source.name, state="held", cause=held.cause, reason=str(held),
                      scanned=clock.now())


def compare_own(tree: Tree, facts: "Dict[str, Any]",
                given: "Dict[str, Any]") -> "Tuple[str, Optional[bytes]]":
    """Compare what a client says of a copy with the source's own file, shortly: (verdict, digest
    when all was read).

    `facts`: Books.version_of; `given`: size, digest, offsets and samples.  Verdicts: "ok",
    "changed" (the file is not, or no longer, the version in the books), "bad" (the copy is wrong),
    "unreadable", or "unproven": only reading all of our own file will tell.  It is not slowed down:
    the bytes are those that were just sent, or few.  A small file of which there is a proof is not
    read for each further copy that has its digest.
    """
    try:
        if facts["size"] <= WHOLE_BELOW and given["digest"] == proven(facts):
            found = tree.lstat(given["path"], strict=True)
            return "ok" if found and _is_version(found, facts) else "changed", None
        descriptor, info = tree.open_file(given["path"])
    except OSError as error:
        return _why_unopened(error), None
    try:
        if not _is_version(info, facts):
            return "changed", None
        own, known = None, facts["digest"]
        if facts["size"] <= WHOLE_BELOW:
            own = digest_descriptor(descriptor, size=info.st_size)[0]
            verdict = "ok" if own == given["digest"] else "bad"
        elif not given["offsets"]:
            verdict = "ok" if given["digest"] == known else "unproven"
        elif digest_samples(descriptor, given["offsets"]) != given["samples"]:
            verdict = "unproven" if given["digest"] == known else "bad"
        else:
            verdict = "ok" if known in (None, given["digest"]) else "unproven"
        info = os.fstat(descriptor)
        if not _is_version(info, facts):
            return "changed", None
        return verdict, None if is_fresh(info) else own
    except OSError:
        return "unreadable", None
    finally:
        os.close(descriptor)


def proven(facts: "Dict[str, Any]") -> "Optional[bytes]":
    """The digest that our own file had when it was read; None: it was not, for this version."""
    return facts["digest"] if facts["doubt"] is None else None


def read_own(tree: Tree, facts: "Dict[str, Any]", pace: Pace) -> "Tuple[str, Optional[bytes]]":
    """Read one of our own files in full: ("read", its digest), or why not: "changed" (it is not, or
    no longer, what the books know), "fresh" (it was changed just now, and might be again without
    that its times show it), "unreadable"."""
    try:
        descriptor, info = tree.open_file(facts["path"])
    except OSError as error:
        return _why_unopened(error), None
    try:
        if not _is_version(info, facts):
            return "changed", None
        if is_fresh(info):
            return "fresh", None
        own = digest_descriptor(descriptor, pace, info.st_size)[0]
        return ("read", own) if _is_version(os.fstat(descriptor), facts) else ("changed", None)
    except OSError:
        return "unreadable", None
    finally:
        os.close(descriptor)


def _why_unopened(error: OSError) -> str:
    return "changed" if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP,
                                        errno.EINVAL) else "unreadable"


def is_fresh(info: os.stat_result) -> bool:
    """Whether a file was changed so shortly ago that a further change may leave its times as they
    are."""
    margin = FINE_CLOCK if info.st_ctime_ns % 1000000000 else COARSE_CLOCK
    # the kernel's clock, also where tests set ours
    return abs(time.time() - info.st_ctime) < margin


def _is_version(info: os.stat_result, facts: "Dict[str, Any]") -> bool:
    return (info.st_size, info.st_mtime_ns, info.st_ino) == (facts["size"], facts["mtime"],
                                                             facts["ino"]) \
        and info.st_ctime_ns == facts["ctime"]


# ==== 9. The channel ==============================================================================

NO_TIME_CHECK = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME: a board without a clock wakes up in 1970 and must still be let in."""


def tls_context(home: Home, server_side: bool) -> "ssl.SSLContext":
    """TLS in which the cluster's certificate is chain and only root: both sides prove that they
    hold the key."""
    home.check_key()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # A server also listens to a peer without a certificate: it may say `join`, and nothing else.
    context.verify_mode = ssl.CERT_OPTIONAL if server_side else ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= NO_TIME_CHECK
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    if server_side:
        context.num_tickets = 0  # nobody resumes a session
    try:
        context.load_cert_chain(home.key_path)
        context.load_verify_locations(home.key_path)
    except (OSError, ValueError) as error:
        raise UsageError("%s is not a key of a cluster (%s); copy it again from another machine"
                         % (home.key_path, reason_of(error)))
    return context


# -- the messages: one table of what may be said, by which both sides check --
#
# A shape is a test (a function that says whether a value is right), or is built of shapes:
#   [shape]           a list of at most LIST_LIMIT of them       (shape, shape)   a list of exactly
# these
#   {"key": shape}    an object; keys that are not named here are ignored, and missing ones an
# error, unless
#   May(shape)        the key may be missing; May(shape, default): it is there afterwards
#   Maybe(shape)      or null                                    Each(shape)      an object of names
# and such values
#   Every(shape, n)   a list with a bound of its own
# What is newer than level 1 is a May, in requests and in answers: the other side may be older.

LIST_LIMIT = 2 * PAGE


class May:
    def __init__(self, of: Any, *default: Any) -> None:
        self.of, self.default = of, default


class Maybe:
    def __init__(self, of: Any) -> None:
        self.of = of


class Each:
    def __init__(self, of: Any, most: int = 10000) -> None:
        self.of, self.most = of, most


class Every:
    def __init__(self, of: Any, most: int) -> None:
        self.of, self.most = of, most


class Either:
    """A row of one of these kinds, each of another length."""

    def __init__(self, *kinds: "Tuple[Any, ...]") -> None:
        self.kinds = {len(kind): kind for kind in kinds}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.match(value))


class Whole:
    """A test for whole numbers from `low` to below `high`."""

    def __init__(self, name: str, low: int, high: int) -> None:
        self.__name__, self.low, self.high = name, low, high

    def __call__(self, value: Any) -> bool:
        return type(value) is int and self.low <= value < self.high  # type: a bool is an int, too

    def all_of(self, values: "Sequence[Any]") -> bool:
        """The same of many values at once."""
        return set(map(type, values)) == {int} and self.low <= min(values) \
            and max(values) < self.high


_is_count = Whole("count", 0, 1 << 62)
_is_number = Whole("number", 1 - (1 << 62), 1 << 62)
_is_mode = Whole("mode", 0, 0o7777 + 1)
_is_size = Whole("size", 0, 1 << 48)
"""Bytes of one file: sums of many of them stay numbers."""
_is_tag = Whole("tag", 0, 1 << 32)
"""See `tag_of`."""


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e18 < value < 1e18


def _is_figure(value: Any) -> bool:
    """A number of whatever size: that it is wrong is to be found out, and put right."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    """What bytes can have given, see `as_text`."""
    return _is_said(value) and not _NO_TEXT.search(value)


_NO_TEXT = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def _is_word(value: Any) -> bool:
    """One of ours, or of a newer version's."""
    return isinstance(value, str) and bool(re.match(r"[a-z-]{1,40}\Z", value))


def _is_string(value: Any) -> bool:
    return type(value) is str


def _is_said(value: Any) -> bool:
    """A text for people: `misfit` makes it one that can be shown."""
    return isinstance(value, str) and len(value) <= CONFIG_LIMIT


def _are_hex(values: "Sequence[Any]") -> bool:
    """_is_hex of many values at once."""
    if set(map(type, values)) != {str} \
            or any(size > 128 or size % 2 for size in set(map(len, values))):
        return False
    text = "".join(values)
    return text.isascii() and not text.encode().translate(None, b"0123456789abcdef")


def _is_hex(value: Any) -> bool:
    return _are_hex([value])


def _is_path(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(check_relative(as_raw(value)))
    except ProtocolError:
        return False


def _are_paths(values: "Sequence[Any]") -> bool:
    """_is_path of many values at once."""
    if set(map(type, values)) != {str} or max(map(len, values)) > 2048:  # 8,192 bytes at most
        return False
    try:
        raw = as_raw("/%s/" % "/".join(values))  # one is plain when all of its parts are
    except ProtocolError:
        return False
    return not any(part in raw for part in (b"\0", b"//", b"/./", b"/../"))


def _is_hex_word(value: Any) -> bool:
    return isinstance(value, str) and bool(re.match(r"[0-9a-f]{1,64}\Z", value))


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096


def _is_text_or_number(value: Any) -> bool:
    return _is_text(value) or _is_number(value)


def _is_anything(value: Any) -> bool:
    return True


def _one_of(*values: Any) -> "Callable[[Any], bool]":
    def is_known(value: Any) -> bool:
        return isinstance(value, (str, int)) and not isinstance(value, bool) and value in values
    return is_known


def misfit(value: Any, shape: Any) -> str:
    """What is wrong with a value from a peer, and where in it; "" when it has the shape.  Enters
    defaults into objects."""
    if isinstance(shape, Maybe):
        return misfit(value, shape.of) if value is not None else ""
    if isinstance(shape, dict):
        return _misfit_of_object(value, shape)
    if isinstance(shape, Each):
        if not isinstance(value, dict) or len(value) > shape.most:
            return " is no object, or one that is too large"
        parts: "Iterable[Tuple[Any, Any, Any]]" = ((key, each, shape.of)
                                                   for key, each in value.items())
        if not all(map(_is_name, value)):
            return " has a key that is no name"
    elif isinstance(shape, (list, Every)):
        of, most = (shape.of, shape.most) if isinstance(shape, Every) else (shape[0], LIST_LIMIT)
        if not isinstance(value, (list, tuple)) or len(value) > most:
            return " is no list, or one that is too long"
        parts = () if _all_fit(value, of) else ((number, each, of)
                                                for number, each in enumerate(value))
    elif isinstance(shape, (tuple, Either)):
        kinds = shape.kinds if isinstance(shape, Either) else {len(shape): shape}
        if not isinstance(value, (list, tuple)) or len(value) not in kinds:
            return " is no list of %s" % " or ".join(map(str, kinds))
        parts = zip(itertools.count(), value, kinds[len(value)])
    else:
        return "" if shape(value) else " is " + shape.__name__.lstrip("_").replace("is_", "no ")
    for key, each, of in parts:
        wrong = misfit(each, of)
        if wrong:
            return ".%s%s" % (key, wrong)
        if of is _is_said and isinstance(value, (list, dict)):
            value[key] = shown(each)
    return ""


def _all_fit(values: "Sequence[Any]", of: Any) -> bool:
    """Whether all of many values have a shape: what most of what is said is made of, values or rows
    of values, is tested a column at a time.  Where it fails, and for all other shapes, `misfit`
    says what is wrong."""
    if not values:
        return True
    if of is _is_said:  # which `misfit` makes fit
        return False
    if isinstance(of, Whole):
        return of.all_of(values)
    if of is _is_hex:
        return _are_hex(values)
    if of is _is_path and _are_paths(values):
        return True
    if callable(of):  # few words are said many times
        return all(map(of, set(values) if set(map(type, values)) == {str} else values))
    if isinstance(of, Maybe):
        return _all_fit([value for value in values if value is not None], of.of)
    if isinstance(of, (tuple, Every, Either)):
        if not set(map(type, values)) <= {list, tuple}:
            return False
        if isinstance(of, Either):
            return len(values[0]) in of.kinds and _all_fit(values, of.kinds[len(values[0])])
        if isinstance(of, Every):
            return max(map(len, values)) <= of.most \
                and _all_fit(list(itertools.chain.from_iterable(values)), of.of)
        return set(map(len, values)) == {len(of)} \
            and all(map(_all_fit, zip(*values), of))
    return False


def _misfit_of_object(value: Any, shape: "Dict[str, Any]") -> str:
    if not isinstance(value, dict):
        return " is no object"
    for key, of in shape.items():
        if key not in value and isinstance(of, May):
            for default in of.default:
                value[key] = default() if callable(default) else default
            continue
        if key not in value:
            return ".%s is missing" % key
        of = of.of if isinstance(of, May) else of
        wrong = misfit(value[key], of)
        if wrong:
            return ".%s%s" % (key, wrong)
        if value[key] is not None and (of.of if isinstance(of, Maybe) else of) is _is_said:
            value[key] = shown(value[key])
    return ""


class Operation:
    """What is sent, what is answered (beside "ok"), and the function of the server that does it
    (see `answers`)."""

    def __init__(self, request: "Dict[str, Any]", answer: "Dict[str, Any]") -> None:
        self.request, self.answer = request, answer
        self.handler: "Optional[Callable[[Any, Dict[str, Any]], Dict[str, Any]]]" = None


SERVED = ("source", "backup", "attic", "catalog")

HOLDING = Either((_is_path, _is_count, _is_number, Maybe(_is_hex)),
                 (_is_count, _is_path, _is_path, _is_count, _is_number, Maybe(_is_hex)))
"""Of a copy (path, size, mtime, digest or null), or of an old version, with its number in front and
the name in the attic behind the path."""

WANTED = (_is_path, _is_count, _is_number, _is_mode, _is_number, _is_number, _is_count)
"""A file that is to be copied: see Wanted."""
FOUND = (_is_path, _is_count)
STANDING = {
    "state": _is_word, "reason": Maybe(_is_said), "cause": Maybe(_is_word), "replicas": _is_count,
    "scanned": _is_flag,
    "todo": _is_count, "sum": (_is_figure, _is_figure, _is_figure), "gen": _is_count,
    "recovering": _is_flag,
    "claims": May(_is_flag, True)}
WORDS = {
    "name": _is_name, "host": _is_text, "capacity": Maybe(_is_count), "free": Maybe(_is_number),
    "want": Maybe(_is_count),
    "used": Maybe(_is_count), "files": Maybe(_is_count), "age": Maybe(_is_real),
    "period": Maybe(_is_real),
    "lost": _is_flag, "droppable": _is_count}
"""The last words of a backup."""
OFFER = {"version": _is_count, "stamp": _is_count, "sha256": _is_text, "text": _is_text,
         "history": Every(_is_text, 1000),
         "accepted": May(Every(_is_text, CONFIG_NAMES), list)}
"""A configuration: Home.config_offer."""
SOME = {"count": May(_is_count, 0), "some": May([_is_said], list)}
FIGURES = dict(dict.fromkeys((
    "files", "bytes", "underserved_files", "underserved_bytes", "overserved_files", "missing_bytes",
    "claimed_files",
    "blocked_files", "replicas"), _is_count), state=_is_word, reason=Maybe(_is_said),
               cause=Maybe(_is_word),
    copies=Each(_is_count), special=Maybe(_is_count), last_scan=Maybe(_is_real),
    problems=SOME, stuck=May(SOME), late=May(_is_flag), failed=May(Maybe(_is_said)),
               unproven_files=May(_is_count),
    unproven_since=May(Maybe(_is_real)), short=[(_is_text, _is_count, _is_said)],
               short_since=May(Maybe(_is_real)),
    held_files=May([(_is_path, _one_of("gone", "changed"))], list))
"""A source in the answer of `status`."""
HERE = {"state": _is_said, "used": May(_is_count), "files": May(_is_count),
        "capacity": May(Maybe(_is_number)),
        "sources": May(Each(_is_count)), "held": May(_is_count), "disk": May(_is_number),
        "new": May(_is_flag)}
"""A backup in its own host's answer of `status`."""
PLANNED = {"state": _is_word, "scanned": _is_flag, "replicas": _is_count, "files": _is_count,
           "bytes": _is_count,
           "bare": (_is_count, _is_count), "without": Each((_is_count, _is_count)),
           "largest": (_is_count, _is_text)}

_OF = {"backup": _is_name, "source": _is_name}
_ROOM = dict(_OF, free=_is_number)

OPERATIONS: "Dict[str, Operation]" = {
    "look": Operation({}, {"waiting": [_is_name]}),
    "begin": Operation({"backup": _is_name, "identity": _is_hex_word, "adopt": _is_flag,
                        "capacity": _is_count,
                        "free": _is_number, "used": _is_count, "files": _is_count,
                        "sums": Each(_is_anything)},
                       {"books": _is_text, "sources": Each(STANDING)}),
    "standing": Operation(_OF, STANDING),
    "caught_up": Operation(_OF, {}),
    "told": Operation({"backup": _is_name, "capacity": May(_is_count), "free": May(_is_number),
                       "want": May(_is_count),
                       "used": May(_is_count), "files": May(_is_count),
                       "rows": May([(_is_name, _is_path)], list),
                       "lists": May(Each(_is_count), dict)}, {}),
    "demand": Operation({"backup": _is_name, "capacity": _is_count, "free": _is_number,
                         "beyond": May(_is_flag, False)}, {
        "sources": Each({"missing": _is_count, "replicas": _is_count, "lacking": _is_count,
                         "lacking_files": _is_count,
                         "short": _is_count, "beyond": May(_is_count, 0)}), "backups": [WORDS]}),
    # Where there is no `more` in an answer with pages, the last page is that with less than PAGE
    # rows.
    "todo": Operation(dict(_OF, kind=_one_of(1, 2, 4, 8), after=_is_count),
                      {"more": May(_is_flag),
                       "rows": [(_is_count, _is_path, Maybe(_is_number), Maybe(WANTED))],
                       "digests": May([Maybe(_is_hex)], list)}),
    "done": Operation(dict(_OF, kind=_one_of(1, 2, 4, 8), rows=[(_is_number, Maybe(_is_tag))]), {}),
    "forget": Operation(dict(_OF, paths=[_is_path]), {}),
    "report_start": Operation(_OF, {"serial": _is_count}),
    "report": Operation(dict(_OF, serial=_is_count,
                             rows=[(_is_path, _is_size, _is_number, _is_tag)]), {}),
    "report_end": Operation(dict(_OF, serial=_is_count), STANDING),
    "claim": Operation(dict(_ROOM, most_files=_is_count, most_bytes=_is_count), {"rows": [WANTED]}),
    "claims": Operation(_OF, {"rows": [WANTED]}),
    "claim_paths": Operation(dict(_ROOM, paths=[_is_path], relieved=Maybe(_is_name)),
                             {"rows": [WANTED]}),
    "release": Operation(dict(_OF, paths=[_is_path], all=_is_flag), {}),
    "confirm": Operation(dict(_OF,
                              rows=[(_is_path, _is_count, _is_hex, Every(_is_count, 64), _is_hex)]),
                         {"verdicts": [_is_word]}),
    "placed": Operation(dict(_OF, rows=[(_is_path, _is_number, _is_tag)]), {"counted": [_is_path]}),
    "decline": Operation(dict(_OF, rows=[(_is_path, _is_number, _is_said)]), {}),
    "smallest": Operation(dict(_OF, above=_is_count, most=_is_count), {"file": Maybe(FOUND)}),
    "droppable": Operation(dict(_OF, need=_is_count), {"rows": [FOUND]}),
    "drop": Operation(dict(_OF, paths=[_is_path]), {"granted": [_is_path]}),
    "relief": Operation(dict(_OF, relieved=_is_name, gap=_is_count, most=_is_count),
                        {"rows": [FOUND]}),
    # The rows of a catalog are checked where they are read, as those of a file are:
    # CatalogRow.from_json.
    "catalog": Operation({"source": _is_name, "since": _is_count, "upto": _is_count,
                          "cursor": (_is_number, _is_number),
                          "after": _is_text_or_number},
                         {"upto": _is_count, "time": _is_real, "books": _is_text,
                          "rows": [_is_anything],
                          "cursor": (_is_number, _is_number)}),
    "status": Operation({},
                        {"sources": Each(FIGURES), "backups": [WORDS], "mine": Each(HERE),
                         "duties": Each(_is_count),
                         "config_version": _is_count, "config_held": May(Maybe(_is_said))}),
    "plan": Operation({},
                      {"sources": Each(PLANNED),
                       "rooms": Each({"capacity": _is_number, "used": _is_number})}),
    "vaults": Operation({"source": _is_name},
                        {"vaults": Each({"catalogs": Every((_is_text, _is_count), 100000)})}),
    # Of level 2 on.  The newest catalogs that the source's own server made: generation, time, and
    # whether something of the
    # source had changed; the newest first.
    "generations": Operation({"source": _is_name}, {"rows": [(_is_count, _is_real, _is_flag)]}),
    # Copies are (path, size, mtime, digest); with kind 2 old versions: (number, path, name, size,
    # mtime, digest).
    "holdings": Operation(dict(_OF, after=_is_text_or_number, kind=May(_one_of(1, 2, 4, 8), 1),
                               prefix=May(_is_text, "")),
                          {"rows": [HOLDING], "more": May(_is_flag)}),
    # Rows: name, empty for the path itself; size, null for a directory; mtime; until when it was
    # the present version.
    "list": Operation(dict(_OF, path=_is_text, after=_is_text_or_number,
                           kind=May(_one_of(1, 2, 4, 8), 1)),
                      {"rows": [(_is_text, Maybe(_is_count), _is_number, _is_real)],
                       "next": Maybe(_is_text)}),
    "held_files": Operation({"source": _is_name, "after": _is_text},
                            {"rows": [(_is_path, _one_of("gone", "changed"))],
                             "more": May(_is_flag)}),
    "accept": Operation({"source": _is_name}, {"text": _is_said}),
    "find": Operation({"pattern": _is_pattern},
                      {"more": _is_flag, "at": May(Every(Maybe(_is_count), 100000), list),
                       "rows": Every(
        (_is_name, _is_name, _is_path, _is_number, _is_number, Maybe(_is_real)), 100000)}),
    "forget_source": Operation({"source": _is_name}, {}),
    "config": Operation({}, {"config": OFFER}),
    "new_config": Operation({"config": OFFER}, {"taken": _is_flag}),
    # paths: of level 2 on, for a source: what is to be read.
    "rsync": Operation({"of": _one_of(*SERVED), "name": _is_name, "source": _is_name,
                        "paths": May([_is_path])}, {}),
}
"""Every operation that a server knows: beside its line here, a function of Service that is marked
with `answers(name)` (`rsync`: Service.root_for)."""


def answers(name: str) -> "Callable[[Any], Any]":
    """Marks the function that does an operation."""
    def entered(function: Any) -> Any:
        OPERATIONS[name].handler = function
        return function
    return entered


def check_offer(offer: Any) -> "Dict[str, Any]":
    """A configuration from a peer, when it has the form of Home.config_offer.  Raises
    ProtocolError."""
    wrong = misfit(offer, OFFER)
    if wrong:
        raise ProtocolError("a configuration that is not of the form: it%s" % wrong)
    try:
        offer["text"].encode()
    except UnicodeEncodeError:
        raise ProtocolError("a configuration that is not text")
    return offer


class Budget:
    """Bytes that several threads have together."""

    def __init__(self, most: int) -> None:
        self._left, self._changed = most, threading.Condition()

    def take(self, count: int, wait: float) -> None:
        """Raises ProtocolError when others do not give back enough of it in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= count, wait):
                raise ProtocolError("the server is busy with other large messages")
            self._left -= count

    def give(self, count: int) -> None:
        with self._changed:
            self._left += count
            self._changed.notify_all()


class Allowance:
    """What a server listens to from all of its members together (see LIGHT)."""

    def __init__(self) -> None:
        self.arriving, self.at_work, self.parsing = Budget(BUFFERS), Budget(AT_WORK), \
            threading.Lock()


_ALL_DIGITS_0 = bytes.maketrans(b"123456789", b"0" * 9)


def check_json(data: bytes) -> None:
    """Look at a message before it is parsed: depth, number of values and length of numbers.  Raises
    ProtocolError."""
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    if data.count(b'"') > 4 * ELEMENTS:
        raise ProtocolError("a message with too many values")
    bare = b"".join(data.split(b'"')[::2])  # without its strings
    if bare.count(b",") + bare.count(b"[") + bare.count(b"{") > ELEMENTS:
        raise ProtocolError("a message with too many values")
    if b"0" * (DIGITS + 1) in bare.translate(_ALL_DIGITS_0):
        raise ProtocolError("a message with a number that is too long")
    brackets = bare.translate(None, bytes(set(range(256)) - set(b"[]{}")))
    for _ in range(NESTING):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    if brackets:
        raise ProtocolError("a message that is nested too deeply")


def _no_constant(word: str) -> Any:
    raise ValueError(word)


class Channel:
    """JSON messages, one a line, over a connected socket.  Long ones travel as {"z": base64 of
    zlib}.

    `limit`, `unpacked`: the longest line, and what it may unfold to (0: nothing that is packed).
    `allowance`: a server's.
    """

    def __init__(self, connection: socket.socket, limit: int = MESSAGE_LIMIT,
                 unpacked: int = UNPACKED_LIMIT,
                 allowance: "Optional[Allowance]" = None) -> None:
        self.socket, self.limit, self.unpacked, self.allowance = connection, limit, unpacked, \
            allowance
        self._buffer = bytearray()
        self._arriving = self._at_work = 0

    def close(self) -> None:
        self.done()
        self._settle_arriving()
        with contextlib.suppress(OSError):
            self.socket.close()

    def done(self) -> None:
        """The last message received was dealt with."""
        if self.allowance and self._at_work:
            self.allowance.at_work.give(self._at_work)
        self._at_work = 0

    def _settle_arriving(self) -> None:
        if self.allowance and self._arriving:
            self.allowance.arriving.give(self._arriving)
        self._arriving = 0

    def send(self, message: "Dict[str, Any]", timeout: float = 60.0) -> None:
        data = json.dumps(message, separators=(",", ":")).encode("ascii")
        if len(data) > PACK_FROM:
            packed = base64.b64encode(zlib.compress(data, 1)).decode()
            data = json.dumps({"z": packed}, separators=(",", ":")).encode("ascii")
        if len(data) > MESSAGE_LIMIT:
            raise ProtocolError("a message of %d bytes is too long to be sent" % len(data))
        self.socket.settimeout(timeout)
        self.socket.sendall(data + b"\n")

    def receive(self, idle: float, whole: float = 60.0,
                last: bool = False) -> "Optional[Dict[str, Any]]":
        """The next message; None at the end of the connection.  `idle`: seconds until its first
        byte; once begun, it has to be complete within `whole`.  last: what follows it on the
        connection is none, and not read.  Raises OSError or ProtocolError."""
        begun: "Optional[float]" = time.monotonic() if self._buffer else None
        searched = 0
        while True:
            end = self._buffer.find(b"\n", searched)
            if end >= 0:
                line = bytes(self._buffer[:end])
                self._buffer = self._buffer[end + 1:]
                try:
                    return self._parse(line)
                finally:
                    if len(self._buffer) <= LIGHT:
                        self._settle_arriving()
            searched = len(self._buffer)
            if searched > self.limit:
                raise ProtocolError("a message that is too long")
            if searched > LIGHT and self.allowance and not self._arriving:
                self.allowance.arriving.take(self.limit, whole)
                self._arriving = self.limit
            left = idle if begun is None else min(idle, begun + whole - time.monotonic())
            self.socket.settimeout(max(0.01, left))
            data = self.socket.recv(1 if last else min(1 << 16, self.limit + 1 - searched))
            if not data:
                if self._buffer:
                    raise ProtocolError("the connection ended within a message")
                return None
            if begun is None:
                begun = time.monotonic()
            self._buffer += data

    def _parse(self, line: bytes) -> "Dict[str, Any]":
        try:
            with self.allowance.parsing if self.allowance and len(line) > PACK_FROM \
                    else contextlib.nullcontext():
                if self.unpacked and line.startswith(b'{"z":"') and line.endswith(b'"}'):
                    line = self._unpack(base64.b64decode(memoryview(line)[6:-2], validate=True))
                check_json(line)
                message = json.loads(line.decode("ascii"), parse_constant=_no_constant)
        except (ValueError, TypeError, zlib.error, binascii.Error, RecursionError):
            raise ProtocolError("a message that is not JSON")
        if not isinstance(message, dict):
            raise ProtocolError("a message that is not an object")
        return message

    def _unpack(self, packed: bytes) -> bytes:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(packed, min(LIGHT, self.unpacked))
        if unpacker.unconsumed_tail and self.allowance:
            # Its length is not known before: first it is only counted.
            size, tail = len(data), unpacker.unconsumed_tail
            while tail and size <= self.unpacked:
                size += len(unpacker.decompress(tail, LIGHT))
                tail = unpacker.unconsumed_tail
            if size <= self.unpacked:
                self.allowance.at_work.take(size, 60.0)
                self._at_work = size
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(packed, self.unpacked)
        elif unpacker.unconsumed_tail:
            data += unpacker.decompress(unpacker.unconsumed_tail, self.unpacked - len(data))
        if unpacker.unconsumed_tail:
            raise ProtocolError("a message that is too long")
        return data


def was_cut(error: BaseException) -> bool:
    """Whether a connection ended without that anybody said why."""
    return isinstance(error,
                      (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError,
                       ssl.SSLZeroReturnError)) \
        or "EOF occurred" in str(error)


def why_not_connected(error: BaseException) -> str:
    """The true reason, in words."""
    if was_cut(error):
        return "it cut the connection: it is busy, or something on the way does not let it through"
    if isinstance(error, ssl.SSLError):
        words = str(error).lower().replace("_", " ")
        if any(word in words
               for word in ("unknown ca", "certificate", "decrypt error", "signature",
                            "handshake failure")):
            return "TLS failed: this machine's cluster.pem is not the key of the cluster that it " \
                "belongs to"
        return "TLS failed: what listens there is no cbackup server (%s)" % (
            error.reason or reason_of(error))
    return reason_of(error)


class Dialer:
    """What the links of a process share: the client's side of TLS, and connections that nobody uses
    just now.  A handshake costs more than all that a pass with nothing to do has to say."""

    def __init__(self, home: Home, impatient: bool = False) -> None:
        """impatient: a host that did not answer in time is not waited for again for SILENT_REST."""
        self.impatient = impatient
        self._silent: "Dict[Any, Tuple[float, str]]" = {}
        self._resting: "Dict[Any, Tuple[float, Channel, Dict[str, Any]]]" = {}
        self.context = tls_context(home, server_side=False)
        self._lock = threading.Lock()

    def __del__(self) -> None:
        for _, channel, _ in self._resting.values():
            channel.close()

    def note_silence(self, whose: Any, since: float, why: str) -> None:
        """A connection failed that was tried from `since` on (time.monotonic)."""
        now = time.monotonic()
        if self.impatient and now - since >= SILENT_FROM:
            self._silent[whose] = now, why

    def silence(self, whose: Any) -> str:
        """Why a host is not to be waited for again; "" when it is to be asked."""
        when, why = self._silent.get(whose, (0.0, ""))
        return why if time.monotonic() - when < SILENT_REST else ""

    def rest(self, whose: Any, channel: Channel, hello: "Dict[str, Any]") -> None:
        """Keep a connection on which everything that was asked has been answered."""
        with self._lock:
            former = self._resting.pop(whose, None)
            self._resting[whose] = time.monotonic(), channel, hello
        if former:
            former[1].close()

    def wake(self, whose: Any) -> "Optional[Tuple[Channel, Dict[str, Any]]]":
        """(a connection, the hello with which it began), or None; its server may have ended it."""
        with self._lock:
            since, channel, hello = self._resting.pop(whose, (0.0, None, {}))
        if channel and time.monotonic() - since > CONNECTION_REST:
            channel.close()
            return None
        return (channel, hello) if channel else None


class Link:
    """A client's connection to the server of one host: opened at the first call, again after an
    interruption.

    Not thread-safe: a thread that wants to talk at the same time opens one of its own.
    """

    def __init__(self, host: str, config: Config, dialer: Dialer) -> None:
        self.host, self.config, self.dialer = host, config, dialer
        self.hello: "Dict[str, Any]" = {}
        self.level = 0  # of the server, once connected; see `peer_level`
        self._slow = 0.0
        self._channel: "Optional[Channel]" = None

    def again(self) -> "Link":
        """Another link to the same host, for another thread."""
        return Link(self.host, self.config, self.dialer)

    def close(self) -> None:
        if self._channel:
            self._channel.close()
            self._channel = None

    def done(self) -> None:
        """For now: who asks this host next goes on with the connection."""
        if self._channel:
            self.dialer.rest(self._whose(), self._channel, self.hello)
            self._channel = None

    def _whose(self) -> "Tuple[Any, ...]":
        return (self.host,) + self.config.address(self.host)

    def _open(self) -> Channel:
        """A connection that rests, else a new one.  Raises Unreachable."""
        found = self.dialer.wake(self._whose())
        if found is None:
            return self.connect()
        self._greeted(found[1])
        return found[0]

    def _greeted(self, hello: "Dict[str, Any]") -> None:
        level = hello.get("level")
        self.hello, self.level = hello, level if isinstance(level, int) and 1 < level < 1000 else 1

    def connect(self) -> Channel:
        """A new connection, after the server's hello.  Raises Unreachable with a reason for
        people."""
        address, port = self.config.address(self.host)
        begun, why = time.monotonic(), self.dialer.silence(self._whose())
        if why:
            raise Unreachable(self.host, why)
        for attempt in range(CONNECT_TRIES):
            connection = channel = None
            try:
                # As bytes: the codec for other names costs a start more than the connection does.
                named = address.encode() if address.isascii() else address
                connection = socket.create_connection((named, port), timeout=CONNECT_TIMEOUT)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.settimeout(HANDSHAKE_TIMEOUT)
                channel = Channel(self.dialer.context.wrap_socket(connection,
                                                                  do_handshake_on_connect=True))
                # The server speaks first: with TLS 1.3 a refusal is only seen at the first read.
                hello = channel.receive(HANDSHAKE_TIMEOUT)
                if hello is None:
                    raise ConnectionResetError(errno.ECONNRESET, "it was closed")
                break
            except (OSError, ProtocolError, UnicodeError) as error:
                for end in filter(None, (connection, channel)):
                    end.close()
                if attempt + 1 < CONNECT_TRIES and connection and was_cut(error):
                    time.sleep(random.uniform(0.05, 0.2) * (attempt + 1))
                    continue
                why = "%s:%d: %s" % (address, port, why_not_connected(error))
                self.dialer.note_silence(self._whose(), begun, why)
                raise Unreachable(self.host, why)
        if hello.get("cbackup") != PROTOCOL:
            channel.close()
            raise Unreachable(self.host,
                              shown(str(hello.get("text")
                                        or "it speaks another version of the protocol")[:300]))
        if hello.get("host") != self.host:
            channel.close()
            raise Unreachable(self.host, "%s:%d is the machine %r; correct its line in [hosts]"
                              % (address, port, hello.get("host")))
        self._greeted(hello)
        return channel

    def greet(self) -> None:
        """A new connection: `hello` is of now.  Raises Unreachable."""
        self.close()
        self._channel = self.connect()

    def peer_level(self) -> int:
        """The server's LEVEL; connects where there is no connection yet.  Raises Unreachable."""
        if self._channel is None:
            self._channel = self._open()
        return self.level

    def call(self, op: str, **fields: Any) -> "Dict[str, Any]":
        """Send a request and return the answer.  Raises Refused, Unreachable or ProtocolError.

        A connection that broke is opened again once: every request may be answered twice without
        harm.
        """
        for attempt in (1, 2):
            fresh = self._channel is None
            try:
                if self._channel is None:
                    self._channel = self._open()
                self._channel.send(dict(fields, op=op,
                                        **({"level": LEVEL} if self.level > 1 else {})))
                begun = time.monotonic()
                answer = self._channel.receive(REPLY_TIMEOUT)
                self._note_slowness(op, time.monotonic() - begun)
                if answer is None:
                    raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
            except (OSError, ProtocolError) as error:
                self.close()
                if fresh or attempt == 2 or isinstance(error, socket.timeout):
                    raise Unreachable(self.host, reason_of(error))
                continue
            return self._checked(op, answer)
        raise AssertionError("not reached")

    def _note_slowness(self, op: str, seconds: float) -> None:
        """`look` waits on purpose, and for `confirm` the server reads files."""
        if seconds > SLOW_FROM and op not in ("look", "confirm", "accept"):
            self._slow += seconds
        if self._slow > SLOW_LIMIT:
            self.close()
            raise Unreachable(self.host, "its answers take too long: it is listened to no more")

    def _checked(self, op: str, answer: "Dict[str, Any]") -> "Dict[str, Any]":
        if answer.get("ok") is True:
            wrong = misfit(answer, OPERATIONS[op].answer) if op in OPERATIONS else ""
            if wrong:
                self.close()
                raise self.nonsense("the answer to %s%s" % (op, wrong))
            return answer
        if not isinstance(answer.get("error"), str) or not isinstance(answer.get("text"), str):
            self.close()
            raise self.nonsense("the answer to %s is neither one nor a refusal" % op)
        raise Refused(answer["error"][:40], "%s: %s" % (self.host, shown(answer["text"][:2000])))

    def nonsense(self, what: str) -> Unreachable:
        """The error for a server that answers what no server would: it is out, the others go on."""
        return Unreachable(self.host, "talks nonsense: %s" % shown(what[:300]))

    def stream(self, **fields: Any) -> socket.socket:
        """A new connection on which the rsync protocol follows.  Raises like `call`."""
        channel = self.connect()
        if self.level < 2:
            fields.pop("paths", None)
        try:
            channel.send(dict(fields, op="rsync"))
            answer = channel.receive(REPLY_TIMEOUT, last=True) or {}
        except (OSError, ProtocolError) as error:
            channel.close()
            raise Unreachable(self.host, reason_of(error))
        try:
            self._checked("rsync", answer)
        except CBackupError:
            channel.close()
            raise
        return channel.socket


class Rounds:
    """The bounds of a listing that comes in pages from one host: the cursor grows, the rows come to
    an end."""

    def __init__(self, host: str, what: str) -> None:
        self.host, self.what, self.rows = host, what, 0
        self.last: Any = None

    def page(self, rows: int, cursor: Any) -> None:
        """A page of so many rows came, and the next one is to begin behind `cursor`.  Raises
        Unreachable."""
        self.rows += rows
        if self.last is not None and not cursor > self.last:
            raise Unreachable(self.host,
                              "talks nonsense: its list of %s goes round in circles" % self.what)
        if self.rows > ROWS_LIMIT:
            raise Unreachable(self.host, "talks nonsense: its list of %s has no end" % self.what)
        self.last = cursor


class _Flow:
    """One direction of a relay: a buffer that is made once, and what fills and empties it."""

    SIZE = 1 << 18

    def __init__(self, read: "Callable[[Any], int]", write: "Callable[[Any], int]") -> None:
        """read, write: a part of the buffer; how many bytes, at the end 0.  They raise what says
        that it is to be waited, or OSError when the other side is gone."""
        self._read, self._write = read, write
        self._waits = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self._view = memoryview(bytearray(self.SIZE))
        self._begin = self._end = 0  # what is between has come and has not gone
        self.over = self.broken = False  # nothing comes any more; nothing is taken any more

    def holds(self) -> bool:
        return self._begin < self._end

    def wants(self) -> bool:
        return not self.over and self._end < self.SIZE

    def move(self) -> "Tuple[int, bool]":
        """As far as it goes without waiting: (bytes that came, whether anything moved)."""
        begin, end = self._begin, self._end
        try:
            while self.wants():
                count = self._read(self._view[self._end:])
                self._end += count
                self.over = not count
        except self._waits:
            pass
        except OSError:
            self.over = True
        came = self._end - end
        try:
            while self._begin < self._end:
                self._begin += self._write(self._view[self._begin:self._end])
        except self._waits:
            pass
        except OSError:
            self.broken = True
        moved = came > 0 or self._begin > begin
        if self._begin == self._end:
            self._begin = self._end = 0
        return came, moved


def relay(tls: socket.socket, reader: int, writer: int, idle: float,
          on_bytes: "Callable[[int], None]") -> str:
    """Carry bytes between a TLS socket and a local pair of descriptors until one side ends.

    Returns "done", "cut" (the peer went away) or "stalled" (`idle` seconds without a byte, or
    hardly any in RATE_WINDOW).  All are made non-blocking; each direction waits only for itself, or
    rsync would deadlock.  `on_bytes` is called with what came from the peer, and with 0 now and
    then; what it raises ends the transfer.
    """
    tls.setblocking(False)
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    inward = _Flow(tls.recv_into, lambda data: os.write(writer, data))
    outward = _Flow(lambda room: os.readv(reader, [room]), tls.send)
    last = opened = time.monotonic()
    carried = 0  # since `opened`, in both directions
    while True:
        came, moved = inward.move()
        if came:
            on_bytes(came)
        went, also_moved = outward.move()
        carried += came + went
        if inward.broken or outward.over and not outward.holds():
            return "done"
        if outward.broken or inward.over and not inward.holds():
            return "cut"
        now = time.monotonic()
        if now - opened > RATE_WINDOW:
            if carried < LEAST_RATE * RATE_WINDOW:
                return "stalled"
            opened, carried = now, 0
        if moved or also_moved:
            last = now
            continue
        if now - last > idle:
            return "stalled"
        on_bytes(0)
        _wait([end for end, flow in ((tls, inward), (reader, outward)) if flow.wants()],
              [end for end, flow in ((writer, inward), (tls, outward)) if flow.holds()], 1.0)


def _wait(read: "List[Any]", write: "List[Any]", seconds: float) -> None:
    """poll(2): unlike select it takes descriptors of any number."""
    poller = select.poll()
    events: "Dict[int, int]" = {}
    for source, event in [(x, select.POLLIN) for x in read] + [(x, select.POLLOUT) for x in write]:
        number = source if isinstance(source, int) else source.fileno()
        events[number] = events.get(number, 0) | event
    for number, event in events.items():
        poller.register(number, event)
    poller.poll(seconds * 1000)


# ==== 10. rsync ===================================================================================

CONNECT_CODE = """\
import posix, sys
try:
    import _socket as socket
except ImportError:
    import socket
s = socket.socket(fileno=int(sys.argv[1]))
ends = b"".join(end.to_bytes(4, sys.byteorder) for end in (0, 1))
s.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ends)])
s.recv(1)
posix._exit(0)
"""
"""What the puller's rsync runs as its remote shell: it hands its own standard input and output to
the process that holds the TLS connection, and waits until that is done with them.  No byte is
copied twice.  It runs once for each batch of files: `socket` around `_socket` would be half of its
time, and what an interpreter does at its end, with `array`, a third."""

RSYNC_DAEMON_CONFIG = """\
use chroot = {chroot}
read only = yes
list = no
numeric ids = yes
munge symlinks = no
timeout = 900
log file = /dev/null
refuse options = copy-links copy-unsafe-links copy-dirlinks remove-source-files remove-sent-files write-batch only-write-batch read-batch log-file
{owner}[m]
path = {path}
{only}"""
"""One per connection.  `use chroot` must be written for 3.1.3 and older; uid and gid only as root,
where a daemon without them reads as nobody; openrsync dies on any key that it does not know."""


RSYNC_ENDED = (0, 11, 23, 24)
"""Exit statuses of an rsync that came to the end of its list, or to the end of the disk (11)."""

RSYNC_OWN = (1, 3, 13, 14, 20, 126, 127)
"""Of one that failed here: its arguments, its files, processes, a signal (memory, 22, a peer can
use up)."""


def find_rsync() -> str:
    """The path of an rsync that will do.  Raises UsageError that names the command to install
    one."""
    path = shutil.which("rsync")
    if not path:
        raise UsageError("rsync is not installed: %s" % install_hint("rsync"))
    if path not in _RSYNC_CHECKED:
        try:
            text = subprocess.run([path, "--version"], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT,
                                  stdin=subprocess.DEVNULL,
                                  timeout=30).stdout.decode(errors="replace")
        except (OSError, subprocess.SubprocessError) as error:
            raise UsageError("%s cannot be run (%s): %s"
                             % (path, reason_of(error), install_hint("rsync")))
        match = re.search(r"rsync\s+version\s+v?(\d+)\.(\d+)\.(\d+)", text)
        if not match:
            raise UsageError("%s is not an rsync that cbackup can use (%s): %s"
                             % (path, text.strip().split("\n")[0][:60], install_hint("rsync")))
        version = tuple(int(n) for n in match.groups())
        if version < (2, 6, 9):
            raise UsageError("%s is version %s, cbackup needs 2.6.9 or newer: %s"
                             % (path, ".".join(match.groups()), install_hint("rsync")))
        is_open = "openrsync" in text
        _RSYNC_CHECKED[path] = RsyncKind(is_open, version < (3, 1, 0),
                                         not is_open and version >= (3, 2, 7))
    return path


RsyncKind = namedtuple("RsyncKind", "is_open is_old can_trust")
"""is_open: it is openrsync, as macOS 15 has it: by its source, a client may take back what its
configuration rules out. is_old: before 3.1, which looks for the rules of `./path` where the root is
asked for as `.`. can_trust: from 3.2.7 on (the first, 3.2.5, came with trial versions of the
option), which looks for each name that comes in the whole list of those that were asked for, unless
it is told to trust the sender."""

_RSYNC_CHECKED: "Dict[str, RsyncKind]" = {}
"""Path of an rsync that will do -> of what kind it is."""


def plain_directory() -> "tempfile.TemporaryDirectory[str]":
    """A temporary directory whose path can stand in rsync's configuration, whatever TMPDIR says."""
    places = [tempfile.gettempdir(), "/tmp", "/var/tmp", os.path.expanduser("~")]
    plain = [place for place in places if re.match(r"[\w@+=:,./-]+\Z", place, re.A)
             and os.access(place, os.W_OK | os.X_OK)]
    return tempfile.TemporaryDirectory(prefix="cbackup-", dir=(plain or places)[0])


def rsync_idle() -> float:
    """RSYNC_IDLE, unless a test set another."""
    return number_or(for_test("IDLE"), RSYNC_IDLE)


class Pull:
    """The outcome of one rsync: what matters is what lies at the destination, never `code` alone.

    how: done | cut (the peer went away) | stalled | own (this machine's rsync failed).  parts:
    paths of files to which only the rest was added, unchecked (rsync checks by itself what it goes
    on with).  wire: bytes."""

    def __init__(self, code: int = 0, how: str = "done", errors: "Iterable[str]" = ()) -> None:
        self.code, self.wire, self.how, self.errors = code, 0, how, list(errors)
        self.parts: "set[bytes]" = set()

    def add(self, other: "Pull") -> None:
        """Another one came after it, for other files of the same kind."""
        self.code, self.how, self.wire = other.code, other.how, self.wire + other.wire
        self.errors += other.errors
        self.parts |= other.parts

    @property
    def full_disk(self) -> str:
        """The line that says that the disk itself takes nothing more; "" when it does."""
        words = ("No space left", "Disc quota", "Disk quota", "Read-only file system")
        return next((line for line in self.errors if any(word in line for word in words)), "")

    @property
    def last_words(self) -> str:
        """Why it ended."""
        return (self.errors or [self.how])[-1]

    @property
    def went_through(self) -> bool:
        """Whether it came to the end of its list: with 11 it ends at a file that cannot be
        written."""
        return self.how == "done" and self.code != 11

    def said_of(self, name: bytes) -> "Optional[str]":
        """The first line of rsync's that has this (end of a) name in it; it writes odd bytes as
        \\#ooo."""
        for line in self.errors:
            plain = re.sub(rb"\\#([0-3][0-7]{2})", lambda match: bytes([int(match.group(1), 8)]),
                           os.fsencode(line))
            if name and name in plain:
                return line
        return None

    def blames(self, path: bytes) -> bool:
        """Whether a file is missing because of itself: an rsync that gave up in the middle of its
        list (11) names it."""
        return self.code != 11 or self.said_of(b"/" + path + b'"') is not None

    def own_failure(self) -> OwnFailure:
        """What to raise when `how` is "own"."""
        why = self.errors[-1][:160] if self.errors else "exit status %d" % self.code
        if self.code < 0:
            why = "it was killed by signal %d" % -self.code
        return OwnFailure("this machine's rsync (%s) failed: %s" % (shutil.which("rsync"), why))

    def _line_of(self, path: bytes) -> "Optional[str]":
        """What rsync said of one file, or of a directory above it."""
        line = self.said_of(os.path.basename(path))
        above = path.rpartition(b"/")[0]
        while not line and above:
            line = self.said_of(b"/" + above + b'"')
            above = above.rpartition(b"/")[0]
        return line

    def not_made(self, path: bytes) -> bool:
        """Whether it was our own side that could not make or write the file, or the directory for
        it: some file systems say of a name that they cannot hold that there is no such file."""
        return "/.cbackup/incoming/" in (self._line_of(path) or "")

    def not_written(self, top: bytes, path: bytes = b"") -> str:
        """The system's words of what our own side could not write below the directory `top`, whose
        whole path no peer knows: of one file, or of any.  "" when nothing is said of it."""
        if not path:
            line = self.said_of(top + b"/")
        else:
            above, _, name = (top + b"/" + path).rpartition(b"/")
            line = self.said_of(above + b"/" + name + b'"') \
                or self.said_of(above + b"/." + name + b".")
        return self._reason_in(line) if line else ""

    @staticmethod
    def _reason_in(line: str) -> str:
        return re.sub(r".*: ([^:]+?)( \(\d+\))?\Z", r"\1", line)

    def why(self, path: bytes) -> str:
        """What rsync said of one file, or of a directory above it, or its last words."""
        line = self._line_of(path)
        if line:
            return self._reason_in(line)
        return self.errors[-1][:160] if self.errors else "rsync did not deliver it"


def part_of(path: bytes) -> bytes:
    """Where rsync keeps and looks for the received part of a file."""
    above, _, name = path.rpartition(b"/")
    return b"/".join(filter(None, (above, PART_SUFFIX_DIR, name)))


TEMPORARY_NAME = re.compile(rb"\.(.+)\.[A-Za-z0-9]{6,10}\Z", re.S)
"""How rsync calls a file that is arriving: six characters behind it, Apple's ten."""


def keep_parts(tree: Tree, top: bytes, expected: "Callable[[bytes], bool]") -> None:
    """Put what a killed rsync left below `top` where the next one looks for parts of files.

    A cut connection makes rsync do that by itself; kill -9 and power cuts leave .NAME.XXXXXX, which
    is never used again. `expected`: whether a path below `top` is that of a file which is to arrive
    there.
    """
    for rel in list(tree.walk_files(top)):
        above, _, name = rel.rpartition(b"/")
        match = TEMPORARY_NAME.match(name)
        if not match or above.endswith(b"/" + PART_SUFFIX_DIR) or expected(rel[len(top) + 1:]):
            continue
        path = above + b"/" + match.group(1)
        if not expected(path[len(top) + 1:]):
            continue
        part = part_of(path)
        old, new = tree.lstat(part), tree.lstat(rel)
        if new is not None and (old is None or old.st_size < new.st_size):
            tree.rename(rel, part)


def with_parents(paths: "Iterable[bytes]") -> "set[bytes]":
    """Paths, and those of all directories above them."""
    names: "set[bytes]" = set()
    for path in paths:
        while path and path not in names:
            names.add(path)
            path = path.rpartition(b"/")[0]
    return names


LONG_PATH = 2500
"""Bytes of a path from which on a file is fetched alone: of several with more than about 2,700
rsync 3.5 says that it has not asked for them, and ends."""


def pull_apart(items: "Iterable[Any]", path_of: "Callable[[Any], bytes]",
               fetch: "Callable[[List[Any]], Pull]") -> Pull:
    """Fetch all items whose paths are not too long together, and each of the others by itself,
    until one is not brought to its end."""
    items, result = list(items), Pull()
    short = [item for item in items if len(path_of(item)) < LONG_PATH]
    long_ones = [[item] for item in items if len(path_of(item)) >= LONG_PATH]
    for some in ([short] if short else []) + long_ones:
        result.add(fetch(some))
        if result.how != "done":
            break
    return result


def list_with_parents(paths: "Iterable[bytes]") -> bytes:
    """A sorted, NUL-separated list for --files-from: without -r every parent has to be named."""
    names = with_parents(paths)
    # A leading # or ; would be taken for a comment by rsync 2.6.9 and Apple's.
    return b"".join((b"./" + name if name[:1] in b"#;" else name) + b"\0" for name in sorted(names))


FILTER_BYTES = 128 << 10
"""The most that `filters_for` may add up to: they are arguments, which systems have limits for."""


def filters_for(paths: "Iterable[bytes]") -> "List[bytes]":
    """Options that say the same as --files-from with `list_with_parents`; [] where they would be
    too long.

    openrsync takes the ./ off a list's names before it hands them on, and a server of its kind, or
    of 2.6.9, takes those that begin with # or ; for comments then.  Filters have no comments; but
    the server reads whole directories for them.
    """
    rules = set()
    for path in paths:
        rule, end = path, b""
        if re.search(rb"[\[*?]", path):  # only then a backslash is more than itself
            rule = re.sub(rb"([\[\]*?\\])", rb"\\\1", path)
        while rule and rule + end not in rules:
            rules.add(rule + end)
            rule, end = rule.rpartition(b"/")[0], b"/"
    if sum(map(len, rules)) > FILTER_BYTES:
        return []
    return [b"-r"] + [b"--include=/" + rule for rule in sorted(rules)] + [b"--exclude=*"]


def pull(connection: socket.socket, paths: "Iterable[bytes]", destination: bytes,
         bwlimit: "Optional[int]" = None,
         always: bool = False, on_bytes: "Callable[[int], None]" = lambda count: None,
         most: "Optional[int]" = None,
         plain: bool = False, whole: bool = False, trusted: bool = False) -> Pull:
    """Fetch files over a connection from `Link.stream` into the directory `destination`.

    paths: relative, any order.  bwlimit: bytes a second.  always: compare contents even where size
    and mtime are the same.  most: a file of more bytes is left out.  plain: they are small, and
    nothing of them is there: written straight under their names, as a whole, which costs half; not
    where there may be a file, which would be written into. whole: nothing is made of the parts of
    files that are there.  trusted: what comes under a name that was not asked for does no harm in
    the destination, and is not looked for, which would be half of the work of small files; it leads
    out of it in no case.  Whatever happens, look at the destination afterwards: rsync's exit status
    says little (a file that changed while it was sent arrives torn, with status 0).  Raises
    OwnFailure when no rsync can be started here.
    """
    options: "List[Any]" = ["-W", "--inplace"] if plain else ["-S",
                                                              b"--partial-dir=" + PART_SUFFIX_DIR]
    options.append("--timeout=%d" % max(60, rsync_idle()))
    if whole and not plain:
        options.append("-W")
    if bwlimit:
        options.append("--bwlimit=%d" % max(1, bwlimit // 1024))
    if always:
        options.append("-I")
    if most is not None:
        options.append("--max-size=%d" % most)
    paths = list(paths)
    with contextlib.closing(connection):
        try:
            kind = _RSYNC_CHECKED[find_rsync()]
            odd = kind.is_open and any(path[:1] in b"#;" for path in paths)
            if trusted and kind.can_trust:
                options.append("--trust-sender")
            with plain_directory() as scratch:
                options += odd and filters_for(paths) or [
                    "--files-from=" + os.path.join(scratch, "list"), "--from0"]
                with open(os.path.join(scratch, "list"), "wb") as stream:
                    stream.write(list_with_parents(paths))
                result = _run_pull(connection, scratch, options, destination, on_bytes)
        except OSError as error:
            raise OwnFailure("rsync could not be started on this machine: %s%s" % (
                shown(os.fsencode(error.filename)) + ": " if error.filename else "",
                reason_of(error)))
    if result.how == "stalled":
        result.errors.append("no byte came for %d s" % rsync_idle())
    return result


def _run_pull(connection: socket.socket, scratch: str, options: "List[Any]", destination: bytes,
              on_bytes: "Callable[[int], None]") -> Pull:
    """Run the client's rsync, with all files of its in the directory `scratch`."""
    out, err, shell = (os.path.join(scratch, name) for name in ("out", "err", "connect"))
    result, process = Pull(), None
    ours, theirs = socket.socketpair()
    with open(shell, "w") as stream:
        stream.write("exec %s -I -S -c %s %d\n"
                     % (shlex.quote(sys.executable), shlex.quote(CONNECT_CODE), theirs.fileno()))
    # sh reads it where nothing may be executed, too; a quote within quotes is written twice for
    # rsync.
    command: "List[Any]" = [find_rsync(), "-ptgo", "--numeric-ids", "--no-implied-dirs",
                            "--chmod=Du+rwx,Fu+rw",
                            "--stats", "-e", "/bin/sh '%s'" % shell.replace("'", "''")]
    try:
        with open(out, "wb") as out_stream, open(err, "wb") as err_stream:
            process = subprocess.Popen(
                command + options + ["cbackup::m/.", destination + b"/"], stdin=subprocess.DEVNULL,
                stdout=out_stream,
                stderr=err_stream, pass_fds=[theirs.fileno()], start_new_session=True,
                env=dict(os.environ, LC_ALL="C"))
        theirs.close()
        ended = _relay_for(process, ours, connection, on_bytes)
        result.code = _reap(process, 20.0 if ended != "stalled" else 2.0)
    finally:
        for end in (ours, theirs):
            with contextlib.suppress(OSError):
                end.close()
        if process is not None:
            _reap(process, 0)
    with open(out, errors="replace") as stream:
        # the second one is openrsync's
        match = re.search(r"Total (?:bytes )?received: ([\d.,]+)", stream.read())
        result.wire = int(re.sub(r"\D", "", match.group(1))) if match else 0
    with open(err, errors="replace") as stream:
        result.errors = [line.strip() for line in stream.readlines()[:2000] if line.strip()]
    result.how = _how_it_ended(ended, result)
    return result


def _how_it_ended(relayed: str, result: Pull) -> str:
    """Pull.how, from what the relay saw ("unstarted": it was never begun) and from what rsync
    said."""
    if relayed == "stalled":
        return "stalled"
    if result.code in RSYNC_ENDED:
        return "done"
    failed_here = result.code < 0 or result.code in RSYNC_OWN and not any(
        word in line for line in result.errors
        for word in ("[sender", "compat.c", "io.c"))  # there the peer had a say
    return "own" if relayed == "unstarted" or relayed == "done" and failed_here else "cut"


def _relay_for(process: "subprocess.Popen[bytes]", ours: socket.socket, connection: socket.socket,
               on_bytes: "Callable[[int], None]") -> str:
    """Take over the pipes of the rsync that was just started and relay them until one side ends,
    see relay(); "unstarted" when it gave none."""
    ours.settimeout(60)
    try:
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(2 * 4))
    except OSError:
        return "unstarted"
    pipes: "List[int]" = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            pipes += [int.from_bytes(data[i:i + 4], sys.byteorder)
                      for i in range(0, len(data) - len(data) % 4, 4)]
    try:
        return relay(connection, pipes[0], pipes[1], rsync_idle(),
                     on_bytes) if len(pipes) == 2 else "unstarted"
    finally:
        for descriptor in pipes:
            os.close(descriptor)
        ours.close()


def _reap(process: "subprocess.Popen[bytes]", patience: float) -> int:
    """Wait for a process that should end, then kill its whole group: rsync is two or three
    processes."""
    try:
        return process.wait(patience) if patience else process.wait(0.001)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait(3)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def loopback_pair() -> "Tuple[socket.socket, socket.socket]":
    """What socketpair() gives, as a TCP connection: openrsync serves nothing else.  Only the
    connection that is made here is accepted, whoever else finds the port."""
    ours = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.settimeout(CONNECT_TIMEOUT)
            listener.bind(("127.0.0.1", 0))
            listener.listen(16)
            ours.settimeout(CONNECT_TIMEOUT)
            ours.connect(listener.getsockname())
            while True:
                theirs, peer = listener.accept()
                if peer == ours.getsockname():
                    break
                theirs.close()
    except BaseException:
        ours.close()
        raise
    for end in (ours, theirs):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setblocking(True)
    return ours, theirs


_WILD = re.compile(rb"[*?[\r\n]")


def nothing_but(paths: "Iterable[bytes]", also_dotted: bool = False) -> bytes:
    """Rules for `exclude from`, of which the first that matches decides: these paths and the
    directories above them, nothing else; `also_dotted`: under ./, too."""
    rules, paths = [b"+ /.\n"] if also_dotted else [], set(paths)
    # first: rsync goes through the rules for each of them, and for each file in it
    above = with_parents(paths) - paths
    for name in sorted(above) + sorted(paths):
        # With a wildcard in it a backslash makes plain what follows; a line's end can only be any
        # character.
        if _WILD.search(name):
            name = re.sub(rb"[\r\n]", b"?", re.sub(rb"([*?[\\])", rb"\\\1", name))
        rules.append(b"+ /" + name + b"\n" + (b"+ /./" + name + b"\n" if also_dotted else b""))
    return b"".join(rules) + b"- /**\n"


def serve_rsync(connection: socket.socket, root: str, only: "Optional[List[bytes]]" = None) -> None:
    """Serve the tree `root`, read-only, to the rsync of an authenticated peer at the other end of
    `connection`; with `only`, nothing but these paths of it, except by openrsync."""
    rsync = find_rsync()
    kind = _RSYNC_CHECKED[rsync]
    as_root = os.geteuid() == 0
    ours, theirs = loopback_pair() if kind.is_open else socket.socketpair()
    process = None
    with plain_directory() as scratch:
        # rsync's configuration cannot hold every path (blanks at the end, newlines, %): a symlink
        # of ours can.
        tree, configuration, rules = (os.path.join(scratch, name) for name in ("t", "conf", "only"))
        os.symlink(root, tree)
        limited = only is not None and not kind.is_open
        if limited:
            with open(rules, "wb") as raw:
                raw.write(nothing_but(only or (), kind.is_old))
        with open(configuration, "w") as stream:
            stream.write(RSYNC_DAEMON_CONFIG.format(
                chroot="yes" if as_root else "no", path=tree, owner="uid = 0\ngid = 0\n" if as_root
                else "",
                only="exclude from = %s\n" % rules if limited else ""))
        try:
            process = subprocess.Popen([rsync, "--daemon", "--config=" + configuration],
                                       stdin=theirs, stdout=theirs,
                                       stderr=subprocess.DEVNULL, start_new_session=True)
            theirs.close()
            how = relay(connection, ours.fileno(), ours.fileno(), 900.0, lambda count: None)
            ours.close()
            _reap(process, 5.0 if how == "done" else 0.2)
        finally:
            for end in (ours, theirs):
                with contextlib.suppress(OSError):
                    end.close()
            if process is not None:
                _reap(process, 0)


# ==== 11. The backup: a location's own database, catalogs and directory ===========================

VAULT_SCHEMA_VERSION = 4

VAULT_SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value);

-- What lies at PATH/SOURCE/path and was confirmed.  size, mtime: of the source's version.
CREATE TABLE held(
    source TEXT, path BLOB, size INTEGER, mtime INTEGER, digest BLOB, tag INTEGER, checked REAL,
    PRIMARY KEY(source, path)) WITHOUT ROWID;
CREATE INDEX held_checked ON held(checked);

-- Claimed and on its way.  stage 0: being copied to `incoming`; 1: confirmed, being put into its
-- place.
CREATE TABLE coming(
    source TEXT, path BLOB, size INTEGER, mtime INTEGER, mode INTEGER, uid INTEGER, gid INTEGER,
    version INTEGER,
    books TEXT, digest BLOB, stage INTEGER DEFAULT 0, PRIMARY KEY(source, path)) WITHOUT ROWID;

-- Old versions, at PATH/.cbackup/<stored>.  done 0: the rename may not have happened yet.
CREATE TABLE attic(
    id INTEGER PRIMARY KEY, source TEXT, path BLOB, stored BLOB, size INTEGER, mtime INTEGER,
    digest BLOB,
    since REAL, why TEXT, done INTEGER DEFAULT 0);
CREATE INDEX attic_since ON attic(since);
CREATE INDEX attic_path ON attic(source, path);
CREATE INDEX attic_under_way ON attic(source, path) WHERE done=0;

-- Renames under way; ino tells after a crash how far each came.
CREATE TABLE moving(id INTEGER PRIMARY KEY, source TEXT, old BLOB, new BLOB, ino INTEGER,
    cursor INTEGER);

-- Granted drops that are being carried out.
CREATE TABLE dropping(source TEXT, path BLOB, PRIMARY KEY(source, path)) WITHOUT ROWID;

-- Triggers take away what goes; what comes, thousands at a time, hold_all and expect add.
CREATE TABLE sums(source TEXT PRIMARY KEY, files INTEGER, bytes INTEGER,
    tags INTEGER) WITHOUT ROWID;
CREATE TABLE used(what TEXT PRIMARY KEY, bytes INTEGER) WITHOUT ROWID;
INSERT INTO used VALUES('coming', 0), ('attic', 0);
CREATE TRIGGER held_out AFTER DELETE ON held BEGIN
    UPDATE sums SET files=files-1, bytes=bytes-OLD.size,
    tags=tags-OLD.tag WHERE source=OLD.source; END;
CREATE TRIGGER coming_out AFTER DELETE ON coming BEGIN UPDATE used SET bytes=bytes-OLD.size WHERE
    what='coming'; END;
CREATE TRIGGER attic_in AFTER INSERT ON attic BEGIN UPDATE used SET bytes=bytes+NEW.size WHERE
    what='attic'; END;
CREATE TRIGGER attic_out AFTER DELETE ON attic BEGIN UPDATE used SET bytes=bytes-OLD.size WHERE
    what='attic'; END;
"""


VAULT_UPGRADES: "Dict[int, str]" = {1: """
""", 2: """
CREATE INDEX attic_under_way ON attic(source, path) WHERE done=0;
""", 3: """
DROP TRIGGER IF EXISTS held_in;
DROP TRIGGER IF EXISTS coming_in;
"""}
"""Layout -> the SQL that makes the next layout of a backup's database of it."""


class Grant(namedtuple("Grant", "source path")):
    """A server's committed permission to delete the copy of `path` (bytes) of `source`: what
    `Vault.delete` asks for."""

    __slots__ = ()


class Misplaced(CBackupError):
    """A backup directory that is not what the configuration says: not mounted, of another cluster,
    another's."""


NOT_IN_USE = re.compile(
    r"(lost\+found|\.DS_Store|\.Trashes|\.Trash-\d+|\.Spotlight-V100|\.fseventsd|\.TemporaryItems"
    r"|\.DocumentRevisions-V100|\.apdisk|\.VolumeIcon\.icns|\.zfs|\.snap|\.snapshots?"
    r"|System Volume Information|\$RECYCLE\.BIN|@eaDir|#recycle)\Z")
"""What systems put into the root of a file system by themselves: a directory with nothing else in
it is empty."""


def in_use_by_others(path: str) -> "List[str]":
    """The names in a directory that is to become a backup, and that is not empty; [] when it is, or
    is not there.  What our own first pass had made of .cbackup before it was cut off is nothing."""
    try:
        names = {name for name in os.listdir(path) if not NOT_IN_USE.match(name)}
        if META_DIR.decode() in names and all(
                re.match(r"identity\.\d+\.new\Z", name)
                for name in os.listdir(os.path.join(path, META_DIR.decode()))):
            names.remove(META_DIR.decode())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(names)


def room_limit(spec: Backup, settled: int) -> int:
    """The most bytes that may lie in a backup now: its `size`, and less when its file system would
    have less left than `reserve`, or than our own databases need.  `settled`: bytes that lie there
    already."""
    info = os.statvfs(spec.path)
    own = min(DATABASE_ROOM, info.f_blocks * info.f_frsize // 20)
    room = max(0, settled + info.f_bavail * info.f_frsize - max(own, spec.reserve or 0))
    return room if spec.size is None else min(room, spec.size)


CLOCK_SLACK = 600.0
"""Seconds by which a host's clock may differ from the servers' before it is called wrong."""

DATABASE_ROOM = 64 << 20
"""Bytes that stay free on a backup's file system for our database, or 5 % of a small file system: a
file system that is full to the last byte cannot even be told what to delete."""


class BackupDirectory(Store):
    """One backup: whose directory it is, what it holds, how much room it has, and the only function
    that deletes in it.

    Paths given to methods are those of the source; `place_of` says where they lie.  Use it by one
    thread at a time (`lock` guards the database for the confirming thread).
    """

    def __init__(self, spec: Backup, cluster: str, expected: "Optional[str]" = None,
                 adopt: bool = False,
                 foreign: bool = False) -> None:
        """Open the backup, make it when it is new.  `cluster`: Home.cluster_id.  `expected`: the
        identity that was seen here before.  `adopt`: take what is there; `foreign`: even when it is
        of another cluster, whose key is lost. Raises Misplaced when the directory is not this
        backup's."""
        self.spec, self.name = spec, spec.name
        self.path = os.fsencode(spec.path)
        self.meta_path = os.path.join(spec.path, META_DIR.decode())
        super().__init__()
        identity = self._identify(cluster, expected, adopt, foreign)
        self.identity: str = identity["id"]
        self.tree = Tree(self.path, own_links=True)
        self._close_to_others()
        self.db = open_database(os.path.join(self.meta_path, "backup.db"), VAULT_SCHEMA,
                                VAULT_SCHEMA_VERSION,
                                "DELETE", VAULT_UPGRADES)
        self.db.execute("CREATE TEMP TABLE kept(source TEXT PRIMARY KEY) WITHOUT ROWID")
        self.clock_wrong, self._kept_bytes = False, 0
        self._folding: "Optional[str]" = None
        self.stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(clock.now())).encode()

    def _identify(self, cluster: str, expected: "Optional[str]", adopt: bool,
                  foreign: bool) -> "Dict[str, Any]":
        path = os.path.join(self.meta_path, "identity")
        identity = read_json(path)
        if not identity.get("id"):
            if expected and not adopt:
                raise Misplaced("%s: %s was in use and has lost its .cbackup: is its disk mounted? "
                                " If this is the right, new directory: cbackup.pyz client --adopt "
                                "%s"
                                % (self.name, self.spec.path, self.name))
            try:
                self._check_empty(adopt)
                os.makedirs(self.spec.path, mode=0o700, exist_ok=True)
                os.makedirs(self.meta_path, mode=0o700, exist_ok=True)
                identity = {"id": secrets.token_hex(8), "cluster": cluster, "backup": self.name}
                atomic_write(path, json.dumps(identity).encode())
                fsync_directory(self.spec.path)
            except OSError as error:
                raise Misplaced("%s: %s: %s"
                                % (self.name, error.filename or self.spec.path, reason_of(error)))
        elif identity.get("cluster") != cluster and not (adopt and foreign):
            raise Misplaced("%s: %s belongs to another cluster; choose another directory; or, if "
                            "it is yours and no machine has its key any more: cbackup.pyz client "
                            "--adopt %s%s" % (
                                self.name, self.spec.path, self.name, " --yes" if adopt else ""))
        elif (identity.get("cluster"), identity.get("backup")) != (cluster, self.name) \
                or expected not in (None, identity["id"]):
            if not adopt:
                raise Misplaced("%s: %s is the backup %s (%s), not the one that was here; if that "
                                "is right: cbackup.pyz client --adopt %s"
                                % (self.name, self.spec.path, identity.get("backup"),
                                   identity["id"][:6], self.name))
            identity.update(backup=self.name, cluster=cluster)
            atomic_write(path, json.dumps(identity).encode())
        return identity

    def _close_to_others(self) -> None:
        """What lies here is for nobody else: a copy has the mode of its file, whose directory may
        have been closed."""
        for name in self.tree.list():
            info = self.tree.lstat(name)
            if info is not None and stat.S_ISDIR(info.st_mode) \
                    and stat.S_IMODE(info.st_mode) != 0o700 and (
                    name == META_DIR
                    or os.path.isdir(os.path.join(os.fsencode(self.meta_path), b"catalog", name))):
                with contextlib.suppress(OSError):  # on some file systems there are no modes
                    self.tree.chmod(name, 0o700)

    def _check_empty(self, adopt: bool) -> None:
        """Refuse to make a backup of a directory that somebody uses for something else."""
        names = [] if adopt else in_use_by_others(self.spec.path)
        if names:
            raise Misplaced("%s: %s is not empty and is no backup (it has %s%s): nothing in it was "
                            "touched.  Choose another directory; or, if these are copies of a "
                            "backup whose .cbackup is lost: cbackup.pyz client --adopt %s" % (
                                self.name, self.spec.path,
                                ", ".join(shown(os.fsencode(name)) for name in names[:3]),
                                ", ..." if len(names) > 3 else "", self.name))

    def close(self) -> None:
        self.tree.close()
        self.db.close()

    @contextlib.contextmanager
    def locked(self, wait: bool = False) -> "Iterator[None]":
        """Keep other clients out of this backup.  Raises Busy."""
        with open(os.path.join(self.meta_path, "lock"), "a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError:
                raise Busy("%s: another client is at work in %s" % (self.name, self.spec.path))
            yield

    # -- places --

    @staticmethod
    def place_of(source: str, path: bytes) -> bytes:
        return source.encode() + b"/" + path

    @staticmethod
    def incoming(source: str, path: bytes = b"") -> bytes:
        return META_DIR + b"/incoming/" + source.encode() + (b"/" + path if path else b"")

    # -- deleting, the dangerous verb --

    def delete(self, rel: bytes, grant: "Optional[Grant]") -> None:
        """Delete one file: the only place in the program that does so in a backup.

        Outside of .cbackup/ it wants the server's grant for just this file.  A file that is gone
        already is no error: the grant may be carried out twice.
        """
        own = rel.startswith(tuple(META_DIR + b"/%s/" % kind
                                   for kind in (b"attic", b"incoming", b"bad", b"moving")))
        if not own and (grant is None or self.place_of(grant.source, grant.path) != rel):
            raise AssertionError("deleting %r without a grant" % rel)
        try:
            self.tree.unlink(rel)
        except OSError as error:
            info = self.tree.lstat(rel)
            # in `incoming`: at its source it became one
            if info is not None and stat.S_ISDIR(info.st_mode):
                self.tree.clear_empty(rel)
            elif error.errno not in (errno.ENOENT, errno.ENOTDIR) + Tree.IMPOSSIBLE:
                raise
        if own and not rel.startswith(META_DIR + b"/incoming/"):
            self._prune(rel)  # not in `incoming`, where an rsync may be about to use the directory

    def _prune(self, rel: bytes) -> None:
        """Remove the directories above a deleted file as far as they are empty; never .cbackup's
        own."""
        above = rel.rpartition(b"/")[0]
        while above.count(b"/") >= 2:
            try:
                self.tree.rmdir(above)
            except OSError:
                return
            above = above.rpartition(b"/")[0]

    # -- room --

    def used(self) -> int:
        """Bytes of copies, of files on their way and of the attic."""
        return self.one("SELECT (SELECT COALESCE(SUM(bytes), 0) FROM sums) + (SELECT SUM(bytes) "
                        "FROM used)")[0]

    def attic_bytes(self) -> int:
        return self.one("SELECT bytes FROM used WHERE what='attic'")[0]

    def files(self) -> int:
        return self.one("SELECT COALESCE(SUM(files), 0) FROM sums")[0]

    def capacity(self) -> int:
        """The most that may lie here now, see `room_limit`."""
        coming = self.one("SELECT bytes FROM used WHERE what='coming'")[0]
        return room_limit(self.spec, self.used() - coming)

    def free(self) -> int:
        """Room for copies, bytes; negative when over capacity.  Old versions do not count against
        it: they go when the room is needed (`make_room`), but for those that are to be kept
        (`keep_old`)."""
        return self.capacity() - self.used() + self.attic_bytes() - self._kept_bytes

    # -- copies --

    def hold(self, source: str, path: bytes, size: int, mtime: int, digest: bytes,
             checked: float) -> None:
        self.hold_all(source, [(path, size, mtime, digest, checked)])

    def hold_all(self, source: str, rows: "Iterable[Tuple[bytes, int, int, bytes, float]]",
                 tags: "Optional[Dict[bytes, int]]" = None) -> None:
        """Enter copies: (path, size, mtime, digest, when it was read).  tags: those that are known,
        of just these facts."""
        tags = tags or {}
        rows = [(source, path, size, mtime, digest,
                 tags[path] if path in tags else tag_of(path, size, mtime, digest), checked)
                for path, size, mtime, digest, checked in rows]
        with self.write() as db:
            db.executemany("DELETE FROM held WHERE source=? AND path=?",
                           self._those_in("held", source, [row[1] for row in rows]))
            db.executemany("INSERT INTO held VALUES(?,?,?,?,?,?,?)", rows)
            db.execute("INSERT OR IGNORE INTO sums VALUES(?,0,0,0)", (source,))
            db.execute("UPDATE sums SET files=files+?, bytes=bytes+?, tags=tags+? WHERE source=?",
                       (len(rows), sum(row[2] for row in rows), sum(row[5] for row in rows),
                        source))

    def _those_in(self, table: str, source: str,
                  paths: "Iterable[bytes]") -> "List[Tuple[str, bytes]]":
        """(source, path) of what a table has of many paths: to ask costs less than to change what
        is not there, one by one."""
        return [(source, path) for (path,) in self.rows_among(
            "SELECT path FROM %s WHERE source=? AND path AMONG" % table, paths, source)]

    def held(self, source: str, path: bytes) -> "Optional[Tuple[int, int, bytes, int]]":
        """(size, mtime, digest, tag) of a copy; None when we have none."""
        return self.one("SELECT size, mtime, digest, tag FROM held WHERE source=? AND path=?",
                        source, path)

    def is_known(self, source: str, path: bytes) -> bool:
        """Whether a file may lie at the place of `path`: a copy, one that is about to be, or one
        that is to be deleted."""
        return self.one("SELECT 1 FROM held WHERE source=? AND path=? UNION SELECT 1 FROM coming "
                        "WHERE source=? AND path=? AND stage=1 UNION SELECT 1 FROM dropping "
                        "WHERE source=? AND path=?",
                        *(source, path) * 3) is not None

    def held_page(self, source: str, after: bytes,
                  limit: int = PAGE) -> "List[Tuple[bytes, int, int, bytes, int]]":
        """(path, size, mtime, digest, tag) of copies, by path."""
        return self.rows("SELECT path, size, mtime, digest, tag FROM held "
                         "WHERE source=? AND path>? ORDER BY path LIMIT ?",
                         source, after, limit)

    def sum_of(self, source: str) -> "Tuple[int, int, int]":
        row = self.one("SELECT files, bytes, tags FROM sums WHERE source=?", source)
        return (row[0], row[1], row[2]) if row else (0, 0, 0)

    def sources(self) -> "List[str]":
        return [row[0] for row in self.rows(
            "SELECT source FROM sums WHERE files>0 ORDER BY source")]


class Folding(BackupDirectory):
    """What this file system makes of names and of metadata: some take two names for one."""

    @property
    def folds(self) -> bool:
        """Whether this file system takes names for the same that differ."""
        if self._folding is None:
            self._folding = self._learn_folding()
        return "c" in self._folding or "f" in self._folding

    def _learn_folding(self) -> str:
        """What this file system does with names: c, case is the same; f, normal forms are the same;
        n, a name comes back in another form than it was given.  Tried out once, and again on a disk
        to which all was copied from one of another kind, as far as that shows without writing."""
        known, case = self.meta("folding"), self.tree.lstat(META_DIR.upper()) is not None
        if known is not None and ("c" in known) == case:
            return str(known)
        known, probe = "c" if case else "", META_DIR + "/probe-\u00e9".encode()
        with contextlib.suppress(OSError):  # without such letters there are no forms of them
            self.tree.make_directory(probe)
            known += "f" if self.tree.lstat(META_DIR
                                            + "/probe-e\u0301".encode()) is not None else ""
            known += "n" if probe.rpartition(b"/")[2] not in self.tree.list(META_DIR) else ""
            self.tree.rmdir(probe)
        self.set_meta("folding", known)
        return known

    def anothers(self, place: bytes) -> "Optional[bytes]":
        """The path of the file whose place this is, when that is another one that this file system
        takes for the same; also of a file that is not ours."""
        if not self.folds or self.tree.lstat(place) is None:
            return None
        name, _, path = place.partition(b"/")
        source, here = as_text(name), self._listed(place)
        self._fold_all()
        for (other,) in self.rows("SELECT path FROM temp.folded "
                                  "WHERE source=? AND key=? AND path<>?",
                                  source, fold_key(path), path):
            if self._listed(name + b"/" + other) == here:
                return other
        strange = here.rpartition(b"/")[2] != place.rpartition(b"/")[2] \
            and "n" not in str(self._folding)
        return here[len(name) + 1:] if strange and not self.held(source, path) else None

    def _listed(self, rel: bytes) -> bytes:
        """The path under which a file system that folds names lists what it finds at `rel`."""
        above = b""
        for part in rel.split(b"/"):
            names = self.tree.list(above)
            if part not in names:
                part = next((name for name in names if fold_key(name) == fold_key(part)), part)
            above = above + b"/" + part if above else part
        return above

    def _fold_all(self) -> None:
        """Make the table of the folded names of our copies, and keep it up to date; once, when
        something is to be done."""
        with self.lock:
            if self.db.execute("SELECT 1 FROM temp.sqlite_master WHERE name='folded'").fetchone():
                return
            self.db.create_function("fold_key", 1, fold_key)
            self.db.execute("CREATE TEMP TABLE folded(source TEXT, key BLOB, path BLOB, PRIMARY "
                            "KEY(source, key, path)) WITHOUT ROWID")
            for table, which in (("held", ""), ("coming", " WHERE stage=1")):
                self.db.execute("INSERT OR IGNORE INTO folded SELECT source, fold_key(path), path "
                                "FROM main.%s%s" % (table, which))
            added = "BEGIN INSERT OR IGNORE INTO folded " \
                "VALUES(NEW.source, fold_key(NEW.path), NEW.path); END"
            self.db.execute("CREATE TEMP TRIGGER folded_held AFTER INSERT ON main.held " + added)
            self.db.execute("CREATE TEMP TRIGGER folded_coming AFTER UPDATE OF stage ON "
                            "main.coming " + added)
            for table, other in (("held", "coming"), ("coming", "held")):
                self.db.execute(
                    "CREATE TEMP TRIGGER folded_not_%s AFTER DELETE ON main.%s WHEN NOT "
                    "EXISTS(SELECT 1 FROM main.%s o WHERE o.source=OLD.source AND o.path=OLD.path) "
                    "BEGIN DELETE FROM folded WHERE source=OLD.source AND key=fold_key(OLD.path) "
                    "AND path=OLD.path; END" % (table, table, other))

    def is_here_as(self, source: str, path: bytes) -> bool:
        """Whether `path`, as this file system lists it, is one of our copies under a name that it
        has folded."""
        if not self.folds:
            return False
        self._fold_all()
        return self.one("SELECT 1 FROM temp.folded WHERE source=? AND key=?", source,
                        fold_key(path)) is not None

    def _own_at(self, source: str,
                paths: "Iterable[bytes]") -> "Iterator[Optional[os.stat_result]]":
        """The stat of what stands at each file's place; None also when that is another's."""
        places = [self.place_of(source, path) for path in paths]
        for place, info in zip(places, stats_of(self.tree, places)):
            yield None if info is None or self.anothers(place) is not None else info

    def clear_the_way(self, place: bytes) -> None:
        """Remove what our skeleton (empty directories, symlinks) has at a file's place.

        Raises OSError for a directory with files in it, and for a name that this file system takes
        for another.
        """
        info, other = self.tree.lstat(place), self.anothers(place)
        if info is None:
            return
        if other is not None:
            raise OSError(errno.EEXIST,
                          "it %s, which is here" % difference(other, place.partition(b"/")[2]))
        if stat.S_ISLNK(info.st_mode):
            self.tree.unlink(place)
        elif stat.S_ISDIR(info.st_mode):
            self.tree.clear_empty(place, links=True)
            if self.tree.lstat(place) is not None:
                raise OSError(errno.ENOTEMPTY, "a directory with other files is in its place")

    def set_metadata(self, rel: bytes, mode: int, uid: int, gid: int, mtime: int,
                     info: "Optional[os.stat_result]" = None) -> None:
        """Mode, times and, as root, owner, where they are others; `info`: its stat, when it was
        asked for just now.  What the file system cannot do is no error: the catalog has it, and
        with it what a copy never has: a program here is not to run as somebody else."""
        info, mode = info or self.tree.lstat(rel), mode & 0o777
        if os.geteuid() != 0:
            mode |= 0o400  # we must be able to read it back
        elif info is None or (info.st_uid, info.st_gid) != (uid, gid):
            with contextlib.suppress(OSError):
                self.tree.chown(rel, uid, gid)
            info = info and self.tree.lstat(rel)  # a new owner may have cost it some of its mode
        if info is None or stat.S_IMODE(info.st_mode) != mode:
            with contextlib.suppress(OSError):
                self.tree.chmod(rel, mode)
        if info is None or info.st_mtime_ns != mtime:
            with contextlib.suppress(OSError):
                self.tree.set_mtime(rel, mtime)


class Attic(Folding):
    """Old versions, below .cbackup/, and what goes by the server's grant."""

    def keep_old(self, sources: "Iterable[str]", clock_wrong: bool) -> None:
        """What holds until the next call: old versions of `sources` (those that are held) neither
        expire nor give room, and with a wrong clock nothing expires."""
        self.clock_wrong = clock_wrong
        with self.lock:
            self.db.execute("DELETE FROM temp.kept")
            self.db.executemany("INSERT OR IGNORE INTO temp.kept VALUES(?)",
                                [(source,) for source in sources])
            self._kept_bytes = self.one(
                "SELECT COALESCE(SUM(size), 0) FROM attic "
                "WHERE source IN (SELECT source FROM temp.kept)")[0]

    def keeps_old(self, source: str) -> bool:
        """Whether nothing that is old of this source may go now, see `keep_old`."""
        return self.clock_wrong or self.one("SELECT 1 FROM temp.kept WHERE source=?",
                                            source) is not None

    OLD = "SELECT id, stored, size, since, why FROM attic WHERE done=1 " \
        "AND source NOT IN (SELECT source FROM temp.kept) "

    def make_room(self, need: int, keep: float = 0.0) -> "Tuple[int, int]":
        """Delete old versions, oldest first, until `need` bytes are free.  Returns (files, bytes)
        of those that had not been there for `keep` seconds yet."""
        files = size = 0
        while True:
            missing, some = need - (self.capacity() - self.used()), []
            for row in self.rows(self.OLD + "ORDER BY since, id LIMIT 500") if missing > 0 else ():
                if missing <= 0:
                    break
                some.append(row)
                missing -= row[2]
                if row[4] != "bad" and (self.clock_wrong or row[3] > clock.now() - keep):
                    files, size = files + 1, size + row[2]
            if not some:
                return files, size
            self._delete_old([row[:2] for row in some])

    def expire_attic(self, keep: float) -> None:
        """Delete what has been in the attic for `keep` seconds."""
        if self.clock_wrong:
            return
        # the clock was ahead when these came: they would stay for too long
        with self.write() as db:
            db.execute("UPDATE attic SET since=? WHERE since>?",
                       (clock.now(), clock.now() + CLOCK_SLACK))
        while True:
            page = self.rows(self.OLD + "AND since<? LIMIT 500", clock.now() - keep)
            if not page:
                return
            self._delete_old([row[:2] for row in page])

    def _delete_old(self, rows: "List[Tuple[int, bytes]]") -> None:
        """Delete old versions, (number, name in .cbackup): the files first, for they may be gone
        twice."""
        for _, stored in rows:
            self.delete(META_DIR + b"/" + stored, None)
        with self.write() as db:
            db.executemany("DELETE FROM attic WHERE id=?", [(number,) for number, _ in rows])

    def attic_name(self, source: str, path: bytes, kind: bytes = b"attic") -> bytes:
        """A free name (below .cbackup) for an old version: attic/SOURCE/TIME/path."""
        for count in range(1000):
            stamp = self.stamp + (b"-%d" % count if count else b"")
            stored = b"/".join((kind, source.encode(), stamp, path))
            if not self._attic_taken(source, path, stored):
                return stored
        raise CBackupError("no name left in the attic for %s" % shown(path))

    def _attic_taken(self, source: str, path: bytes, stored: bytes) -> bool:
        """Whether something lies, or is to lie, at `stored`, below it, or where it needs a
        directory: within one second a path may have been a file and a directory."""
        below = self.one("SELECT 1 FROM attic "
                         "WHERE source=? AND path>? AND path<? AND stored>? AND stored<? LIMIT 1",
                         source, path + b"/", path + b"0", stored + b"/", stored + b"0")
        if below or self.tree.lstat(META_DIR + b"/" + stored) is not None:
            return True
        while path:
            if self.one("SELECT 1 FROM attic WHERE source=? AND path=? AND stored=?", source, path,
                        stored):
                return True
            path, stored = path.rpartition(b"/")[0], stored.rpartition(b"/")[0]
            info = self.tree.lstat(META_DIR + b"/" + stored) if path else None
            if info is not None:
                return not stat.S_ISDIR(info.st_mode)
        return False

    def set_aside(self, source: str, paths: "List[bytes]", why: str) -> None:
        """Move files of this backup into the attic (`why`: changed, deleted, found or bad) and
        forget them as copies."""
        names = []
        with self.write() as db:
            for path, info in zip(paths, self._own_at(source, paths)):
                row = self.one("SELECT size, mtime, digest FROM held WHERE source=? AND path=?",
                               source, path)
                db.execute("DELETE FROM held WHERE source=? AND path=?", (source, path))
                if info is None or not stat.S_ISREG(info.st_mode):
                    continue
                stored = self.attic_name(source, path, b"bad" if why == "bad" else b"attic")
                size, mtime, digest = row if row and why != "bad" \
                    else (info.st_size, info.st_mtime_ns, None)
                number = db.execute(
                    "INSERT INTO attic(source, path, stored, size, mtime, digest, since, why) "
                    "VALUES(?,?,?,?,?,?,?,?)",
                    (source, path, stored, info.st_size, mtime, digest, clock.now(), why)).lastrowid
                names.append((number, path, stored))
        test_point("set-aside-planned")
        touched: "List[bytes]" = []
        for _, path, stored in names:
            self.tree.rename(self.place_of(source, path), META_DIR + b"/" + stored)
            touched += [META_DIR + b"/" + stored, self.place_of(source, path)]
        self.tree.sync(touched)
        with self.write() as db:
            db.executemany("UPDATE attic SET done=1 WHERE id=?",
                           [(number,) for number, _, _ in names])

    def _finish_attic(self) -> None:
        """Renames into the attic that a crash left undone."""
        for number, source, path, \
                stored in self.rows("SELECT id, source, path, stored FROM attic WHERE done=0"):
            place = self.place_of(source, path)
            held = self.one("SELECT 1 FROM held WHERE source=? AND path=?", source, path)
            coming = self.one("SELECT 1 FROM coming WHERE source=? AND path=? AND stage=1", source,
                              path)
            if coming:
                continue
            if self.tree.lstat(META_DIR + b"/" + stored) is None:
                info = self.tree.lstat(place)
                if held or info is None or not stat.S_ISREG(info.st_mode):
                    with self.write() as db:
                        db.execute("DELETE FROM attic WHERE id=?", (number,))
                    continue
                self.tree.rename(place, META_DIR + b"/" + stored)
                self.tree.sync([META_DIR + b"/" + stored, place])
            with self.write() as db:
                db.execute("UPDATE attic SET done=1 WHERE id=?", (number,))

    # -- drops --

    def drop(self, grants: "List[Grant]") -> int:
        """Carry out grants; returns the bytes freed.  The rows go first: a row without a file would
        be counted as a copy; what is still to be deleted is written down with it."""
        freed = 0
        with self.write() as db:
            for grant in grants:
                row = self.one("SELECT size FROM held WHERE source=? AND path=?", grant.source,
                               grant.path)
                freed += row[0] if row else 0
                db.execute("DELETE FROM held WHERE source=? AND path=?", (grant.source, grant.path))
                db.execute("INSERT OR IGNORE INTO dropping VALUES(?,?)", (grant.source, grant.path))
        test_point("drop-before-delete")
        self._carry_out_drops()
        return freed

    def _carry_out_drops(self) -> None:
        rows = self.rows("SELECT source, path FROM dropping")
        for source, path in rows:
            self.delete(self.place_of(source, path), Grant(source, path))
        if rows:
            self.tree.sync([self.place_of(source, path) for source, path in rows])
            with self.write() as db:
                db.executemany("DELETE FROM dropping WHERE source=? AND path=?", rows)

    def forget_source(self, source: str) -> int:
        """Delete all copies and old versions of a source that is no longer configured: the user's
        word is the grant. Returns how many copies went."""
        count = 0
        while True:
            page = self.held_page(source, b"")
            if not page:
                break
            self.drop([Grant(source, row[0]) for row in page])
            count += len(page)
        for old in in_batches(self.rows("SELECT id, stored FROM attic WHERE source=?", source)):
            self._delete_old(old)
        self.tree.clear_empty(source.encode(), links=True)
        shutil.rmtree(os.path.join(self.meta_path, "catalog", source), ignore_errors=True)
        return count


class Journal(Attic):
    """Steps that are written down before they are done on the disk, so that `recover` finishes what
    was cut off: files on their way in, and renames."""

    # -- files on their way in --

    def expect(self, source: str, books: str, files: "List[Wanted]") -> None:
        """Write down claims before anything is copied."""
        with self.write() as db:
            db.executemany("DELETE FROM coming WHERE source=? AND path=?",
                           self._those_in("coming", source, [f.path for f in files]))
            db.executemany("INSERT INTO coming(source, path, size, mtime, mode, uid, gid, version, "
                           "books) "
                           "VALUES(?,?,?,?,?,?,?,?,?)",
                           [(source, f.path, f.size, f.mtime, f.mode, f.uid, f.gid, f.version,
                             books) for f in files])
            db.execute("UPDATE used SET bytes=bytes+? WHERE what='coming'",
                       (sum(f.size for f in files),))

    def give_up(self, source: str, paths: "Iterable[bytes]", keep_parts: bool = False) -> None:
        """Forget files that were on their way, and what arrived of them."""
        paths = list(paths)
        with self.write() as db:
            db.executemany("DELETE FROM coming WHERE source=? AND path=?",
                           [(source, path) for path in paths])
        if not keep_parts:
            for path in paths:
                self.delete(self.incoming(source, path), None)

    def sweep_incoming(self) -> None:
        """Delete what lies in `incoming` for files that are no longer expected (and rsync's
        leftovers)."""
        incoming = META_DIR + b"/incoming"
        for rel in list(self.tree.walk_files(incoming)):
            source, _, path = rel[len(incoming) + 1:].partition(b"/")
            parts = path.split(b"/")
            if len(parts) > 1 and parts[-2] == PART_SUFFIX_DIR:
                path = b"/".join(parts[:-2] + parts[-1:])
            if not self.one("SELECT 1 FROM coming WHERE source=? AND path=? AND stage<2",
                            as_text(source), path):
                self.delete(rel, None)
        self.tree.clear_empty(incoming)

    def empty_incoming(self) -> None:
        """Delete what is only half here, without the database: it may be the disk that is full."""
        with contextlib.suppress(OSError, sqlite3.Error):
            keep = {self.incoming(s, p)
                    for s, p in self.rows("SELECT source, path FROM coming WHERE stage=1")}
            for rel in list(self.tree.walk_files(META_DIR + b"/incoming")):
                if rel not in keep:
                    self.delete(rel, None)

    def prepare_basis(self, source: str, path: bytes) -> None:
        """Give rsync the present version as the basis of a difference: a second link to it in
        `incoming`."""
        staged = self.incoming(source, path)
        if self.tree.lstat(staged) is None:
            with contextlib.suppress(OSError):
                self.tree.link(self.place_of(source, path), staged)

    def plan_places(self, source: str, rows: "List[Tuple[bytes, bytes]]") -> "set[bytes]":
        """(path, digest) were confirmed: write down that they go to their places, and old versions
        to the attic.  Returns the paths at whose places there is nothing."""
        bare: "set[bytes]" = set()
        with self.write() as db:
            db.executemany("UPDATE coming SET digest=?, stage=1 WHERE source=? AND path=?",
                           [(digest, source, path) for path, digest in rows])
            paths = [path for path, _ in rows]
            for path, info in zip(paths, self._own_at(source, paths)):
                if info is None and not self.folds:
                    bare.add(path)
                if info is None or not stat.S_ISREG(info.st_mode):
                    continue
                row = self.one("SELECT mtime, digest FROM held WHERE source=? AND path=?", source,
                               path)
                mtime, old = row or (info.st_mtime_ns, None)
                db.execute("INSERT INTO attic(source, path, stored, size, mtime, digest, since, "
                           "why) VALUES(?,?,?,?,?,?,?,?)",
                           (source, path, self.attic_name(source, path), info.st_size, mtime, old,
                            clock.now(),
                            "changed" if row else "found"))
        return bare

    def under_way(self, source: str) -> "List[Tuple[bytes, bytes]]":
        """(path, name in the attic) of the versions that `plan_places` sent there and nobody has
        said are there."""
        return self.rows("SELECT path, stored FROM attic WHERE source=? AND done=0", source)

    def planned(self, source: str) -> "Dict[bytes, Tuple[Any, ...]]":
        """What `plan_places` wrote down and nobody has ended: path -> (mode, uid, gid, mtime, name
        in the attic for what is at the place, or None)."""
        old = dict(self.under_way(source))
        return {row[0]: row[1:] + (old.get(row[0]),) for row in self.rows(
            "SELECT path, mode, uid, gid, mtime FROM coming WHERE source=? AND stage=1", source)}

    def put_in_place(self, source: str, path: bytes, plan: "Tuple[Any, ...]", bare: bool = False,
                     info: "Optional[os.stat_result]" = None) -> None:
        """Rename a confirmed file from `incoming` to its place; may be done twice.  `plan`: see
        `planned`; `bare`: there is nothing at its place; `info`: its stat, when it was looked at
        before.  Raises OSError."""
        staged, place = self.incoming(source, path), self.place_of(source, path)
        info = info or self.tree.lstat(staged)
        if info is None:
            return
        mode, uid, gid, mtime, stored = plan
        if not bare:
            self.clear_the_way(place)
        if stored and self.tree.lstat(META_DIR + b"/" + stored) is None:
            try:
                self.tree.link(place, META_DIR + b"/" + stored)
            except OSError:
                # a file system without links: a moment without the file
                with contextlib.suppress(FileNotFoundError):
                    self.tree.rename(place, META_DIR + b"/" + stored)
            test_point("linked")
        self.set_metadata(staged, mode, uid, gid, mtime, info)
        self.tree.rename(staged, place)

    def sync_places(self, source: str, paths: "Iterable[bytes]") -> None:
        """Make durable that files are at their places, and the versions before them in the attic.
        Where that fails they are not what was confirmed any more, whatever is still read of them
        now: `recover` is to set them aside."""
        paths = list(paths)
        names = [self.place_of(source, path) for path in paths]
        here = set(paths)
        names += [META_DIR + b"/" + stored for path, stored in self.under_way(source)
                  if path in here]
        try:
            self.tree.sync(names)
        except OSError:
            with contextlib.suppress(sqlite3.Error), self.write() as db:
                db.executemany(
                    "UPDATE coming SET digest=NULL WHERE source=? AND path=? AND stage=1",
                    [(source, path) for path in paths])
            raise

    def arrived(self, source: str, paths: "Iterable[bytes]",
                tags: "Optional[Dict[bytes, int]]" = None) -> None:
        """Files are at their places and counted by the server: they are copies now.  tags: see
        hold_all."""
        paths, now = list(paths), clock.now()
        with self.write() as db:
            self.hold_all(source, [row + (now,) for row in self.rows_among(
                "SELECT path, size, mtime, digest FROM coming WHERE source=? AND path AMONG", paths,
                source)], tags)
            db.executemany("DELETE FROM coming WHERE source=? AND path=?",
                           [(source, path) for path in paths])
            here = set(paths)
            db.executemany("UPDATE attic SET done=1 WHERE source=? AND path=? AND done=0",
                           [(source, path) for path, _ in self.under_way(source) if path in here])

    # -- renames --

    def plan_moves(self, source: str, rows: "List[Tuple[int, bytes, bytes]]") -> None:
        """(cursor, old path, new path): write down what is to be renamed."""
        with self.write() as db:
            for cursor, old, new in rows:
                info = self.tree.lstat(self.place_of(source, old))
                db.execute("INSERT INTO moving(source, old, new, ino, cursor) VALUES(?,?,?,?,?)",
                           (source, old, new, info.st_ino if info and stat.S_ISREG(info.st_mode)
                            else None, cursor))

    def write_cursor(self, source: str, old: bytes, new: bytes, cursor: int) -> None:
        """The server's present number for a move that an earlier pass began."""
        with self.write() as db:
            db.execute("UPDATE moving SET cursor=? WHERE source=? AND old=? AND new=?",
                       (cursor, source, old, new))

    def lift_moves(self, source: str) -> None:
        """First half of the renames that are written down: every file to a name of its own, so that
        swaps and chains work.  May be done twice."""
        for number, old, ino in self.rows("SELECT id, old, ino FROM moving WHERE source=? "
                                          "ORDER BY id", source):
            if ino is not None and self._is_inode(self.place_of(source, old), ino):
                self.tree.rename(self.place_of(source, old), self._between(number))
        test_point("moves-between")

    def settle_moves(self, source: str, last: bool) -> "Tuple[List[Tuple[int, int]], List[bytes]]":
        """Second half: to the new paths.  Returns ((cursor, new tag) of what is in place, old paths
        of what is not). `last`: what cannot be put into its place goes to the attic; else it waits
        for the next time, unless its old name is needed."""
        done: "List[Tuple[int, bytes, bytes, Any]]" = []
        failed: "List[Tuple[int, bytes]]" = []
        for number, old, new, \
                cursor in self.rows("SELECT id, old, new, cursor FROM moving WHERE source=? "
                                    "ORDER BY id", source):
            place, between = self.place_of(source, new), self._between(number)
            row = self.one("SELECT size, mtime, digest, checked FROM held "
                           "WHERE source=? AND path=?", source, old)
            try:
                if self.tree.lstat(between) is not None:
                    if row is None:
                        raise FileNotFoundError(errno.ENOENT, "it is no copy any more")
                    info = next(self._own_at(source, [new]))
                    if info is not None and stat.S_ISREG(info.st_mode):
                        self.set_aside(source, [new], "deleted")
                    self.clear_the_way(place)
                    self.tree.rename(between, place)
                elif row is None or self.tree.digest(place)[0] != row[2]:
                    # Not renamed by an earlier process.
                    raise FileNotFoundError(errno.ENOENT, "it is not here")
                done.append((cursor, old, new, row))
            except OSError as error:
                log.info("%s: %s cannot be moved to %s: %s", self.name, shown(old), shown(new),
                         reason_of(error))
                failed.append((number, old))
        self.tree.sync([self.place_of(source, new) for _, _, new, _ in done])
        taken = {new for _, _, new, _ in done}
        for number, old in failed:  # before another file is entered under its old name
            if last or old in taken:
                self._abandon_move(source, number, old)
        with self.write() as db:
            db.executemany("DELETE FROM held WHERE source=? AND path=?",
                           [(source, old) for _, old, _, _ in done])
            self.hold_all(source, [(new,) + row for _, _, new, row in done if row])
            db.executemany("DELETE FROM moving WHERE source=? AND old=? AND new=?",
                           [(source, o, n) for _, o, n, _ in done])
        return [(cursor, self.held(source, new)[3]) for cursor, _, new, row in done
                if row], [old for _, old in failed]

    def _abandon_move(self, source: str, number: int, old: bytes) -> None:
        """A file for which there is no place: into the attic, and no copy any more."""
        stored = self.attic_name(source, old)
        info = self.tree.lstat(self._between(number))
        if info is not None:
            self.tree.rename(self._between(number), META_DIR + b"/" + stored)
            # its number is given again
            self.tree.sync([META_DIR + b"/" + stored, self._between(number)])
        with self.write() as db:
            row = self.one("SELECT mtime, digest FROM held WHERE source=? AND path=?", source, old)
            if info is not None:
                db.execute("INSERT INTO attic(source, path, stored, size, mtime, digest, since, "
                           "why, done) "
                           "VALUES(?,?,?,?,?,?,?,'found',1)",
                           (source, old, stored, info.st_size) + (row or (0, None))
                           + (clock.now(),))
            # else an earlier process has put another one there
            if self.tree.lstat(self.place_of(source, old)) is None:
                db.execute("DELETE FROM held WHERE source=? AND path=?", (source, old))
            db.execute("DELETE FROM moving WHERE id=?", (number,))

    def _between(self, number: int) -> bytes:
        return META_DIR + b"/moving/%d" % number

    def _is_inode(self, rel: bytes, ino: int) -> bool:
        info = self.tree.lstat(rel)
        return info is not None and info.st_ino == ino

    # -- after a crash --

    def recover(self) -> None:
        """Finish on disk what an earlier process wrote down and did not end."""
        self._carry_out_drops()
        for (source,) in self.rows("SELECT DISTINCT source FROM moving"):
            self.lift_moves(source)
            self.settle_moves(source, last=False)
        for (source,) in self.rows("SELECT DISTINCT source FROM coming WHERE stage=1"):
            for path, plan in sorted(self.planned(source).items()):
                self._end_placing(source, path, plan)
        self._finish_attic()
        for (source,) in self.rows("SELECT DISTINCT source FROM coming WHERE stage=0"):
            keep_parts(self.tree, self.incoming(source), lambda path: self.one(
                "SELECT 1 FROM coming WHERE source=? AND path=?", source, path) is not None)

    def _end_placing(self, source: str, path: bytes, plan: "Tuple[Any, ...]") -> None:
        """Put a file in its place that was confirmed and may be there already; give it up when that
        cannot be."""
        try:
            if self._still_whole(source, path):
                self.put_in_place(source, path, plan)
                return
        except OSError as error:
            log.warning("%s: %s: %s", self.name, shown(path), reason_of(error))
        self.give_up(source, [path])

    def _still_whole(self, source: str, path: bytes) -> bool:
        """Whether what was confirmed is still what lies here: when the power failed before it was
        durable, its bytes may be gone; without a digest, the disk has failed to keep them.  What is
        not, at its place, is set aside, unless it is still the version before."""
        digest = self.one("SELECT digest FROM coming WHERE source=? AND path=?", source, path)[0]
        staged = self.tree.lstat(self.incoming(source, path)) is not None
        found = self.tree.digest(self.incoming(source, path) if staged
                                 else self.place_of(source, path))[0]
        before = self.held(source, path)
        if found != digest and not staged and (digest is None or not before or before[2] != found):
            self.set_aside(source, [path], "bad")
        return bool(found == digest)


class Vault(Journal):
    """One backup: the only code that writes or deletes below its directory; each of the classes
    above is one reason to.  Here are what is made again when the database was lost, catalogs, and
    the directories and symlinks around the copies."""

    # -- after the database was lost --

    def needs_rebuild(self) -> bool:
        """Whether the database is newer than the directory: it was lost, and is to be made again
        from what lies here."""
        return self.meta("complete") is None

    def rebuild(self, configured: "Iterable[str]", say: "Callable[[bytes], None]") -> int:
        """Enter the files that lie here into the database, with digests read from the files: those
        that a catalog of their source names, and all of a `configured` source that has no catalog.
        Returns how many.

        What each file is a copy of is for the servers to say: the next report confirms it, or not.
        """
        count = 0
        with self.write() as db:
            db.execute("DELETE FROM attic")
        for name in self.tree.list():
            info = self.tree.lstat(name)
            if name == META_DIR or not _NAME.match(as_text(name)) or info is None \
                    or not stat.S_ISDIR(info.st_mode):
                continue
            known = self._named_in_catalogs(as_text(name))
            if known or as_text(name) in configured:
                paths = (self._named_as(rel[len(name) + 1:], known)
                         for rel in self.tree.walk_files(name))
                for batch in in_batches(path for path in paths if path is not None):
                    count += self._enter(as_text(name), batch, say)
        for kind in (b"attic", b"bad", b"moving"):
            for batch in in_batches(self.tree.walk_files(META_DIR + b"/" + kind)):
                self._enter_old(kind, batch)
        self.tree.sync_all()  # what had just been copied may not have been
        return count

    def _named_as(self, path: bytes, known: bool) -> "Optional[bytes]":
        """Under which name a file that lies here is in the catalogs: on some file systems another
        one than they list."""
        if not known or self.one("SELECT 1 FROM named WHERE path=?", path):
            return path
        row = self.one("SELECT path FROM named WHERE key=?", fold_key(path)) if self.folds else None
        return row[0] if row else None

    def _named_with(self, path: bytes, digest: bytes) -> bytes:
        """Of names that this file system takes for one, that of which the catalogs say that it has
        this content."""
        row = self.one("SELECT path FROM named WHERE key=? AND digest=? ORDER BY path<>?",
                       fold_key(path), digest, path) \
            if self.folds else None
        return row[0] if row else path

    def _named_in_catalogs(self, source: str) -> bool:
        """Fill the table `named` with all files that the kept catalogs of a source name; False
        without a catalog."""
        with self.lock:
            self.db.execute("CREATE TEMP TABLE IF NOT EXISTS named(path BLOB PRIMARY KEY, key "
                            "BLOB, digest BLOB) WITHOUT ROWID")
            self.db.execute("CREATE INDEX IF NOT EXISTS named_key ON named(key) WHERE key IS NOT "
                            "NULL")
            self.db.execute("DELETE FROM named")
        directory = os.path.join(self.meta_path, "catalog", source)
        try:
            for found in catalogs_in(directory):
                for row in read_catalog(os.path.join(directory, found.name)):
                    if row.kind == "f":
                        self.db.execute("INSERT OR IGNORE INTO named VALUES(?,?,?)", (
                            (row.path, fold_key(row.path), row.digest) if self.folds
                            else (row.path, None, None)))
        except CBackupError as error:
            log.warning("%s: %s", self.name, error)
            return False
        return self.one("SELECT 1 FROM named LIMIT 1") is not None

    def _enter_old(self, kind: bytes, paths: "List[bytes]") -> None:
        """Old versions, named KIND/SOURCE/TIME/path; or what a rename that was cut off has left in
        `moving`."""
        with self.write() as db:
            for rel in paths:
                parts, info = rel.split(b"/", 4), self.tree.lstat(rel)
                if info is None or not stat.S_ISREG(info.st_mode):
                    continue
                source, path, since = (as_text(parts[2]), parts[4],
                                       _stamp_time(parts[3])) if len(parts) == 5 else \
                    ("", rel, clock.now())
                db.execute("INSERT INTO attic(source, path, stored, size, mtime, since, why, done) "
                           "VALUES(?,?,?,?,?,?,?,1)",
                           (source, path, rel[len(META_DIR) + 1:], info.st_size, info.st_mtime_ns,
                            since,
                            "deleted" if kind == b"attic" else "bad"))

    def _enter(self, source: str, paths: "List[bytes]", say: "Callable[[bytes], None]") -> int:
        """Read copies and enter them; returns how many.  The database is not held up while they are
        read."""
        found = []
        for path in paths:
            try:
                descriptor = self.tree.open(self.place_of(source, path))
            except OSError:
                continue
            try:
                say(path)
                info = os.fstat(descriptor)
                digest, size = digest_descriptor(descriptor)
            finally:
                os.close(descriptor)
            found.append((self._named_with(path, digest), size, info.st_mtime_ns, digest))
        self.hold_all(source, [row + (clock.now(),) for row in found])
        return len(found)

    # -- catalogs, configuration, skeleton --

    def catalog_directory(self, source: str) -> str:
        path = os.path.join(self.meta_path, "catalog", source)
        os.makedirs(path, mode=0o700, exist_ok=True)
        return path

    def merge_catalogs(self, source: str, books: str, chain: "List[CatalogFile]") -> None:
        """Make one file of all the news in a chain, so that no catalog consists of too many.
        Raises CBackupError when one of them is damaged."""
        directory = self.catalog_directory(source)
        with self.lock:
            self.db.execute("CREATE TEMP TABLE IF NOT EXISTS merged(path BLOB PRIMARY KEY, line "
                            "TEXT) WITHOUT ROWID")
            self.db.execute("DELETE FROM merged")
            for found in chain[1:]:
                self.db.executemany("INSERT OR REPLACE INTO merged VALUES(?,?)", (
                    (row.path, json.dumps(row.to_wire(LEVEL)))
                    for row in read_catalog(os.path.join(directory, found.name))))
            header = {"catalog": 1, "source": source, "books": books, "since": chain[0].upto,
                      "upto": chain[-1].upto,
                      "time": chain[-1].time}
            write_catalog(directory, header, (json.loads(line) for (line,) in self.db.execute(
                "SELECT line FROM merged ORDER BY path")))
            self.db.execute("DELETE FROM merged")

    def keep_text(self, name: str, text: str) -> None:
        """Keep a text under .cbackup/: the configuration, so that a disk alone is enough for a
        fresh machine."""
        path, data = os.path.join(self.meta_path, name), text.encode()
        with contextlib.suppress(OSError):
            with open(path, "rb") as stream:
                if stream.read() == data:
                    return
        atomic_write(path, data)

    def apply_skeleton(self, source: str,
                       rows: "Iterable[CatalogRow]") -> "Iterator[Tuple[bytes, OSError]]":
        """Bring directories and symlinks in line with catalog news (rows of `no_file`), so that
        `cp` alone gives the whole tree.  Yields (path, error) of those that cannot be here.

        Takes only removals of empty directories and symlinks upon itself; files are copies and have
        their own rules.
        """
        gone: "List[bytes]" = []
        for row in rows:
            place = self.place_of(source, row.path) if row.path else source.encode()
            info = self.tree.lstat(place)
            kind = stat.S_IFMT(info.st_mode) if info else 0
            other = self.anothers(place)
            # the directories of two names become one; of two symlinks one is laid
            if other is not None:
                if row.kind == "l":
                    yield row.path, OSError(errno.EEXIST, "it " + difference(other, row.path))
                continue
            try:
                if row.kind is None and kind == stat.S_IFLNK:
                    self.tree.unlink(place)
                elif row.kind is None and kind == stat.S_IFDIR:
                    gone.append(place)
                elif row.kind == "d" and kind in (0, stat.S_IFLNK, stat.S_IFDIR):
                    self.tree.make_directory(place)
                    self.tree.chmod(place, row.mode & 0o777 | 0o700 if row.path else 0o700)
                elif row.kind == "l":
                    self._lay_symlink(place, kind, row)
            except OSError as error:
                if error.errno in DISK_ERRORS:
                    raise
                yield row.path, error
        for place in sorted(gone, reverse=True):
            with contextlib.suppress(OSError):
                self.tree.rmdir(place)

    def _lay_symlink(self, place: bytes, kind: int, row: "CatalogRow") -> None:
        if kind == stat.S_IFLNK:
            if self.tree.readlink(place) == row.target:
                return
            self.tree.unlink(place)
        elif kind == stat.S_IFDIR:
            self.tree.clear_empty(place, links=True)
        elif kind:
            return  # a file: a copy that is still to be retired; the next catalog lays the link
        self.tree.symlink(row.target or b"", place)
        with contextlib.suppress(OSError):
            self.tree.set_mtime(place, row.mtime)


def files_here(tree: Tree, source: str, after: bytes = b"", below: bytes = b"",
               ) -> "Iterator[Tuple[bytes, int, int]]":
    """(path, size, mtime) of what lies in a backup's directory as copies of a source, or of one
    directory in it, without asking its database; behind the path `after`, in the order of
    Tree.walk_files."""
    top = source.encode()
    for rel in tree.walk_files(top + b"/" + below if below else top, after):
        info = tree.lstat(rel)
        if info is not None and stat.S_ISREG(info.st_mode):
            yield rel[len(top) + 1:], info.st_size, info.st_mtime_ns


def old_files_here(tree: Tree, source: str) -> "Iterator[Tuple[bytes, bytes, int, int]]":
    """(path, name in the attic, size, mtime) of the old versions in a backup's directory, without
    asking its database."""
    top = META_DIR + b"/attic/" + source.encode()
    for rel in tree.walk_files(top):
        info, path = tree.lstat(rel), rel[len(top) + 1:].partition(b"/")[2]
        if path and info is not None and stat.S_ISREG(info.st_mode):
            yield path, rel[len(META_DIR) + 1:], info.st_size, info.st_mtime_ns


def _stamp_time(stamp: bytes) -> float:
    import calendar
    try:
        return calendar.timegm(time.strptime(stamp[:16].decode(), "%Y%m%dT%H%M%SZ"))
    except ValueError:
        return clock.now()


def catalog_columns(level: int, path: bytes, kind: "Optional[str]", size: int, mtime: int,
                    mode: int, uid: int, gid: int, user: str, group: str, link: "Optional[int]",
                    target: "Optional[bytes]", digest: "Optional[bytes]",
                    holders: "Iterable[str]", proven: Any, xattrs: Any,
                    readable: Any) -> "List[Any]":
    """A CatalogRow for a peer of a level: [path], or the 12 columns that every version reads.  What
    level 1 does not know is the thirteenth: "proven" and "readable", 0, of a file that is not, and
    "xattrs".  In a catalog's file it is an object in a line of its own before the row, which level
    1 passes over."""
    if kind is None:
        return [as_text(path)]
    columns = [as_text(path), kind, size, mtime, mode, uid, gid, user, group, link,
               digest.hex() if digest else None if target is None else as_text(target),
               list(holders)]
    if level > 1 and not (proven and readable and xattrs is None):
        more: "Dict[str, Any]" = {} if proven else {"proven": 0}
        if not readable:
            more["readable"] = 0
        if xattrs is not None:
            more["xattrs"] = xattrs
        columns.append(more)
    return columns


class CatalogRow(namedtuple("CatalogRow", "path kind size mtime mode uid gid user group link target"
                                          " digest holders proven xattrs readable",
                            defaults=(None, 0, 0, 0, 0, 0, "", "", None, None, None, (), True, None,
                                      True))):
    """One path of a source at one time.  kind None: no longer there.  path, target, digest: bytes.
    link: a number shared by hard links.  holders: the backups that had a copy, so that a restore
    can say who is missing.  proven: the source's server had read the file in full; else the digest
    was presumed.  xattrs: extended attributes, name -> value in base64, or None for one that could
    not be kept; None: they are not known.  readable: False when the source's server could not read
    the file: what there is of it is older."""

    __slots__ = ()

    COLUMNS = (_one_of("f", "d", "l"), Whole("size", 0, 1 << 63),
               Whole("time", -1 << 63, 1 << 63), _is_mode, Whole("number", 0, 1 << 32),
               Whole("number", 0, 1 << 32), _is_string, _is_string,
               Maybe(Whole("link", -1 << 63, 1 << 63)), Maybe(_is_string),
               Every(_is_string, LIST_LIMIT))
    """What stands behind the path in a row."""

    def to_wire(self, level: int) -> "List[Any]":
        """The row for a peer of a level: catalog_columns."""
        return catalog_columns(level, *self)

    @classmethod
    def are_well(cls, rows: "Sequence[Any]") -> bool:
        """Whether all of many rows from a peer or a disk have the form: [path], or 12 or 13
        columns.  The 13th is for of_checked.  Only the path of a source itself is empty."""
        if not set(map(type, rows)) <= {list} or not set(map(len, rows)) <= {1, 12, 13}:
            return False
        facts = [row[1:12] for row in rows if len(row) > 1]
        digests = [row[9] for row in facts if row[0] == "f" and row[9] is not None]
        return _all_fit([row[0] for row in rows if row[0] != "" or row[1:2] != ["d"]], _is_path) \
            and _all_fit(facts, cls.COLUMNS) \
            and _all_fit(digests, _is_hex) and set(map(len, digests)) <= {64} \
            and all([row[9] and _is_text(row[9]) and "\0" not in row[9]
                     for row in facts if row[0] == "l"])

    @classmethod
    def from_json(cls, row: Any, more: "Optional[Dict[str, Any]]" = None) -> "CatalogRow":
        """Check a row from a peer or a disk; `more`: what stood before it.  Raises ProtocolError
        for anything that is not of the form."""
        if not cls.are_well([row]):
            if not isinstance(row, list) or not row or not isinstance(row[0], str):
                raise ProtocolError("a catalog row that is not of the form")
            check_relative(as_raw(row[0]))
            raise ProtocolError("a catalog row with wrong values for %s" % shown(row[0]))
        return cls.of_checked(row, more)

    @classmethod
    def of_checked(cls, row: "List[Any]", more: "Optional[Dict[str, Any]]") -> "CatalogRow":
        """from_json of a row that are_well."""
        raw = as_raw(row[0])
        if len(row) == 1:
            return cls(raw)
        _, kind, size, mtime, mode, uid, gid, user, group, link, extra, holders = row[:12]
        if len(row) == 13:
            more = row[12] if isinstance(row[12], dict) else {"proven": row[12]}
        more = more or {}
        return cls(raw, kind, size, mtime, mode, uid, gid, _account(user), _account(group), link,
                   as_raw(extra) if kind == "l" else None,
                   bytes.fromhex(extra) if kind == "f" and extra is not None else None,
                   _names(tuple(holders)), more.get("proven") is None,
                   _checked_xattrs(more.get("xattrs"), raw), more.get("readable") is None)


@functools.lru_cache(maxsize=256)
def _account(name: str) -> str:
    """A name that no machine can have is as good as none: there is the number."""
    return name if re.match(r"[^\0\ud800-\udfff]{1,255}\Z", name) else ""


@functools.lru_cache(maxsize=256)
def _names(names: "Tuple[str, ...]") -> "Tuple[str, ...]":
    return tuple(name for name in names if _NAME.match(name))


def _checked_xattrs(value: Any, path: bytes) -> "Optional[Dict[str, Optional[str]]]":
    """Extended attributes from a peer or a disk.  Raises ProtocolError for what no file can
    have."""
    try:
        if value is None:
            return None
        size = sum(len(as_raw(name)) + len(base64.b64decode(text or "", validate=True))
                   for name, text in value.items())
        if size <= 2 * XATTRS_LIMIT and all(re.match(r"[^\0]{1,255}\Z", name) for name in value):
            return value
    except (AttributeError, TypeError, ValueError):
        pass
    raise ProtocolError("a catalog row with wrong attributes for %s" % shown(path))


class CatalogFile(namedtuple("CatalogFile", "name since upto time")):
    """One file in a backup's catalog directory: the news from generation `since` (0: everything) to
    `upto`, both numbers, as of `time`, seconds."""

    __slots__ = ()
    PATTERN = re.compile(r"([0-9]{1,18})-([0-9]{1,18})-([0-9]{1,18})\.gz\Z")

    @classmethod
    def parse(cls, name: str) -> "Optional[CatalogFile]":
        match = cls.PATTERN.match(name)
        found = cls(name, *(int(part) for part in match.groups())) if match else None
        # else a chain of them would have no end
        return found if found and found.since < found.upto else None


def list_catalogs(names: "Iterable[str]") -> "List[CatalogFile]":
    """The catalog files among `names`, newest generation first."""
    return sorted((found for found in map(CatalogFile.parse, names) if found),
                  key=lambda f: (-f.upto, f.since))


def catalogs_in(directory: str) -> "List[CatalogFile]":
    """list_catalogs of a directory; [] when it is not there or cannot be read."""
    try:
        return list_catalogs(os.listdir(directory))
    except OSError:
        return []


def by_end(files: "List[CatalogFile]") -> "Dict[int, CatalogFile]":
    """Generation -> the file that leads to it, of several the one that reaches back the furthest.
    files: list_catalogs."""
    return {f.upto: f for f in reversed(files)}


def chain_to(ends: "Dict[int, CatalogFile]", last: CatalogFile) -> "List[CatalogFile]":
    """The files to read, oldest first, for the catalog that ends with `last`; [] when one is
    missing.  ends: by_end."""
    chain = [last]
    while chain[-1].since:
        if chain[-1].since not in ends:
            return []
        chain.append(ends[chain[-1].since])
    return chain[::-1]


def catalog_chain(files: "List[CatalogFile]", at: "Optional[float]" = None) -> "List[CatalogFile]":
    """The files to read, oldest first, for the newest catalog (not newer than `at`); [] when there
    is none."""
    ends = by_end(files)
    for last in files:
        chain = chain_to(ends, last) if at is None or last.time <= at else []
        if chain:
            return chain
    return []


def catalog_chains(files: "List[CatalogFile]",
                   at: "Optional[float]" = None) -> "Iterator[List[CatalogFile]]":
    """The chain of the newest catalog, then those of older ones, for the case that it is
    damaged."""
    chain = catalog_chain(files, at)
    while chain:
        yield chain
        files = [f for f in files if f.upto < chain[-1].upto]
        chain = catalog_chain(files, at)


def _catalog_lines(rows: "List[List[Any]]") -> bytes:
    """The lines of rows; one each, or two where there is a thirteenth column."""
    encode = json.JSONEncoder(separators=(",", ":")).encode
    if all(len(row) <= 12 for row in rows):
        # At once, which costs a third of one by one, unless a name has in it what stands between.
        text = encode(rows)[1:-1]
        if text.count('],["') == len(rows) - 1:
            return text.replace('],["', ']\n["').encode() + b"\n"
    return b"".join(encode(part).encode() + b"\n" for row in rows
                    for part in ((row[12], row[:12]) if len(row) > 12 else (row,)))


def write_catalog(directory: str, header: "Dict[str, Any]",
                  rows: "Iterable[List[Any]]") -> "Optional[CatalogFile]":
    """Write one catalog file, durably, of rows as CatalogRow.to_wire gives them; `header` has
    source, books and since; `upto` and `time` may be filled in while `rows` is consumed.  Returns
    None, and leaves nothing, when there was no row."""
    temporary, count = os.path.join(directory, "new"), 0
    with open(temporary, "wb") as raw:
        with io.BufferedWriter(gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1, filename="",
                                             mtime=0),  # type: ignore
                               READ_BLOCK) as stream:
            for some in in_batches(rows, SLICE):
                stream.write(_catalog_lines(some))
                count += len(some)
            stream.write(json.dumps(dict(header, end=count)).encode() + b"\n")
        raw.flush()
        fsync(raw.fileno())
    if not count:
        os.unlink(temporary)
        return None
    name = "%012d-%012d-%d.gz" % (header["since"], header["upto"], int(header["time"]))
    os.rename(temporary, os.path.join(directory, name))
    fsync_directory(directory)
    return CatalogFile.parse(name)


PRUNE_EVERY = 86400.0
"""Seconds between two looks for catalogs that no kept time needs: which these are takes a moment to
find out."""

CATALOG_FILES = 60
"""News that a catalog consists of until they are made one file."""

CATALOG_LINE = 1 << 20
"""Longest line of a catalog, bytes: a small file must not unfold into all of the memory."""


class PathsOf:
    """A quick test for the lines of a catalog: whether they are of one of the paths, or of one that
    begins with one of the prefixes (few).  What is not wanted need not be understood, which is most
    of the work of reading."""

    _PATH = re.compile(rb'\["[^"\\]*(?:\\.[^"\\]*)*"')

    def __init__(self, paths: "Iterable[bytes]", prefixes: "Iterable[bytes]" = ()) -> None:
        self._paths = {self._written(path) + b'"' for path in paths}
        self._begin = tuple(self._written(prefix) for prefix in prefixes) + (b"{",)
        if len(self._paths) < 50:
            self._begin += tuple(path + end for path in self._paths for end in (b",", b"]"))
            self._paths = set()

    @staticmethod
    def _written(path: bytes) -> bytes:
        return b"[" + json.dumps(as_text(path)).encode()[:-1]

    def __call__(self, line: bytes) -> bool:
        if line.startswith(self._begin):
            return True
        match = self._PATH.match(line) if self._paths else None
        return match is not None and match.group() in self._paths


class DirectoriesAnd:
    """The same for the lines of all directories, and of those paths that pass a test."""

    _LINE = re.compile(rb'\[("[^"\\]*(?:\\.[^"\\]*)*")(,"d",)?')

    def __init__(self, test: "Callable[[bytes], bool]") -> None:
        self._test = test

    def __call__(self, line: bytes) -> bool:
        match = self._LINE.match(line)
        return match is None or match.group(2) is not None \
            or self._test(as_raw(json.loads(match.group(1))))


def no_file(line: bytes) -> bool:
    """The same for the lines that are of no file: directories, symlinks, and what is no longer
    there."""
    return not _FILE_LINE.match(line)


_FILE_LINE = re.compile(rb'\["[^"\\]*(?:\\.[^"\\]*)*","f",')


def read_catalog(path: str, wanted: "Optional[Callable[[bytes], bool]]" = None,
                 ) -> "Iterator[CatalogRow]":
    """The rows of a catalog file, checked; with `wanted` only of lines that pass this test.  Raises
    DamagedCatalog when it is damaged or cut off."""
    count, ended, more = 0, False, None
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as raw, \
                io.BufferedReader(gzip.GzipFile(fileobj=raw),
                                  READ_BLOCK) as stream:  # type: ignore[arg-type]
            if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
                raise ValueError("it is no file")
            for some in iter(lambda: _some_lines(stream), []):
                rows: "List[Tuple[Any, Any]]" = []
                for line in some:
                    if wanted is not None and not wanted(line):
                        count, more = count + 1, None
                        continue
                    value = json.loads(line.decode())
                    if isinstance(value, dict):
                        ended, more = value.get("end") == count, value
                        continue
                    count += 1
                    rows.append((value, more))
                    more = None
                well = CatalogRow.are_well([row for row, _ in rows])
                yield from itertools.starmap(CatalogRow.of_checked if well
                                             else CatalogRow.from_json, rows)
    except (OSError, ValueError, EOFError, RecursionError, zlib.error) as error:
        raise DamagedCatalog("%s is damaged: %s" % (path, reason_of(error)))
    except ProtocolError as error:
        raise DamagedCatalog("%s is damaged: it has %s" % (path, error))
    if not ended:
        raise DamagedCatalog("%s is cut off" % path)


def _some_lines(stream: "io.BufferedReader") -> "List[bytes]":
    """The next lines of a catalog, CATALOG_LINE bytes and one line at most; [] at its end."""
    lines, size = [], 0
    while size < CATALOG_LINE and len(lines) < SLICE:
        line = stream.readline(CATALOG_LINE)
        if not line:
            break
        lines.append(line)
        size += len(line)
    return lines


def times_of_versions(directory: str, paths: "Iterable[bytes]",
                      ) -> "Dict[Tuple[bytes, int, int], int]":
    """(path, size, mtime) -> the last time of which a catalog says so, for all that the catalogs in
    a directory know of these files.  A restore as of that time brings back that version.  Damaged
    catalogs are passed over."""
    found: "Dict[Tuple[bytes, int, int], int]" = {}
    wanted = PathsOf(paths)
    for file in reversed(catalogs_in(directory)):
        with contextlib.suppress(DamagedCatalog):
            for row in read_catalog(os.path.join(directory, file.name), wanted):
                if row.kind == "f":
                    found[row.path, row.size, row.mtime] = file.time
    return found


def prune_catalogs(directory: str, keep: float) -> None:
    """Delete catalog files that no time within `keep` seconds needs."""
    files = catalogs_in(directory)
    limit, ends = clock.now() - keep, by_end(files)
    needed = {f for f in files if f.time > limit}
    for last in list(needed):
        needed.update(chain_to(ends, last))
    needed.update(catalog_chain(files, limit))
    for found in files:
        if found not in needed:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(directory, found.name))


# ==== 12. The server ==============================================================================


def shared_disks(backups: "Dict[str, Dict[str, Any]]", host: str) -> "List[str]":
    """A line for each disk of a host that has several backups.  backups: name -> facts, with
    `disk`, of that host."""
    disks: "Dict[int, List[str]]" = {}
    for name, facts in sorted(backups.items()):
        if facts.get("disk") is not None:
            disks.setdefault(facts["disk"], []).append(name)
    return ["%s are on one disk of %s: one failure takes all of them (they count as one host "
            "anyway)"
            % (" and ".join(names), host) for names in disks.values() if len(names) > 1]


def _paths_of(request: "Dict[str, Any]") -> "List[bytes]":
    return [as_raw(path) for path in request["paths"]]


def _rows_of(request: "Dict[str, Any]") -> "List[Tuple[Any, ...]]":
    """The rows of a request that begin with a path."""
    return [(as_raw(row[0]),) + tuple(row[1:]) for row in request["rows"]]


def _files_out(rows: "Iterable[Tuple[Any, ...]]") -> "List[List[Any]]":
    return [[as_text(row[0])] + list(row[1:]) for row in rows]


class Names:
    """Users and groups by name and by number, remembered."""

    def __init__(self) -> None:
        self._users: "Dict[int, str]" = {}
        self._groups: "Dict[int, str]" = {}
        self._uids: "Dict[Tuple[str, int], int]" = {}
        self._gids: "Dict[Tuple[str, int], int]" = {}

    def uid(self, user: str, otherwise: int) -> int:
        """The number of `user` on this machine; `otherwise` when it has none."""
        if (user, otherwise) not in self._uids:
            import pwd
            try:
                self._uids[(user, otherwise)] = pwd.getpwnam(user).pw_uid
            except KeyError:
                self._uids[(user, otherwise)] = otherwise
        return self._uids[(user, otherwise)]

    def gid(self, group: str, otherwise: int) -> int:
        if (group, otherwise) not in self._gids:
            import grp
            try:
                self._gids[(group, otherwise)] = grp.getgrnam(group).gr_gid
            except KeyError:
                self._gids[(group, otherwise)] = otherwise
        return self._gids[(group, otherwise)]

    def user(self, uid: int) -> str:
        if uid not in self._users:
            import pwd
            try:
                self._users[uid] = pwd.getpwuid(uid).pw_name
            except (KeyError, OverflowError):
                self._users[uid] = ""
        return self._users[uid]

    def group(self, gid: int) -> str:
        if gid not in self._groups:
            import grp
            try:
                self._groups[gid] = grp.getgrgid(gid).gr_name
            except (KeyError, OverflowError):
                self._groups[gid] = ""
        return self._groups[gid]


class Scanner(threading.Thread):
    """Looks at this host's sources: at start, every `scan` seconds, and when a client wants it."""

    def __init__(self, service: "Service") -> None:
        super().__init__(name="scanner", daemon=True)
        self.service = service
        self._changed = threading.Condition()
        self._seen: "Dict[str, float]" = {}
        self._wanted: "Dict[str, float]" = {}
        self._over = False

    def stop(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def look(self, age: float, wait: float) -> "List[str]":
        """Want a look at every source that began at most `age` seconds ago; returns, after at most
        `wait` seconds, the sources for which there is none yet."""
        since = clock.steady() - age
        deadline = time.monotonic() + wait
        with self._changed:
            while True:
                missing = [name for name in self.service.books.active_sources()
                           if self._seen.get(name, float("-inf")) < since]
                left = deadline - time.monotonic()
                if not missing or left <= 0 or self._over:
                    return missing
                news = {name: since for name in missing
                        if self._wanted.get(name, float("-inf")) < since}
                self._wanted.update(news)
                if news:  # once: clients that wait together would keep each other awake
                    self._changed.notify_all()
                self._changed.wait(left)

    def look_at(self, names: "List[str]", wait: float) -> None:
        """Want a look at these sources that begins now; returns when there was one, or after `wait`
        seconds."""
        now = clock.steady()
        with self._changed:
            for name in names:
                self._wanted[name] = now
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._over or all(self._seen.get(name, 0.0) >= now for name in names), wait)

    def run(self) -> None:
        while not self._over:
            name = None
            try:
                name = self._next()
                begun = clock.steady()
                if name is not None:
                    self.service.scan(name)
            except Exception as error:
                if self._over:  # the books were closed under it
                    return
                log_failure("looking at " + (name or "the sources"), error)
                self.service.mend_books(error)
                time.sleep(0.2 if name else 1.0)
            if name is not None:
                with self._changed:
                    self._seen[name] = begun
                    self._changed.notify_all()

    def _next(self) -> "Optional[str]":
        """Wait until a source is due, and return it; None from time to time, for a look at the
        configuration."""
        with self._changed:
            now, every = clock.steady(), self.service.config.scan
            due = []
            for name in self.service.books.active_sources():
                seen = self._seen.get(name)
                if seen is None or self._wanted.get(name,
                                                    float("-inf")) > seen or now - seen >= every:
                    due.append((seen or 0.0, name))
            if due:
                return min(due)[1]
            self._changed.wait(clock.nap(min(5.0, max(0.05, every))))
            return None


class Reader(threading.Thread):
    """Reads, beside everything else, those of this host's files whose digest is only presumed: the
    proof.

    The last that were presumed are read first: they are still in the page cache; before all others
    those about which somebody waits to hear (`first`).  What is still to be read is in the books,
    so that a restart goes on where it was.
    """

    BATCH, BATCH_SECONDS = 200, 2.0
    """Files, and seconds of reading, until what was found is committed."""

    def __init__(self, service: "Service") -> None:
        super().__init__(name="reader", daemon=True)
        self.service = service
        self._changed = threading.Condition()
        self._wanted: "List[int]" = []
        self._more, self._busy, self._over = True, True, False
        self._equal: "Dict[str, int]" = {}

    def stop(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wake(self) -> None:
        """There may be something new to be read."""
        with self._changed:
            self._more = self._busy = True
            self._changed.notify_all()

    def first(self, numbers: "Iterable[int]", wait: float) -> None:
        """Have these files read before all others; returns when they were, or after `wait`
        seconds."""
        numbers, deadline = list(numbers), time.monotonic() + wait
        with self._changed:
            known = set(self._wanted)
            self._wanted += [number for number in numbers if number not in known]
            self._changed.notify_all()
        if not self.is_alive():  # a Service without a Server
            self._read_wanted()
        with self._changed:
            while not self._over and set(numbers) & set(self._wanted) \
                    and time.monotonic() < deadline:
                self._changed.wait(deadline - time.monotonic())

    def catch_up(self, wait: float) -> None:
        """Returns when all is read, as far as it can be, or after `wait` seconds."""
        deadline = time.monotonic() + wait
        with self._changed:
            while self._busy and not self._over and self.is_alive() and time.monotonic() < deadline:
                self._changed.wait(deadline - time.monotonic())

    def run(self) -> None:
        pause: "Optional[float]" = None
        while not self._over:
            with self._changed:
                if not self._more and not self._wanted:
                    self._busy = pause is not None
                    self._changed.notify_all()
                    self._changed.wait(pause)
                self._more, self._busy = False, True
            try:
                pause = 0.5 if self._round() else None
            except Exception as error:
                if self._over:
                    return
                log_failure("comparing files with their copies", error)
                pause = 5.0  # the books may be damaged, their disk full: others say so

    def _round(self) -> bool:
        """Read what is to be read, until there is nothing or something newer; whether some was too
        fresh to be read."""
        fresh = self._read_wanted()
        for name in self.service.books.active_sources():
            with contextlib.suppress(Refused):  # its line has gone meanwhile
                fresh = self._read_source(name) or fresh
        return fresh

    def _read_source(self, name: str) -> bool:
        books, fresh, behind = self.service.books, False, (float("inf"), 1 << 62)
        while not self._over and not self._more:
            source = books.source_row(name)
            page = books.unread(source["id"], behind, self.BATCH)
            if not page:
                books.settle_others(source, self._equal.pop(name, 0))
                break
            read = self._read_some(source, page)
            behind = page[len(read) - 1]["doubt"], page[len(read) - 1]["id"]
            fresh = self._read_wanted() or fresh or "fresh" in read
        return fresh

    def _read_some(self, source: "Dict[str, Any]", page: "List[Dict[str, Any]]") -> "List[str]":
        """Read the first files of a page; a word for each that was come to (see read_own)."""
        words: "List[str]" = []
        found, begun = [], time.monotonic()
        spec = self.service.config.sources.get(source["name"])
        try:
            tree = Tree(os.path.realpath(source["path"]))
        except OSError:  # the scanner says so
            return ["unreadable"] * len(page)
        pace = Pace(self.service.config.rate(*[spec] if spec else [], key="read_rate"))
        with tree:
            for facts in page:
                word, own = read_own(tree, facts, pace)
                words.append(word)
                if own is not None:
                    found.append((facts, own))
                if self._over or self._wanted or time.monotonic() - begun > self.BATCH_SECONDS:
                    break
        self._enter(source, found)
        return words

    def _enter(self, source: "Dict[str, Any]", found: "List[Tuple[Dict[str, Any], bytes]]") -> None:
        books, name = self.service.books, source["name"]
        with books.write():
            source = books.source_row(name)  # the generation may have moved on
            verdicts = books.prove_all(source, [(facts, own, False) for facts, own in found])
            for (facts, _), verdict in zip(found, verdicts):
                self._equal[name] = self._equal.get(name, 0) + (verdict == "proven")
                self.service.say_of_proof(name, facts["path"], verdict)
            books.settle_others(source, self._equal.get(name, 0))

    def _read_wanted(self) -> bool:
        """Read what somebody waits for, in its order.  Returns whether something of it was too
        fresh to be read."""
        fresh = False
        while self._wanted and not self._over:
            number = self._wanted[0]
            try:
                facts = self.service.books.facts_of(number)
                name = facts and self.service.books.source_name(facts["source"])
                if facts and name:
                    fresh = "fresh" in self._read_some(self.service.books.source_row(name),
                                                       [facts]) or fresh
            except Refused as error:
                log.info("%s", error)
            finally:
                with self._changed:
                    self._wanted.remove(number)
                    self._changed.notify_all()
        return fresh


class ServerState:
    """What a server answers.  Knows nothing of sockets: `handle` takes a request and returns the
    answer, so that the same decisions can be tried without a network."""

    def __init__(self, home: Home, config: Config, host: str,
                 books: "Optional[Books]" = None) -> None:
        self.home, self.config, self.host = home, config, host
        self.address = config.address(host)
        self.books = books or Books(home.state("books.db"), host)
        self._configure(config)
        self.scanner: "Optional[Scanner]" = None
        self.reader = Reader(self)
        self.names = Names()
        self.failures: "Dict[str, str]" = {}
        self._said_held: "Optional[str]" = None
        self._scanning = threading.Lock()

    def _configure(self, config: Config) -> None:
        try:
            self.books.configure(config)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self.books.start_again(config, str(error))

    def mend_books(self, error: Exception) -> None:
        """After an error: new books when it was damage, or when there could be none the last
        time.  A disk that fails ends nothing here: the next error comes here, too."""
        if isinstance(error, sqlite3.Error) and (is_damage(error) or self.books.gone):
            try:
                self.books.start_again(self.config, str(error))
            except (sqlite3.Error, OSError, CBackupError) as why:
                log.error("the books cannot be made again: %s", reason_of(why))

    def hello(self) -> "Dict[str, Any]":
        state = self.home.config_state()
        if state.get("sha256") not in (None, sha256_of(self.config.text)):
            # a client of this host has entered an edit that the server has not noticed yet
            with contextlib.suppress(CBackupError, OSError, sqlite3.Error):
                self.catch_up_with_home()
        return {"cbackup": PROTOCOL, "level": LEVEL, "host": self.host, "books": self.books.id,
                "version": __version__,
                "time": clock.now(),
                "config": [state.get("version", 0), state.get("stamp", 0), state.get("sha256", "")]}

    def handle(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """The answer to one request.  Raises CBackupError for what is refused.  Fields that are not
        known are ignored: a newer peer may have sent them."""
        op = request.get("op")
        if not isinstance(op, str) or op not in OPERATIONS:
            raise Refused("unknown-op", self._unknown_operation(op, request.get("level")))
        operation = OPERATIONS[op]
        known = {key: value for key, value in request.items() if key in operation.request}
        known["level"] = request["level"] if _is_count(request.get("level")) else 1
        wrong = misfit(known, operation.request)
        if wrong or operation.handler is None:
            raise ProtocolError("%s%s" % (op, wrong))
        return dict(operation.handler(self, known), ok=True)

    def _unknown_operation(self, op: Any, level: Any) -> str:
        older = isinstance(level, int) and level < LEVEL
        return "no operation is called %s; update cbackup on %s: this server is version %s " \
            "(level %d)" % (repr(op)[:40], "the machine that asks" if older else self.host,
                            __version__, LEVEL)

    # -- looks at the sources --

    def scan(self, name: str, consent: bool = False) -> None:
        source = self.config.sources.get(name)
        if source is None:
            return
        outside = self.home.outside(source.path)
        if outside:
            record_held(self.books, source, Held("paths", outside))
            return
        skip = [self.home.state_path, self.home.key_path] \
            + [b.path for b in self.config.backups_of(self.host)]
        with self._scanning:  # one at a time: `accept` scans in its own thread
            begun = clock.steady()
            try:
                run_scan(self.books, source, skip, Pace(self.config.rate(source, key="read_rate")),
                         consent)
                self.books.set_meta("took:" + name, clock.steady() - begun)
            except Exception as error:  # in memory: the books may be what failed
                self.failures[name] = "%s (%s)" % (reason_of(error), error.__class__.__name__)
                raise
            self.failures.pop(name, None)
        self.reader.wake()

    def overdue_after(self) -> float:
        """Seconds after which a look at a source is too old: some of the periods, or several times
        as long as looking at all of them took, but an hour at least."""
        took = sum(self.books.meta("took:" + name) or 0.0 for name in self.books.active_sources())
        return max(OVERDUE_LEAST, OVERDUE_PERIODS * self.config.scan, OVERDUE_TIMES * took)

    def look_facts(self, row: "Dict[str, Any]") -> "Dict[str, Any]":
        """What a source's server says of its looks at it: `last_scan`, seconds ago; `late`, whether
        that is too long ago; `failed`, why the last look failed, or None; and `problems`, what
        could not be read."""
        ago = None if row["scanned"] is None else max(0.0, clock.now() - row["scanned"])
        return {"last_scan": ago, "late": ago is not None and ago > self.overdue_after(),
                "failed": self.failures.get(row["name"]),
                "problems": json.loads(row["problems"] or "{}")}

    def _look_after_restores(self) -> None:
        """A restore that began or ended since the last look is not news for later: look at its
        source at once."""
        changed = []
        for name in self.books.active_sources():
            row = self.books.source_row(name)
            if (row["cause"] == "restore") != restore_unfinished(os.fsencode(row["path"])):
                changed.append(name)
        if changed and self.scanner is not None:
            self.scanner.look_at(changed, LOOK_WAIT)

    # -- the configuration --

    def catch_up_with_home(self) -> None:
        """Take over the configuration as it is in the file, when it is another.  Raises ConfigError
        for a wrong one."""
        config = self.home.config()
        if config.text != self.config.text:
            self.reload(config)

    def reload(self, config: Config) -> None:
        """Put a configuration in force in the running server."""
        self.config = config
        self._configure(config)
        self.home.void_forgets(config)
        log.info("took over the changed configuration")
        self.say_news_of_lines()
        for source in config.sources_of(self.host):
            if config.too_few_hosts(source):
                log.warning("source %s: %s", source.name, config.too_few_hosts(source))
        for line in shared_disks(self._own_backups(), self.host):
            log.warning("%s", line)
        if config.address(self.host) != self.address:
            log.warning("%s is to listen on %s:%d now: restart the server", self.host,
                        *config.address(self.host))

    def say_news_of_lines(self) -> None:
        for line in self.home.news_of_lines("server", self.config, self.host):
            log.warning("%s", line)

    def say_held(self) -> None:
        """Once for each configuration that is held back: a line in the server's log."""
        held = self.home.held_config()
        if held and held["sha256"] != self._said_held:
            log.warning("%s", held_config_text([self.host], held["removes"]))
        self._said_held = held.get("sha256")

    # -- backups of this host --

    def _open_backups(self) -> "List[Backup]":
        return [spec for spec in self.config.backups_of(self.host)
                if not self.home.outside(spec.path)]

    def _own_backup(self, name: str) -> Backup:
        """A backup of this host, at a place where it may be."""
        spec = self.config.backups.get(name)
        if spec is None or spec.host != self.host:
            raise Refused("unknown", "%s has no backup %s" % (self.host, name))
        if self.home.outside(spec.path):
            raise Refused("unknown", self.home.outside(spec.path))
        return spec

    def _own_backups(self) -> "Dict[str, Any]":
        """The backups of this host as they lie here now: used bytes, files, capacity, and what is
        wrong with them.  `new`: no client has been at work in it."""
        out: "Dict[str, Any]" = {}
        known = read_json(os.path.join(self.home.state_path, "backups.json"))
        for spec in self.config.backups_of(self.host):
            reader, facts = VaultReader(spec), {}
            try:
                wrong = self.home.outside(spec.path)
                if wrong:
                    raise Refused("unknown", wrong)
                wrong = reader.misplaced(self.home.cluster_id(),
                                         known.get(spec.name)) or reader.not_writable()
                facts = {"state": wrong or "ok", "new": not wrong and spec.name not in known}
                if facts["new"] and os.path.isdir(spec.path):
                    facts["disk"] = os.stat(spec.path).st_dev
                facts.update(reader.facts(), new=False, disk=os.stat(spec.path).st_dev,
                             **({"state": wrong} if wrong else {}))
            except (CBackupError, OSError) as error:
                if facts.get("state", "ok") == "ok":
                    facts["state"] = str(error)
            out[spec.name] = facts
        return out


class Standings(ServerState):
    """How a pass begins, and what became of the copies that a backup has."""

    # -- a pass begins --

    @answers("look")
    def op_look(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """Make sure that the sources were looked at lately; answers after at most LOOK_WAIT
        seconds, and a few more for reading what is presumed to be the same: what is not is better
        known before a pass."""
        if self.scanner is None:
            return {"waiting": []}
        self._look_after_restores()
        waiting = self.scanner.look(self.config.scan_min, LOOK_WAIT)
        if not waiting:
            self.reader.catch_up(READ_WAIT)
        return {"waiting": waiting}

    @answers("begin")
    def op_begin(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """A backup's first words in a pass; the answer says how each source and the backup's copies
        stand."""
        books, name = self.books, request["backup"]
        number = books.backup_id(name)
        books.expire(self.config.lost_after)
        known = books.one("SELECT identity FROM backups WHERE id=?", number)[0]
        if known not in (None, request["identity"]) and not request["adopt"] \
                and books.one("SELECT 1 FROM copies WHERE backup=? AND tag IS NOT NULL LIMIT 1",
                              number):
            raise Refused("identity",
                          "the backup %s used to be another directory, with copies in it; if this "
                          "one is right: cbackup.pyz client --adopt %s" % (name, name))
        words = {key: request[key] for key in ("identity", "capacity", "free", "used", "files")}
        books.hear(name, dict(words, first=True))
        sources = {}
        for source in books.active_sources():
            row = books.source_row(source)
            told = request["sums"].get(source)
            if isinstance(told, list) and len(told) == 1 and _is_count(told[0]):
                row = self._hear_of_list(number, row, told[0])
            sources[source] = self._standing(number, row)
        return {"books": books.id, "sources": sources}

    def _hear_of_list(self, backup: int, row: "Dict[str, Any]", newest: int) -> "Dict[str, Any]":
        """A backup's list of a source goes as far as `newest`.  Returns the source's row."""
        if newest >= row["gen"] + GENERATION_JUMP:
            return row
        self.books.raise_generation(row["id"], newest)
        self.books.note_list(backup, row["id"], newest)
        return self.books.source_row(row["name"])

    def _standing(self, backup: int, row: "Dict[str, Any]") -> "Dict[str, Any]":
        books = self.books
        return {"state": row["state"], "reason": row["reason"], "cause": row["cause"],
                "replicas": row["replicas"],
                "scanned": row["scanned"] is not None, "todo": books.todo_counts(backup, row["id"]),
                "sum": list(books.sum_of(backup, row["id"])), "gen": books.close_generation(row),
                "recovering": books.recovering(row["id"]),
                "claims": bool(books.own_claims(backup, row["id"], 1))}

    @answers("standing")
    def op_standing(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.source_row(request["source"])
        return self._standing(self.books.backup_id(request["backup"]), row)

    @answers("caught_up")
    def op_caught_up(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """A backup has told these books all that it holds of a source."""
        self.books.catch_up(self.books.backup_id(request["backup"]),
                            self.books.source_row(request["source"])["id"])
        return {}

    @answers("told")
    def op_told(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """A backup's words between the others; rows: (source, path) of files whose update is under
        way in it; lists: how far those go that it has just written."""
        books = self.books
        number = books.hear(request["backup"], {key: request.get(key) for key in (
            "capacity", "free", "want", "used", "files")})
        active = books.active_sources()
        books.renew_updates(number,
                            [(books.source_row(source)["id"], as_raw(path))
                             for source, path in request["rows"]
                             if source in active])
        for source, newest in request["lists"].items():
            if source in active:
                self._hear_of_list(number, books.source_row(source), newest)
        return {}

    @answers("demand")
    def op_demand(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """For the rules: what is missing of each source, what this backup lacks, everybody's last
        words."""
        books = self.books
        number = books.hear(request["backup"],
                            {"capacity": request["capacity"], "free": request["free"]})
        sources, room = {}, books.room_of_others(number) if request.get("beyond") else None
        for name in books.active_sources():
            row = books.source_row(name)
            if row["state"] != "ok":
                continue
            size, files = books.lacking(number, row, request["capacity"])
            sources[name] = {"missing": books.unclaimed_bytes(row), "replicas": row["replicas"],
                             "lacking": size,
                             "lacking_files": files,
                             "short": books.short_count(row)}
            if room is not None:
                sources[name]["beyond"] = books.beyond_room(row, room)
        return {"sources": sources, "backups": books.last_words()}

    # -- what became of copies --

    @answers("todo")
    def op_todo(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.changeable(request["source"])
        rows, more = with_more(self.books.todo(
            self.books.backup_id(request["backup"]), row["id"], request["kind"], request["after"]))
        return {"more": more,
                "rows": [[cursor, as_text(path), tag, _files_out([wanted])[0]
                          if wanted[0] is not None else None]
           for cursor, path, tag, _, *wanted in rows],
                "digests": [row[3].hex() if row[3] else None for row in rows]}

    @answers("done")
    def op_done(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.source_row(request["source"])
        self.books.done(self.books.backup_id(request["backup"]), row["id"], request["kind"],
                        request["rows"])
        return {}

    @answers("forget")
    def op_forget(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.source_row(request["source"])
        self.books.forget_copies(self.books.backup_id(request["backup"]), row["id"],
                                 _paths_of(request))
        return {}

    @answers("report_start")
    def op_report_start(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        self.books.source_row(request["source"])
        return {"serial": self.books.start_report()}

    @answers("report")
    def op_report(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.source_row(request["source"])
        self.books.report(self.books.backup_id(request["backup"]), row, request["serial"],
                          _rows_of(request))
        return {}

    @answers("report_end")
    def op_report_end(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.source_row(request["source"])
        backup = self.books.backup_id(request["backup"])
        self.books.end_report(backup, row, request["serial"])
        return self._standing(backup, self.books.source_row(request["source"]))


class Confirmations(Standings):
    """Claims, and what makes a copy count or lets it go."""

    @answers("claim")
    def op_claim(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.changeable(request["source"])
        self.books.expire(self.config.lost_after)
        number = self.books.hear(request["backup"], {"free": request["free"]})
        if self.books.recovering(row["id"]):
            return {"rows": []}
        return {"rows": _files_out(self.books.claim(number, row, request["free"],
                                                    min(request["most_files"], PAGE),
                                                    request["most_bytes"]))}

    @answers("claims")
    def op_claims(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """The claims that a backup has: those of an earlier pass that did not come to its end."""
        row = self.books.changeable(request["source"])
        number = self.books.hear(request["backup"], {})
        return {"rows": _files_out(first_page(
            claim[1:] for claim in self.books.own_claims(number, row["id"], PAGE)))}

    @answers("claim_paths")
    def op_claim_paths(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.changeable(request["source"])
        number = self.books.hear(request["backup"], {"free": request["free"]})
        relieved = None if request["relieved"] is None \
            else self.books.backup_id(request["relieved"])
        return {"rows": _files_out(self.books.claim_paths(number, row, _paths_of(request),
                                                          relieved))}

    @answers("release")
    def op_release(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.source_row(request["source"])
        self.books.release(self.books.backup_id(request["backup"]), row["id"],
                           None if request["all"] else _paths_of(request))
        return {}

    # -- confirmations --

    @answers("confirm")
    def op_confirm(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """Compare digests and samples of copies with our own files; the first step of a
        confirmation.

        rows: [path, version, digest, [offset...], samples' digest]; the answer has one word for
        each: "ok"; "changed": the file is another by now; "bad": the copy is; "rotten": our own
        file is no longer what it was, its times are; "unreadable"; "unproven": ask again later, our
        own file has to be read first.
        """
        source = self.books.changeable(request["source"])
        number = self.books.hear(request["backup"], {})
        given = [self._given(item) for item in request["rows"]]
        words = self._compare_all(source, given)
        disputed = {at: facts["id"] for at, (word, facts) in enumerate(words) if word == "unproven"}
        if disputed:
            self.reader.first(disputed.values(), LOOK_WAIT)
            for at, file in disputed.items():
                words[at] = self._decide(file, given[at]), words[at][1]
        good = [(facts["id"], facts["version"], one["digest"])
                for one, (word, facts) in zip(given, words) if word == "ok"]
        noted = set(self.books.record_check(number, self.books.source_row(request["source"]), good))
        self.reader.wake()
        return {"verdicts": [word if word != "ok" or facts["id"] in noted else "changed"
                             for word, facts in words]}

    def _compare_all(self, source: "Dict[str, Any]", given: "List[Dict[str, Any]]",
                     ) -> "List[Tuple[str, Dict[str, Any]]]":
        """For each row of a confirmation the word (see op_confirm) and the facts of our file.
        Small files are read in full: that is their proof."""
        words: "List[Tuple[str, Dict[str, Any]]]" = []
        proofs = []
        known = self.books.versions_of(source["id"], [one["path"] for one in given])
        with _open_source(self.config.sources[source["name"]]) as tree:
            for one in given:
                facts = known.get(one["path"])
                if facts is None or facts["version"] != one["version"] \
                        or facts["blocked"] == "unreadable":
                    words.append(("changed", {}))
                    continue
                word, own = compare_own(tree, facts, one)
                if own is not None:
                    proofs.append((len(words), (facts, own, word == "ok")))
                words.append((word, facts))
        row = self.books.source_row(source["name"])
        verdicts = self.books.prove_all(row, [one for _, one in proofs])
        for (at, (facts, _, _)), verdict in zip(proofs, verdicts):
            self.say_of_proof(source["name"], facts["path"], verdict)
            if verdict in ("changed", "rotten"):
                words[at] = verdict, facts
        self.books.settle_others(row, 0)
        return words

    def _decide(self, file: int, given: "Dict[str, Any]") -> str:
        """The word for a copy about which there was a dispute, after our own file was to be
        read."""
        facts = self.books.facts_of(file)
        if facts is None or facts["version"] != given["version"] or facts["path"] != given["path"]:
            return "changed"
        if facts["blocked"] == ROTTEN:
            return "rotten"
        if proven(facts):
            return "ok" if facts["digest"] == given["digest"] else "bad"
        return "unproven"

    def say_of_proof(self, source: str, path: bytes, verdict: str) -> None:
        if verdict == "rotten":
            log.warning("%s in %s has rotted: its content changed, its size and times did not",
                        shown(path), source)
        elif verdict == "copies":
            log.info("%s in %s: its copies were of another content, and are made again",
                     shown(path), source)

    @staticmethod
    def _given(item: "List[Any]") -> "Dict[str, Any]":
        return {"path": as_raw(item[0]), "version": item[1], "digest": bytes.fromhex(item[2]),
                "offsets": item[3],
                "samples": bytes.fromhex(item[4])}

    @answers("placed")
    def op_placed(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.changeable(request["source"])
        paths = self.books.count_copies(self.books.backup_id(request["backup"]), row["id"],
                                        _rows_of(request))
        test_point("counted-not-told")
        return {"counted": [as_text(path) for path in paths]}

    @answers("decline")
    def op_decline(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.source_row(request["source"])
        self.books.decline(self.books.backup_id(request["backup"]), row["id"],
                           _rows_of(request))
        return {}

    # -- making room --

    @answers("smallest")
    def op_smallest(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.changeable(request["source"])
        found = None if self.books.recovering(row["id"]) else self.books.smallest_underserved(
            self.books.backup_id(request["backup"]), row, request["above"], request["most"])
        return {"file": [as_text(found[0]), found[1]] if found else None}

    @answers("droppable")
    def op_droppable(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.changeable(request["source"])
        rows = self.books.droppable(self.books.backup_id(request["backup"]), row, request["need"])
        return {"rows": _files_out(first_page(rows))}

    @answers("drop")
    def op_drop(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.changeable(request["source"])
        self.books.expire(self.config.lost_after)
        backup, paths = self.books.backup_id(request["backup"]), _paths_of(request)
        self._prove_first(row, paths)
        granted = self.books.grant_drop(backup, row, paths)
        return {"granted": [as_text(path) for path in granted]}

    def _prove_first(self, source: "Dict[str, Any]", paths: "List[bytes]") -> None:
        """What may be deleted elsewhere is to be a fact: read those files now, as far as that goes
        quickly."""
        doubtful = [one["id"] for one in self.books.versions_of(source["id"], paths).values()
                    if one["doubt"] is not None]
        if doubtful:
            self.reader.first(doubtful, LOOK_WAIT)

    @answers("relief")
    def op_relief(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.changeable(request["source"])
        rows = [] if self.books.recovering(row["id"]) else self.books.relief_offers(
            self.books.backup_id(request["backup"]), row, self.books.backup_id(request["relieved"]),
            request["gap"],
            request["most"])
        return {"rows": _files_out(first_page(rows))}


class Service(Confirmations):
    """What a server answers: the operations of the classes above, catalogs, what status and restore
    ask for, and what may be read by rsync."""

    # -- catalogs --

    @answers("catalog")
    def op_catalog(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """A page of the news since a generation, up to `upto` (0: the newest).  First the entries,
        cursor (gen, id), then, with cursor (-1, 0) and `after` a path, the paths that are no
        more."""
        row = self.books.source_row(request["source"])
        upto = request["upto"] or self.books.close_generation(row)
        cursor = tuple(request["cursor"])
        out: "Dict[str, Any]" = {"upto": upto, "time": self.books.generation_time(row["id"], upto),
                                 "books": self.books.id}
        if cursor[0] >= 0:
            rows, more = self.books.catalog_entries(row["id"], request["since"], upto, cursor)
            user, group, level = self.names.user, self.names.group, request["level"]
            out["rows"] = [catalog_columns(level, path, kind, size, mtime, mode, uid, gid,
                                           user(uid), group(gid), *more)
                           for (_, _, path, kind, size, mtime, mode, uid, gid, *more) in rows]
            out["cursor"] = list(rows[-1][:2]) if more else [-1, 0]
        else:
            after = as_raw(request["after"]) if isinstance(request["after"], str) else b""
            graves, more = self.books.catalog_graves(row["id"], request["since"], upto, after)
            out["rows"] = [[as_text(path)] for path in graves]
            out["cursor"] = [-1, 0] if more else [-2, 0]
        return out

    @answers("generations")
    def op_generations(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        rows = self.books.generations(self.books.source_row(request["source"])["id"])
        return {"rows": [[gen, when, bool(changed)] for gen, when, changed in rows]}

    # -- for status and restore --

    @answers("status")
    def op_status(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        books, sources = self.books, {}
        books.expire(self.config.lost_after)
        self._look_after_restores()
        for name in books.active_sources():
            row = books.source_row(name)
            figures = books.figures(row)
            figures.update(host=self.host, path=row["path"], replicas=row["replicas"],
                           state=row["state"],
                           reason=row["reason"], cause=row["cause"], special=row["special"],
                           stuck=self._stuck(row),
                           held_files=[[as_text(path), change] for path, change in
                                       books.held_page(row["id"], b"", 6)], **self.look_facts(row))
            figures.update(short_since=books.short_since(row["id"], row["replicas"]),
                           short=[[as_text(path), size, why] for path, size, why in
                                  books.short_files(row["id"], row["replicas"], 10)])
            sources[name] = figures
        return {"sources": sources, "backups": books.last_words(), "mine": self._own_backups(),
                "duties": books.duties(),
                "config_version": self.home.config_state().get("version", 0),
                "config_held": self.home.held_config().get("removes")}

    def _stuck(self, row: "Dict[str, Any]") -> "Dict[str, Any]":
        count, some = self.books.stuck_files(row["id"], row["replicas"], 20)
        return {"count": count, "some": ["%s: %s" % (shown(path), why) for path, why in some]}

    @answers("plan")
    def op_plan(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """What `plan` has to know of this host: its sources, and how much its backups can hold
        (`rooms`)."""
        books, sources = self.books, {}
        books.expire(self.config.lost_after)
        for name in books.active_sources():
            row = books.source_row(name)
            sources[name] = dict(books.plan_facts(row), state=row["state"],
                                 scanned=row["scanned"] is not None)
        return {"sources": sources,
                "rooms": {spec.name: self._room_of(spec)
                          for spec in self.config.backups_of(self.host)}}

    @staticmethod
    def _room_of(spec: Backup) -> "Dict[str, int]":
        """{"capacity", "used"} of a backup of this host; of one that is still to be made, where it
        will be."""
        try:
            facts = VaultReader(spec).facts()
            return {"capacity": facts["capacity"], "used": facts["used"]}
        except CBackupError:
            path = spec.path
            while not os.path.isdir(path) and path != os.path.dirname(path):
                path = os.path.dirname(path)
            return {"capacity": room_limit(spec._replace(path=path), 0), "used": 0}

    @answers("vaults")
    def op_vaults(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """The backups of this host that have something of a source, with their catalog files."""
        # a line that was written just now is one of them
        with contextlib.suppress(CBackupError, OSError):
            self.catch_up_with_home()
        out = {}
        for spec in self._open_backups():
            directory = os.path.join(spec.path, META_DIR.decode(), "catalog", request["source"])
            try:
                names = [(name, os.path.getsize(os.path.join(directory, name)))
                         for name in os.listdir(directory)]
            except OSError:
                names = []
            out[spec.name] = {"catalogs": [[f.name, dict(names)[f.name]]
                                           for f in list_catalogs(n for n, _ in names)]}
        return {"vaults": out}

    @answers("holdings")
    def op_holdings(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """A page of what a backup of this host has of a source, by path; with `kind` 2 of its old
        versions, by number."""
        spec = self._own_backup(request["backup"])
        reader, after, prefix = VaultReader(spec), request["after"], as_raw(request["prefix"])
        if request.get("kind") == 2:
            rows, more = with_more(reader.old_versions(request["source"], after
                                                       if isinstance(after, int) else 0, prefix))
            return {"more": more,
                    "rows": [[number, as_text(path), as_text(stored), size, mtime, digest.hex()
                              if digest else None]
               for number, path, stored, size, mtime, digest in rows]}
        rows, more = with_more(reader.held_page(request["source"], as_raw(after)
                                                if isinstance(after, str) else b"", prefix))
        return {"more": more,
                "rows": [[as_text(path), size, mtime, d.hex() if d else None]
                         for path, size, mtime, d in rows]}

    @answers("find")
    def op_find(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """Copies and older versions in the backups of this host, of files that match a pattern;
        FIND_LIMIT a backup."""
        found, times, more = [], [], False
        for spec in self._open_backups():
            with contextlib.suppress(Refused):
                reader = VaultReader(spec)
                rows = reader.find(request["pattern"])
                page = first_page(rows[:FIND_LIMIT])
                more = more or len(rows) > len(page)
                found += [[spec.name, source, as_text(path), size, mtime, since]
                          for source, path, size, mtime, since in page]
                times += reader.times_of(page)
        return {"rows": found, "at": times, "more": more}

    @answers("list")
    def op_list(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """What a backup of this host has directly in a directory of a source: copies, with `kind` 2
        older versions.  Of level 2 on.  `next`: what to go on with as `after`, null at the end."""
        spec = self._own_backup(request["backup"])
        directory, after = as_raw(request["path"]), as_raw(str(request["after"]))
        rows, following = VaultReader(spec).list_directory(
            request["source"], check_relative(directory) if directory else b"",
            request.get("kind") == 2, after)
        return {"rows": [[as_text(row[0])] + list(row[1:]) for row in rows],
                "next": None if following is None else as_text(following)}

    @answers("held_files")
    def op_held_files(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """A page of the files for which a source is held, by path: [path, "gone" or "changed"]."""
        source = self.books.source_row(request["source"])["id"]
        rows, more = with_more(self.books.held_page(source, as_raw(request["after"]), PAGE))
        return {"rows": _files_out(rows), "more": more}

    # -- the configuration and consent --

    @answers("forget_source")
    def op_forget_source(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """Remember that the copies of a source that is no longer configured may go; the clients of
        this host do it."""
        self.catch_up_with_home()
        if request["source"] in self.config.sources:
            raise Refused("configured", "source %s is in the configuration" % request["source"])
        self.home.note_forget(request["source"],
                              [b.name for b in self.config.backups_of(self.host)])
        return {}

    @answers("config")
    def op_config(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """The configuration in force here."""
        return {"config": self.home.config_offer()}

    @answers("new_config")
    def op_new_config(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        """A client brings a configuration that it believes to be newer."""
        taken = self.home.take_config(check_offer(request["config"]))
        self.say_held()
        self.catch_up_with_home()  # also when an edit made here is the newer one
        return {"taken": taken}

    @answers("accept")
    def op_accept(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        row = self.books.source_row(request["source"])
        if row["state"] == "ok":
            return {"text": "source %s is not held: nothing to accept" % request["source"]}
        if row["cause"] in UNACCEPTABLE:
            advice = held_advice(request["source"], row)
            raise Refused("held", "this cannot be accepted: " + advice)
        self.scan(request["source"], consent=True)
        return {"text": "source %s: accepted" % request["source"]}

    # -- rsync --

    def root_for(self, request: "Dict[str, Any]") -> "Tuple[str, Optional[List[bytes]]]":
        """(the directory that an rsync request may read, of a source nothing but these paths in
        it)."""
        wrong = misfit(request, OPERATIONS["rsync"].request)
        if wrong:
            raise ProtocolError("rsync%s" % wrong)
        if request["of"] == "source":
            return self._part_of_source(request)
        spec = self._own_backup(request["name"])
        below = {"backup": (request["source"],),
                 "attic": (META_DIR.decode(), "attic", request["source"]),
                 "catalog": (META_DIR.decode(), "catalog", request["source"])}[request["of"]]
        root = os.path.join(spec.path, *below)
        if os.path.realpath(root) != os.path.join(os.path.realpath(spec.path),
                                                  *below) or not os.path.isdir(root):
            raise Refused("unknown", "backup %s has nothing of %s" % (spec.name, request["source"]))
        return root, None

    def _part_of_source(self, request: "Dict[str, Any]") -> "Tuple[str, Optional[List[bytes]]]":
        """Of a source only files can be read that are in the catalog, and not left out by now:
        those that are asked for, or for a client of level 1, which does not say, all that somebody
        has claimed or is to update."""
        row = self.books.changeable(request["source"])
        if self.home.outside(row["path"]):
            raise Refused("held", self.home.outside(row["path"]))
        root, source = os.path.realpath(row["path"]), self.config.sources[request["source"]]
        if "paths" in request:
            paths = _paths_of(request)
            there = self.books.files_of(row["id"], paths)
            asked = [path for path in paths if path in there]
        else:
            asked = self.books.on_their_way(row["id"], ON_THEIR_WAY + 1)
            if len(asked) > ON_THEIR_WAY:
                if source.exclude or source.exclude_caches:
                    raise Refused("unknown-op",
                                  "too many files are on their way: update cbackup on the "
                                  "machine that asks")
                return root, None
        left_out = LeftOut(source)
        return root, list(left_out.those_in(asked))


ON_THEIR_WAY = 20000
"""Most files that a client is served which does not say what it wants: rsync compares each with
each."""


def _open_source(spec: Source) -> Tree:
    try:
        return Tree(os.path.realpath(spec.path))
    except OSError as error:
        raise Refused("held", "source %s: %s: %s" % (spec.name, spec.path, reason_of(error)))


FIND_LIMIT = 1000
"""Most hits that `find` shows of one backup."""


def compile_pattern(pattern: str) -> "Callable[[bytes], bool]":
    """A test for paths: the path itself, everything below it, or an fnmatch pattern for the whole
    path; a pattern without `/` is for the last name too."""
    import fnmatch
    plain, test = as_raw(pattern).strip(b"/"), re.compile(fnmatch.translate(pattern.strip("/")))

    def matches(path: bytes) -> bool:
        return path == plain or path.startswith(plain + b"/") or bool(test.match(as_text(path))) \
            or b"/" not in plain and bool(test.match(as_text(path.rpartition(b"/")[2])))
    return matches


def beyond_prefix(prefix: bytes) -> bytes:
    """What stands, in the order of paths, behind all that begin with a prefix: no name has so many
    bytes."""
    return prefix + b"\xff" * 256


class VaultReader:
    """Reads a backup's database for the server, beside a client that may be at work in it."""

    def __init__(self, spec: Backup) -> None:
        self.spec = spec

    def _query(self, sql: str, *values: Any) -> "List[Tuple[Any, ...]]":
        return list(self._each(sql, *values))

    def _each(self, sql: str, *values: Any) -> "Iterator[Tuple[Any, ...]]":
        with self._database() as db:
            for row in db.execute(sql, values):
                yield row

    @contextlib.contextmanager
    def _database(self) -> "Iterator[sqlite3.Connection]":
        path = os.path.join(self.spec.path, META_DIR.decode(), "backup.db")
        if not os.path.exists(path):
            raise Refused("unknown", "%s has nothing in it yet (no client has run)" % self.spec.path
                          if os.path.isdir(self.spec.path)
                          else "%s does not exist: is its disk mounted?" % self.spec.path)
        try:
            db = sqlite3.connect(path, timeout=30)
            try:
                yield db
            finally:
                db.close()
        except sqlite3.Error as error:
            raise Refused("damaged",
                          "the database in %s cannot be read: %s" % (self.spec.path, error))

    def facts(self) -> "Dict[str, Any]":
        files, held, other = self._query("SELECT (SELECT COALESCE(SUM(files), 0) FROM sums), "
                                         "(SELECT COALESCE(SUM(bytes), 0) FROM sums), "
                                         "(SELECT SUM(bytes) FROM used)")[0]
        used, capacity = held + other, room_limit(self.spec, held + other)
        state = "ok" if used <= capacity \
            else "%s are used, and only %s may be" % (format_size(used), format_size(capacity))
        return {"state": state, "used": used, "held": held, "files": files, "capacity": capacity,
                "sources": dict(self._query("SELECT source, files FROM sums WHERE files>0"))}

    def misplaced(self, cluster: str, expected: "Optional[str]") -> str:
        """Why the directory is not this backup's; "" when it is, or when nothing is there and
        nothing is expected."""
        identity = read_json(os.path.join(self.spec.path, META_DIR.decode(), "identity"))
        if not identity.get("id"):
            return "%s has lost its .cbackup: is its disk mounted?" % self.spec.path if expected \
                else ""
        if identity.get("cluster") != cluster:
            return "%s belongs to another cluster" % self.spec.path
        if identity.get("backup") != self.spec.name or expected not in (None, identity["id"]):
            return "%s is the backup %s (%s), not the one that was here" % (
                self.spec.path, shown(str(identity.get("backup")).encode()),
                str(identity["id"])[:6])
        return ""

    def not_writable(self) -> str:
        """Why no client can write into it; "" also when the directory is still to be made."""
        if not os.path.isdir(self.spec.path):
            return ""
        if os.statvfs(self.spec.path).f_flag & os.ST_RDONLY:
            return "%s is on a file system that is read-only" % self.spec.path
        return "" if os.access(self.spec.path,
                               os.W_OK | os.X_OK) else "%s cannot be written to" % self.spec.path

    def _usable(self) -> bool:
        """Whether the database can be read and is complete.  If not, the files are there all the
        same."""
        with contextlib.suppress(Refused):
            return bool(self._query("SELECT 1 FROM meta WHERE key='complete'"))
        return False

    def _tree(self) -> Tree:
        try:
            return Tree(self.spec.path)
        except OSError as error:
            raise Refused("unknown",
                          "%s: %s: is its disk mounted?" % (self.spec.path, reason_of(error)))

    def held_page(self, source: str, after: bytes, prefix: bytes = b"",
                  ) -> "List[Tuple[bytes, int, int, Optional[bytes]]]":
        """(path, size, mtime, digest) of copies that begin with a prefix, by path; no digests when
        they have to be looked for in the directory."""
        if self._usable():
            return self._query(
                "SELECT path, size, mtime, digest FROM held WHERE source=? AND path%s? AND path<? "
                "ORDER BY path LIMIT ?" % (">" if after >= prefix else ">="), source,
                max(after, prefix),
                beyond_prefix(prefix), PAGE)
        with self._tree() as tree:
            found = (row for row in files_here(tree, source, after) if row[0].startswith(prefix))
            return [row + (None,) for row in itertools.islice(found, PAGE)]

    def find(self, pattern: str) -> "List[Tuple[str, bytes, int, int, Optional[float]]]":
        """(source, path, size, mtime, None for a copy or since when it is an old version), a few
        more than FIND_LIMIT."""
        test, found = compile_pattern(pattern), []
        for sql in ("SELECT source, path, size, mtime, NULL FROM held",
                    "SELECT source, path, size, mtime, since FROM attic "
                    "WHERE done=1 AND why<>'bad' ORDER BY since DESC"):
            for row in self._each(sql):
                if test(row[1]):
                    found.append(row)
                    if len(found) > FIND_LIMIT:
                        return found
        return found

    def list_directory(self, source: str, directory: bytes, old: bool, after: bytes,
                       ) -> "Tuple[List[Tuple[bytes, Optional[int], int, float]], Optional[bytes]]":
        """What is directly in a directory of a source, or is that path: copies, or with `old` older
        versions; from the path `after` on, about a PAGE.

        Returns rows (name, empty for the path itself; size, None for a directory with something in
        it; mtime; until when it was the present version) and the path to go on with, None at the
        end.  What is deeper down is skipped by index.
        """
        table, more = ("attic", "since AS until") if old else ("held", "0 AS until")
        rows = "SELECT path, size, mtime, %s FROM %s WHERE source=?1 AND %s%%s" % (
            more, table, "done=1 AND why<>'bad' AND " if old else "")
        found: "List[Tuple[bytes, Optional[int], int, float]]" = []
        # "0" comes after "/"
        prefix, end = (directory + b"/", directory + b"0") if directory else (b"", b"\xff" * 8)
        with self._database() as db:
            if directory and not after:
                found += [(b"",) + row[1:]
                          for row in db.execute(rows % "path=?2 LIMIT 100", (source, directory))]
            at = max(prefix, after)
            while len(found) < PAGE:
                first = db.execute(rows % "path>=?2 AND path<?3 ORDER BY path LIMIT 1",
                                   (source, at, end)).fetchone()
                if first is None:
                    return found, None
                name, slash, _ = first[0][len(prefix):].partition(b"/")
                if slash:
                    found.append((name, None, 0, 0))
                elif old:
                    found += [(name,) + row[1:]
                              for row in db.execute(rows % "path=?2 LIMIT 100", (source, first[0]))]
                else:
                    found.append((name,) + first[1:])
                at = prefix + name + (b"0" if slash else b"\0")
        return found, at

    def times_of(self, rows: "List[Tuple[str, bytes, int, int, Optional[float]]]",
                 ) -> "List[Optional[int]]":
        """For each row of `find` a time as of which a restore brings back that old version; None:
        not known, or a copy."""
        known = {}
        for source in {row[0] for row in rows if row[4] is not None}:
            directory = os.path.join(self.spec.path, META_DIR.decode(), "catalog", source)
            known[source] = times_of_versions(
                directory, {row[1] for row in rows if row[0] == source and row[4] is not None})
        return [known[source].get((path, size, mtime)) if since is not None else None
                for source, path, size, mtime, since in rows]

    def old_versions(self, source: str, after: int, prefix: bytes = b"") -> "List[Tuple[Any, ...]]":
        """(number, path, name in the attic, size, mtime, digest or None) of old versions of paths
        that begin so, by number."""
        if self._usable():
            return self._query("SELECT id, path, stored, size, mtime, digest FROM attic "
                               "WHERE source=? AND id>? AND done=1 AND why<>'bad' AND path>=? "
                               "AND path<? "
                               "ORDER BY id LIMIT ?", source,
                               after, prefix,
                               beyond_prefix(prefix), PAGE)
        with self._tree() as tree:
            rows = (row for row in old_files_here(tree, source) if row[0].startswith(prefix))
            found = enumerate(rows, 1)
            return [(number,) + row + (None,)
                    for number, row in itertools.islice(found, after, after + PAGE)]


INVITATION_SECONDS, INVITATION_TRIES = 3600.0, 5


def make_invitation(home: Home) -> str:
    """A token for one machine: the certificate's fingerprint, by which the new machine knows the
    server, and a secret, by which the server knows the new machine.  An earlier invitation ends."""
    secret = secrets.token_hex(10)
    with home.lock("invitation.lock"):
        atomic_write(home.state("invitation.json"), json.dumps({
            "secret": hashlib.sha256(secret.encode()).hexdigest(),
            "until": clock.now() + INVITATION_SECONDS,
            "tries": INVITATION_TRIES, "wrong": {}}).encode())
    return home.cluster_id()[:32] + secret


def open_invitation(home: Home, address: str = "") -> "Dict[str, Any]":
    """The invitation that can still be used, from that address; {} when there is none."""
    found = read_json(home.state("invitation.json"))
    usable = found.get("tries", 0) > 0 \
        and found.get("until", 0) > clock.now() > found["until"] - 2 * INVITATION_SECONDS
    spent = isinstance(found.get("wrong"), dict) \
        and found["wrong"].get(address, 0) >= INVITATION_TRIES
    return found if usable and not spent else {}


def redeem_invitation(home: Home, secret: Any, address: str) -> bool:
    """Whether `secret` is the open invitation's.  A right one ends it; for an address with
    INVITATION_TRIES wrong ones it is over, and for no other: a stranger elsewhere cannot spend
    it."""
    with home.lock("invitation.lock"):
        found = open_invitation(home, address)
        if not found:
            return False
        wrong = found.setdefault("wrong", {})
        given = hashlib.sha256(str(secret).encode("utf-8", "replace")).hexdigest()
        right = secrets.compare_digest(given, found["secret"])
        if right:
            found["tries"] = 0
        elif len(wrong) < 1000 or address in wrong:
            wrong[address] = wrong.get(address, 0) + 1
        atomic_write(home.state("invitation.json"), json.dumps(found).encode())
        return right


def join_cluster(home: Home, address: str, port: int, token: str) -> str:
    """Fetch key and configuration from the server at `address`, when it has the certificate that
    the token names. Returns the address by which that server sees this machine."""
    if not re.match(r"[0-9a-f]{52}\Z", token):
        raise UsageError("that is not a token: copy the whole line that `cbackup.pyz invite` "
                         "printed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the fingerprint decides, before anything is said
    try:
        connection = socket.create_connection((address, port), timeout=CONNECT_TIMEOUT)
        connection.settimeout(HANDSHAKE_TIMEOUT)
        own = connection.getsockname()[0]
        tls = context.wrap_socket(connection)
        fingerprint = hashlib.sha256(tls.getpeercert(binary_form=True) or b"").hexdigest()[:32]
        if not secrets.compare_digest(fingerprint, token[:32]):
            raise CBackupError("%s:%d is not a server of the cluster that the token is for"
                               % (address, port))
        channel = Channel(tls)
        hello = channel.receive(HANDSHAKE_TIMEOUT) or {}
        answer = hello
        if hello.get("join"):
            channel.send({"op": "join", "secret": token[32:]})
            answer = channel.receive(HANDSHAKE_TIMEOUT) or {}
        channel.close()
    except (OSError, ProtocolError) as error:
        raise Unreachable(address, "port %d: %s" % (port, reason_of(error)))
    if answer.get("ok") is not True or not isinstance(answer.get("key"), str):
        raise CBackupError("%s: %s"
                           % (address,
                              shown(str(answer.get("text")
                                        or "it did not let this machine join")[:300])))
    home.take_part(check_offer(answer.get("config")))
    atomic_write(home.key_path, answer["key"].encode(), 0o600)
    return own


def give_memory_back() -> None:
    """With glibc every thread keeps what it freed, and after one large message the next ones are
    kept too: of 60 at once 190 MB stayed, with this 90.  Elsewhere there is no such function, and
    no need of it."""
    with contextlib.suppress(Exception):
        import ctypes
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 256 << 10)  # M_MMAP_THRESHOLD
        mallopt(-8, 2)  # M_ARENA_MAX


class Guest:
    """One connection to a server.  kind: "silent" (has said nothing yet), "greeting" (its handshake
    is under way), "member"."""

    def __init__(self, connection: socket.socket, address: str) -> None:
        self.connection, self.since, self.kind = connection, time.monotonic(), "silent"
        self.address = address
        self.waits: "Optional[float]" = None  # since when a member has not asked for anything

    def cut(self) -> None:
        """End it, from any thread: who reads from it sees its end."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def address_of(peer: "Tuple[Any, ...]") -> str:
    """What counts as one machine: an IPv4 address, or the first half of an IPv6 address (the rest a
    machine chooses)."""
    host = str(peer[0]).split("%")[0]
    if ":" not in host:
        return host
    if host.startswith("::ffff:") and "." in host:
        return host[7:]
    with contextlib.suppress(OSError):
        return socket.inet_pton(socket.AF_INET6, host)[:8].hex()
    return host


class Door(threading.Thread):
    """Accepts connections.  Who has said nothing costs a descriptor and no thread.  When the room
    is full, the oldest that has not proved itself goes, silent ones first, of the address that has
    the most; members have places of their own."""

    def __init__(self, listener: socket.socket, serve: "Callable[[Guest], None]") -> None:
        super().__init__(name="door", daemon=True)
        self.listener, self.serve = listener, serve
        self._lock = threading.Lock()
        self._guests: "set[Guest]" = set()
        self._silent: "Dict[int, Guest]" = {}
        self._poller = select.poll()
        self._over, self._wake = False, os.pipe()

    def stop(self) -> None:
        self._over = True
        os.write(self._wake[1], b".")

    def run(self) -> None:
        self.listener.setblocking(False)
        for descriptor in (self.listener.fileno(), self._wake[0]):
            self._poller.register(descriptor, select.POLLIN)
        swept = time.monotonic()
        while not self._over:
            for descriptor, _ in self._poller.poll(1000):
                if descriptor == self.listener.fileno():
                    self._accept()
                elif descriptor in self._silent:
                    self._begin(self._silent[descriptor])
            if time.monotonic() - swept > 0.5:
                swept = time.monotonic()
                self._sweep(swept)
        self.listener.close()

    def _accept(self) -> None:
        for _ in range(64):
            try:
                connection, peer = self.listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:  # no descriptors left
                log.error("a connection was not accepted: %s", reason_of(error))
                self._make_room(0)
                time.sleep(0.05)
                return
            self._make_room(ROOM)
            guest = Guest(connection, address_of(peer))
            with self._lock:
                self._guests.add(guest)
            self._silent[connection.fileno()] = guest
            self._poller.register(connection.fileno(), select.POLLIN)

    def _make_room(self, most: int) -> None:
        with self._lock:
            strangers = [guest for guest in self._guests if guest.kind in ("silent", "greeting")]
        if not strangers or len(strangers) < most:
            return
        counts: "Dict[str, int]" = {}
        for guest in strangers:
            counts[guest.address] = counts.get(guest.address, 0) + 1
        self._turn_away(min(strangers,
                            key=lambda g: (-counts[g.address], g.kind != "silent", g.since)))

    def _turn_away(self, guest: Guest) -> None:
        if guest.kind == "silent":
            self._leave_silence(guest)
            with contextlib.suppress(OSError):
                guest.connection.close()
            self.forget(guest)
        else:
            guest.kind = "going"
            guest.cut()  # its thread ends

    def _leave_silence(self, guest: Guest) -> None:
        descriptor = guest.connection.fileno()
        if self._silent.pop(descriptor, None) is not None:
            self._poller.unregister(descriptor)

    def _begin(self, guest: Guest) -> None:
        self._leave_silence(guest)
        guest.kind = "greeting"
        try:
            threading.Thread(target=self.serve, args=(guest,), daemon=True).start()
        except RuntimeError as error:  # no more threads
            log.error("a connection is not served: %s", error)
            guest.connection.close()
            self.forget(guest)

    def _sweep(self, now: float) -> None:
        with self._lock:
            late = [guest for guest in self._guests if guest.kind != "member"
                    and now - guest.since > (STRANGER_SILENCE if guest.kind == "silent"
                                             else STRANGER_TIME)]
        for guest in late:
            self._turn_away(guest)

    def forget(self, guest: Guest) -> None:
        with self._lock:
            self._guests.discard(guest)

    def admit(self, guest: Guest) -> bool:
        """`guest` has proved itself.  Where its address has all of its places, or all are taken,
        the member's connection that has asked for nothing for the longest goes: its owner opens it
        again when needed.  False when there is none."""
        with self._lock:
            members = [other for other in self._guests if other.kind == "member"]
            own = [other for other in members if other.address == guest.address]
            full = own if len(own) >= MEMBER_SHARE else members if len(members) >= MEMBERS else []
            waiting = [other for other in full if other.waits is not None]
            if full and not waiting:
                return False
            guest.kind = "member"
            if full:
                idlest = min(waiting, key=lambda other: other.waits or 0.0)
                self._guests.discard(idlest)
                idlest.cut()
        return True


class Server:
    """The passive process: accepts connections, a thread for each, and answers until it is told to
    stop."""

    def __init__(self, home: Home, config: Config, host: str) -> None:
        give_memory_back()
        self.home, self.host = home, host
        self.context = tls_context(home, server_side=True)
        self.service = Service(home, config, host)
        self.service.scanner = Scanner(self.service)
        self.service.say_news_of_lines()
        self._allowance = Allowance()
        self._stopping, self._wake = False, os.pipe()
        address, port = config.address(host)
        bind = self._bind_address(address)
        try:
            listener = self._listen(bind, port)
        except OSError as error:
            raise CBackupError("cannot listen on port %d: %s; is a server running already?"
                               % (port, reason_of(error)))
        self.where = ("[%s]:%d" if ":" in bind else "%s:%d") % (bind, port)
        self.door = Door(listener, self.converse)

    @staticmethod
    def _listen(bind: str, port: int) -> socket.socket:
        listener = socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET,
                                 socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ":" in bind:
                with contextlib.suppress(OSError):
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((bind, port))
            listener.listen(512)
        except OSError:
            listener.close()
            raise
        return listener

    @staticmethod
    def _bind_address(address: str) -> str:
        """A loopback address is taken at its word; for any other the server listens on all of the
        host's."""
        if address == "localhost" or re.match(r"127\.\d+\.\d+\.\d+\Z", address):
            return "127.0.0.1" if address == "localhost" else address
        if address == "::1":
            return address
        if socket.has_ipv6:
            try:
                with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                    probe.bind(("::", 0))
                return "::"
            except OSError:
                pass
        return "0.0.0.0"

    def run(self, ready: "Callable[[], None]") -> None:
        """Serve until `stop`."""
        assert self.service.scanner is not None
        self.door.start()
        self.service.scanner.start()
        self.service.reader.start()
        ready()
        taken = last = None  # not what is there now: it may have changed since the server read it
        ticks = 0
        # Short waits: a signal that another thread receives wakes this one only when its wait ends.
        while not self._stopping:
            _wait([self._wake[0]], [], 0.5)
            ticks += 1
            if ticks % 10 == 0:
                with contextlib.suppress(sqlite3.Error, OSError):
                    self.service.books.save_up()
                self.service.say_held()
            before, last = last, self._config_stamp()
            # an editor may be in the middle of writing it
            if last not in (None, taken) and last == before:
                taken = last
                self._take_over()
        self.service.scanner.stop()
        self.service.reader.stop()
        self.door.stop()
        self.door.join(2)
        with contextlib.suppress(sqlite3.Error):
            self.service.books.close()

    def _take_over(self) -> None:
        """The file of the configuration has changed: the right one is in force from now on, a wrong
        one is refused."""
        try:
            self.service.catch_up_with_home()
        except CBackupError as error:
            log.error("the configuration is wrong, the last right one stays in force:")
            for line in str(error).splitlines():
                log.error("%s", line)
        except (sqlite3.Error, OSError) as error:
            log.error("the changed configuration could not be taken over: %s", error)

    def stop(self) -> None:
        """For a signal's handler: it takes no lock, not even an Event's, which the interrupted code
        may be holding."""
        self._stopping = True
        os.write(self._wake[1], b".")

    def _config_stamp(self) -> "Optional[Tuple[int, int, int]]":
        try:
            info = os.stat(self.home.config_path)
        except OSError:
            return None
        return info.st_mtime_ns, info.st_size, info.st_ino

    def converse(self, guest: Guest) -> None:
        """Serve one connection.  Nothing that a peer does comes out of here, or holds up
        another."""
        channel = None
        try:
            guest.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            guest.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            guest.connection.settimeout(STRANGER_SILENCE)
            tls = self.context.wrap_socket(guest.connection, server_side=True,
                                           do_handshake_on_connect=False)
            guest.connection = tls
            channel = Channel(tls, STRANGER_LINE, 0)
            tls.do_handshake()
            if not tls.getpeercert(binary_form=True):
                self._let_join(channel, guest.address)
                return
            if not self.door.admit(guest):
                channel.send({"error": "busy",
                              "text": "%s is busy: it has as many connections as it can serve"
                              % self.host})
                return
            channel = Channel(tls, MESSAGE_LIMIT, REQUEST_LIMIT, self._allowance)
            channel.send(self.service.hello())
            while self._answer_one(channel, guest):
                pass
        except (OSError, ProtocolError) as error:
            log.debug("a connection ended: %s", reason_of(error))
        except Exception as error:
            log_failure("a request failed", error)
        finally:
            self.door.forget(guest)
            if channel:
                channel.close()
            with contextlib.suppress(OSError):
                guest.connection.close()

    def _let_join(self, channel: Channel, address: str) -> None:
        """A peer without the key: one request is answered, `join`, and only while an invitation is
        open."""
        if not open_invitation(self.home, address):
            channel.send({"error": "key",
                          "text": "this machine has no cluster.pem, and no invitation is open"})
            return
        channel.send({"cbackup": PROTOCOL, "join": True})
        request = channel.receive(STRANGER_SILENCE, STRANGER_SILENCE) or {}
        with open(self.home.key_path) as stream:  # all of it before the token is spent
            welcome = {"ok": True, "key": stream.read(), "config": self.home.config_offer()}
        if request.get("op") == "join" and redeem_invitation(self.home, request.get("secret"),
                                                             address):
            channel.send(welcome)
            log.warning("a new machine has joined")
        else:
            channel.send({"error": "token",
                          "text": "the token is wrong, used, or older than an hour; "
                                                    "get another one with `cbackup.pyz invite`"})

    def _answer_one(self, channel: Channel, guest: Guest) -> bool:
        """Answer the next request; False when the connection is over."""
        channel.done()
        guest.waits = time.monotonic()
        try:
            request = channel.receive(REQUEST_IDLE)
        except ProtocolError as error:
            with contextlib.suppress(OSError):
                channel.send({"error": "protocol", "text": str(error)})
            return False
        finally:
            guest.waits = None
        if request is None:
            return False
        try:
            if request.get("op") == "rsync":
                root, only = self.service.root_for(request)
                find_rsync()
                channel.send({"ok": True})
                channel.done()
                serve_rsync(channel.socket, root, only)
                return False
            answer = self.service.handle(request)
        except Refused as error:
            answer = {"error": error.reason, "text": str(error)}
        except CBackupError as error:
            channel.send({"error": "protocol", "text": str(error)})
            return not isinstance(error, ProtocolError)
        except sqlite3.Error as error:
            log.error("the books: %s", error)
            self.service.mend_books(error)
            answer = {"error": "books", "text": "the server's books cannot be used: %s" % error}
        except OSError as error:
            answer = {"error": "system", "text": reason_of(error)}
        channel.send(answer)
        return True


# ==== 13. The client: a pass ======================================================================


class Figures:
    """What a pass did, as `client --json` prints it; several backups add up."""

    COUNTS = PASS_COUNTS

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts = dict.fromkeys(self.COUNTS, 0)
        self.actions = 0
        self.unreachable: "Dict[str, str]" = {}
        self.short = 0
        self.trouble = False
        self.broken = False
        self.lines: "List[str]" = []

    def add(self, **counts: int) -> None:
        """Count what was done; anything counted makes the pass one that had something to do."""
        with self.lock:
            for key, value in counts.items():
                self.counts[key] += value
                if value and key != "wire_bytes":
                    self.actions += 1

    def acted(self) -> None:
        with self.lock:
            self.actions += 1

    def remark(self, line: str) -> None:
        """Something that the user should know, and that is no failure."""
        with self.lock:
            self.lines.append(shown(line))

    def complain(self, line: str) -> None:
        """Something that could not be done: a line for standard error, and exit status 1."""
        with self.lock:
            self.trouble = True
            line = shown(line)
            if line not in self.lines:
                self.lines.append(line)

    def broke(self, line: str) -> None:
        """A pass that could not come to its end: nothing is known to be settled."""
        self.broken = True
        self.complain(line)

    def silent(self, error: Unreachable) -> None:
        """A host that could not be reached."""
        with self.lock:
            self.unreachable[error.host] = str(error)

    def gone(self, error: Unreachable) -> None:
        """A host that could not be reached, and that was needed."""
        self.silent(error)
        self.complain(str(error))

    def as_json(self) -> "Dict[str, Any]":
        return dict(self.counts, unreachable=sorted(self.unreachable),
                    settled=not (self.actions or self.short or self.broken or self.unreachable))


def in_parallel(function: "Callable[[Any], None]", items: "Iterable[Any]",
                progress: "Optional[Progress]" = None) -> None:
    """Call `function` for each item in a thread of its own; the first exception is raised at the
    end.  progress: there it is said which items, such as hosts, are waited for."""
    errors: "List[BaseException]" = []

    def guarded(item: Any) -> None:
        try:
            function(item)
        except BaseException as error:
            errors.append(error)

    threads = [(threading.Thread(target=guarded, args=(item,), daemon=True), item)
               for item in items]
    begun = time.monotonic()
    for thread, _ in threads:
        thread.start()
    for thread, _ in threads:
        while thread.is_alive():
            thread.join(0.5)
            alive = [str(item) for other, item in threads if other.is_alive()]
            if progress and alive and time.monotonic() - begun > WAITING_AFTER:
                progress.say("waiting for %s" % ", ".join(alive))
    if progress:
        progress.clear()
    if errors:
        raise errors[0]


class Pipeline:
    """One step of work beside the caller's: while a batch is checked and confirmed, the next one is
    copied."""

    def __init__(self) -> None:
        self._thread: "Optional[threading.Thread]" = None
        self._error: "Optional[BaseException]" = None

    def submit(self, work: "Callable[[], None]") -> None:
        """Start `work` after the work before it; raises what that raised."""
        self.drain()

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=guarded, daemon=True)
        self._thread.start()

    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def drain(self) -> bool:
        """Wait for the work under way; returns whether there was any.  Raises what that raised."""
        was = self._thread is not None
        while self.busy():
            self._thread.join(0.5)  # type: ignore[union-attr]
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return was


class Standing:
    """A source as a pass sees it."""

    def __init__(self, name: str, host: str, spec: "Optional[Source]", books: str,
                 facts: "Dict[str, Any]") -> None:
        self.name, self.host, self.spec, self.books, self.facts = name, host, spec, books, facts
        self.out, self.barren = False, 0

    @property
    def usable(self) -> bool:
        return not self.out and self.facts["state"] == "ok"


class Rsync:
    """How a pass gets bytes: one method, so that the decisions can be tried with another way of
    moving files."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def fetch(self, link: Link, standing: Standing, vault: Vault, files: "List[Wanted]",
              always: bool,
              on_bytes: "Callable[[int], None]") -> Pull:
        find_rsync()
        vault.tree.make_directory(vault.incoming(standing.name))
        return pull_apart(files, lambda f: f.path,
                          lambda some: self._fetch(link, standing, vault, some, always, on_bytes))

    def _fetch(self, link: Link, standing: Standing, vault: Vault, files: "List[Wanted]",
               always: bool,
               on_bytes: "Callable[[int], None]") -> Pull:
        connection = link.again().stream(of="source", name=standing.name, source=standing.name,
                                         paths=[as_text(f.path) for f in files])
        limit = self.config.rate(*[line for line in (standing.spec, vault.spec) if line],
                                 key="bwlimit")
        plain = not always and all(f.size <= PLAIN_BELOW for f in files)
        # 0 would be no limit to older ones.  What has grown beyond all that was claimed is left
        # out: it is another version.
        return pull(connection, (f.path for f in files),
                    vault.path + b"/" + vault.incoming(standing.name),
                    limit, always, on_bytes, most=max(1, *(f.size for f in files)), plain=plain,
                    trusted=True)


class Session:
    """What a pass over one backup knows and says: its servers, how their sources stand, its last
    words.

    `links`: host -> Link (or anything with `call` and `again`), for all hosts with sources but our
    own.  `own`: a link to our own host's server when it has sources: their files are not for us,
    but what they lack is a reason for relief.
    """

    def __init__(self, vault: Vault, config: Config, host: str, links: "Dict[str, Any]",
                 figures: Figures,
                 progress: "Optional[Progress]" = None, mover: "Optional[Any]" = None,
                 adopt: bool = False,
                 own: "Optional[Any]" = None) -> None:
        self.vault, self.config, self.host, self.links, self.own = vault, config, host, links, own
        self.figures, self.progress, self.adopt = figures, progress or Progress(quiet=True), adopt
        self.mover = mover or Rsync(config)
        self.standings: "Dict[str, Standing]" = {}
        self.pipeline = Pipeline()
        self.check_links = {name: link.again() for name, link in links.items()}
        self.name = vault.name
        self.stuck = self.misplaced = False
        self.clock_wrong = False  # it differs from the servers' by more than CLOCK_SLACK
        # confirmed when their server has read its own file
        self.waiting: "set[Tuple[str, bytes]]" = set()
        self.own_standings: "List[Standing]" = []
        self._moved = 0
        self._early = 0, 0
        # what `demand` found, while it holds
        self._asked: "Optional[List[Tuple[Standing, Dict[str, Any]]]]" = None
        self._told: "Dict[str, Dict[str, Any]]" = {}  # host -> our last words
        self._actions = figures.actions

    def guarded(self, standing: Standing, step: "Callable[[Standing], Any]") -> Any:
        """Do a step for a source; a source whose host fails or refuses is out for the rest of the
        pass."""
        if not standing.usable:
            return None
        try:
            return step(standing)
        except Unreachable as error:
            self.figures.gone(error)
            for other in self.standings.values():
                if other.host == standing.host:
                    other.out = True
        except Refused as error:
            standing.out = True
            self.figures.complain("%s: %s" % (self.name, error))
        except ProtocolError as error:
            standing.out = True
            self.figures.gone(Unreachable(standing.host, "talks nonsense: %s" % error))
        return None

    def usable(self) -> "List[Standing]":
        return [standing for standing in self.standings.values() if standing.usable]

    def _standing(self, standing: Standing) -> "Dict[str, Any]":
        return self.links[standing.host].call("standing", backup=self.name, source=standing.name)

    # -- words to the servers --

    def offered(self) -> int:
        """The room that we offer: none in a backup that is leaving, or on a disk that cannot be
        written to."""
        free = self.vault.free()
        return min(0, free) if self.stuck or self.vault.spec.leaving else free

    def tell(self, want: "Optional[int]" = None) -> None:
        vault = self.vault
        words: "Dict[str, Any]" = dict(capacity=vault.capacity(), free=self.offered(),
                                       used=vault.used(), files=vault.files())
        if want is not None:
            words["want"] = want
        for host in sorted({standing.host for standing in self.standings.values()
                            if not standing.out}):
            if dict(self._told.get(host, {}), **words) == self._told.get(host):
                continue
            with contextlib.suppress(Unreachable, Refused):
                self.links[host].call("told", backup=self.name, **words)
                self._told[host] = words

    @contextlib.contextmanager
    def renewing(self) -> "Iterator[None]":
        """Renew our claims meanwhile, from a thread of its own: copying or digesting a large file
        outlasts a lease, and a claim that ran out is copied twice."""
        over = threading.Event()
        links = {name: link.again() for name, link in self.links.items()}

        def work() -> None:
            due = clock.steady() + RENEW_EVERY
            while not over.wait(clock.nap(max(0.0, due - clock.steady()))):
                if clock.steady() < due:
                    continue
                due = clock.steady() + RENEW_EVERY
                try:
                    self.renew(links)
                except Exception as error:  # whatever it is, the next word may get through
                    log.warning("%s: the servers were not told that files are on their way: %s",
                                self.name, reason_of(error))
            for link in links.values():
                link.close()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(1)

    def renew(self, links: "Dict[str, Any]") -> None:
        """A word to each server whose files are on their way here, or are read once more after a
        crash; with the names of those of which we have an older version: no claim says that we are
        at it."""
        coming: "Dict[str, List[Tuple[str, bytes]]]" = {}
        for source, path, updating in self.vault.rows(
                "SELECT source, path, "
                "EXISTS(SELECT 1 FROM held h WHERE h.source=c.source AND h.path=c.path) "
                "FROM coming c"):
            if source in self.config.sources:
                coming.setdefault(self.config.sources[source].host,
                                  []).extend([(source, path)] if updating else [])
        free = self.vault.free()
        out = {standing.host for standing in list(self.standings.values()) if standing.out}
        for host in sorted(set(coming) & set(links) - out):
            with contextlib.suppress(Unreachable, Refused):
                words = {"rows": [[s, as_text(p)] for s,
                                  p in first_page(coming[host])]} if links[host].peer_level() > 1 \
                    else {}
                links[host].call("told", backup=self.name, free=free, **words)

    def give_back(self, standing: Standing, link: Any, files: "List[Wanted]") -> None:
        """Release claims of files that may be claimed again at once, by us too; parts of them
        stay."""
        self.vault.give_up(standing.name, [f.path for f in files], keep_parts=True)
        for page in in_pages(as_text(f.path) for f in files):
            link.call("release", backup=self.name, source=standing.name, paths=page, all=False)

    def give_all_back(self) -> None:
        """After an error that ends the pass: what is claimed and has not arrived is for others to
        take."""
        with contextlib.suppress(Exception):
            self.pipeline.drain()
        for standing in self.usable():
            # whatever is wrong with the server or the database: the lease ends too
            with contextlib.suppress(Exception):
                paths = [as_text(path) for (path,) in self.vault.rows(
                    "SELECT path FROM coming WHERE source=? AND stage=0", standing.name)]
                for page in in_pages(paths):
                    self.links[standing.host].call("release", backup=self.name,
                                                   source=standing.name, paths=page, all=False)

    def decline(self, standing: Standing, link: Any, rows: "List[Tuple[Wanted, str]]",
                failed: bool = True) -> None:
        """Leave files to others for a while, and forget what came of them."""
        for page in in_pages([as_text(f.path), f.version, why] for f, why in rows):
            link.call("decline", backup=self.name, source=standing.name, rows=page)
        self.vault.give_up(standing.name, [f.path for f, _ in rows])
        if failed:
            self.figures.add(failed_files=len(rows))
            for f, why in rows:
                self.figures.complain("%s: %s: %s: %s"
                                      % (self.name, standing.name, shown(f.path), why))

    # -- old versions --

    def keep_what_is_held(self) -> None:
        """Old versions of held sources stay.  A source whose host cannot be asked is what it was
        when it last could: a machine that dies with the disk that its source was on is not to cost
        the old versions."""
        told = {standing.name: standing.facts["state"] != "ok"
                for standing in self.standings.values()}
        before = set(json.loads(self.vault.meta("held") or "[]"))
        held = {name for name in self.config.sources if told.get(name, name in before)}
        if held != before:
            self.vault.set_meta("held", json.dumps(sorted(held)))
        self.vault.keep_old(held, self.clock_wrong)

    def make_room(self, need: int) -> None:
        """Let old versions go where copies of current files need their room; the user wanted to
        keep them, and is told."""
        files, size = self.vault.make_room(need, self.config.keep)
        self._early = self._early[0] + files, self._early[1] + size


class Copier(Session):
    """The way of files from the claim to where they count: fetched, digested, confirmed, put in
    place, counted."""

    @staticmethod
    def _next_part(files: "List[Wanted]", most: int = BATCH_BYTES) -> "List[Wanted]":
        """As many as are fetched, or with `most` bytes asked about, at once."""
        size = text = 0
        for count, f in enumerate(files):
            size, text = size + f.size, text + len(f.path)
            if count and (size > most or count >= BATCH_FILES or text > PAGE_TEXT):
                return files[:count]
        return list(files)

    def confirm_again(self, standing: Standing, files: "List[Wanted]") -> "List[Wanted]":
        """Have the server confirm copies that we hold already (it lost its books, or its file
        changed).  Returns those that are not copies of the present version and must be fetched;
        those about which the server cannot say yet stay what they are, and are asked about again by
        the next pass."""
        vault, link = self.vault, self.links[standing.host]
        wrong: "List[Wanted]" = []
        while files:
            batch, part, rows = self._next_part(files, 1 << 62), [], []
            files = files[len(batch):]
            for f in batch:
                held, row = vault.held(standing.name, f.path), None
                try:
                    row, _ = self._evidence(vault.place_of(standing.name, f.path), f,
                                            held[2]) if held else (None, None)
                except OSError as error:
                    log.info("%s: %s: %s", self.name, shown(f.path), reason_of(error))
                if row is None:
                    wrong.append(f)
                else:
                    part.append(f)
                    rows.append(row)
            if not rows:
                continue
            verdicts = link.call("confirm", backup=self.name, source=standing.name,
                                 rows=rows)["verdicts"]
            good = []
            for f, verdict, row in zip(part, verdicts, rows):
                if verdict == "ok":
                    vault.set_metadata(vault.place_of(standing.name, f.path), f.mode, f.uid, f.gid,
                                       f.mtime)
                    digest = bytes.fromhex(row[2])
                    held = vault.held(standing.name, f.path)
                    # mended by hand, or entered with a disk's coarse time
                    if (f.mtime, digest) != held[1:3]:
                        vault.hold(standing.name, f.path, f.size, f.mtime, digest, clock.now())
                    good.append([as_text(f.path), f.version,
                                 tag_of(f.path, f.size, f.mtime, digest)])
                elif verdict in ("bad", "rotten"):
                    wrong.append(f)
            link.call("placed", backup=self.name, source=standing.name, rows=good)
            self.figures.acted()
        return wrong

    def _evidence(self, rel: bytes, f: Wanted, digest: "Optional[bytes]" = None,
                  ) -> "Tuple[Optional[List[Any]], Optional[os.stat_result]]":
        """What the server wants to see of a file of ours: [path, version, digest, offsets, samples'
        digest], and its stat; the digest is read from the file unless given.  None when it is no
        regular file of that size.  Raises OSError when it is one and cannot be read."""
        try:
            descriptor, info = self.vault.tree.open_file(rel)
        except OSError:
            return None, None
        try:
            if info.st_size != f.size:
                return None, None
            offsets = choose_samples(f.size)
            if digest is None or not offsets:
                digest = digest_descriptor(descriptor, size=f.size)[0]
            return [as_text(f.path), f.version, digest.hex(), offsets,
                    digest_samples(descriptor, offsets).hex() if offsets else ""], info
        finally:
            os.close(descriptor)

    # -- copying --

    def fetch(self, standing: Standing, files: "List[Wanted]", updating: bool = False) -> None:
        """Copy a batch, and have it checked while the next one is copied."""
        vault = self.vault
        if vault.folds:
            files, later = self._that_can_stand_here(standing, files)
            # when the first of two names is in place, the file system says whether the other is the
            # same to it
            if later:
                for part in (files, later):
                    self.fetch(standing, part, updating)
                    self.pipeline.drain()
                return
        # no old version goes for what does not fit even so
        files = self._that_fit(standing, files, updating, vault.free())
        need = sum(f.size for f in files)
        self.make_room(need)
        files = self._that_fit(standing, files, updating, vault.capacity() - vault.used())
        if not files:
            return
        vault.expect(standing.name, standing.books, files)
        test_point("claimed")
        if updating:
            for f in files:
                vault.prepare_basis(standing.name, f.path)
        # What an earlier pass has left here may have the right size and time and be other bytes.
        always = updating or any(stats_of(
            vault.tree, (vault.incoming(standing.name, f.path) for f in files)))
        outcome = self._transfer(standing, files, need, always)
        test_point("copied")
        self.figures.add(wire_bytes=outcome.wire)
        # rather than to wait for the batch before it
        looked = self._look_at_batch(standing, files, outcome) if self.pipeline.busy() else None
        self.pipeline.submit(lambda: self.guarded(
            standing, lambda s: self.check(s, files, outcome, updating, looked)))

    _total = 0

    def _transfer(self, standing: Standing, files: "List[Wanted]", need: int,
                  always: bool) -> Pull:
        """Have `need` bytes of files brought, and not much more."""
        vault, link = self.vault, self.links[standing.host]
        total, begun = need + self._moved, self._moved
        most = 2 * need + EXCESS_PER_FILE * len(files) + EXCESS_BYTES

        def on_bytes(count: int) -> None:
            self._moved += count
            if self._moved - begun > most:
                raise Unreachable(standing.host,
                                  "talks nonsense: it sends much more than the %s of the files "
                                  "that it handed out" % format_size(need))
            self.progress.update("%s: %s" % (self.name, standing.name), self._moved,
                                 max(total, self._total))

        try:
            return self.mover.fetch(link, standing, vault, files, always, on_bytes)
        except (Refused, Unreachable) as error:
            vault.give_up(standing.name, [f.path for f in files],
                          keep_parts=isinstance(error, Refused))
            raise
        except OwnFailure:
            self.give_back(standing, link, files)
            raise

    def _that_can_stand_here(self, standing: Standing,
                             files: "List[Wanted]") -> "Tuple[List[Wanted], List[Wanted]]":
        """On a file system that folds names: those files whose names are not taken, and those of
        which only the arrival of the others will tell.  The rest is left to other backups."""
        vault, now, later, taken = self.vault, [], [], []
        keys = {fold_key(path): path
                for (path,) in vault.rows("SELECT path FROM coming WHERE source=?", standing.name)}
        if any(keys.get(fold_key(f.path), f.path) != f.path for f in files):
            self.pipeline.drain()
            keys = {}
        for f in files:
            other = None if vault.held(standing.name, f.path) \
                else vault.anothers(vault.place_of(standing.name, f.path))
            if other is not None:
                taken.append((f, "%s, and %s takes both for one name" % (
                    difference(other, f.path), vault.spec.path)))
            elif keys.setdefault(fold_key(f.path), f.path) != f.path:
                later.append(f)
            else:
                now.append(f)
        if taken:
            self.decline(standing, self.links[standing.host], taken)
        return now, later

    def _that_fit(self, standing: Standing, files: "List[Wanted]", updating: bool,
                  room: int) -> "List[Wanted]":
        """The files for which there is `room`.  The others are given back: the room went while they
        were claimed, and what is claimed next would not fit either.  Where there is an older
        version here, others are asked to take the new one."""
        if sum(f.size for f in files) <= room:
            return files
        vault, link = self.vault, self.links[standing.host]
        expected = dict(vault.rows("SELECT path, size FROM coming WHERE source=?", standing.name))
        kept, refused = [], []
        for f in files:
            need = f.size - expected.get(f.path, 0)
            if need > max(0, room):
                refused.append(f)
            else:
                room -= need
                kept.append(f)
        if refused and updating:
            self.decline(standing, link, [(f, "no room") for f in refused], failed=False)
        elif refused:
            self.stuck = True
            self.give_back(standing, link, refused)
        return kept

    # -- checking --

    def _look_at_batch(self, standing: Standing, files: "List[Wanted]",
                       outcome: Pull) -> "Tuple[Any, ...]":
        """What came of a batch: evidence, (file, stat) that it is of, the files that are not here,
        and (file, why) of those that are and cannot be read."""
        rows: "List[List[Any]]" = []
        arrived, missed, refused = [], [], []
        for f in files:
            try:
                row, info = self._evidence(self.vault.incoming(standing.name, f.path), f)
            except OSError as error:
                refused.append((f, "cannot be read back from %s: %s"
                                % (self.vault.spec.path, reason_of(error))))
                continue
            if row is not None:
                rows.append(row)
                arrived.append((f, info))
            elif outcome.how == "done" and not outcome.full_disk:
                missed.append(f)
        return rows, arrived, missed, refused

    def check(self, standing: Standing, files: "List[Wanted]", outcome: Pull, updating: bool,
              looked: "Optional[Tuple[Any, ...]]" = None) -> None:
        """Digest what arrived, unless it was `looked` at, have it confirmed, put it into place,
        have it counted."""
        vault, link = self.vault, self.check_links[standing.host]
        rows, arrived, missed, refused = looked or self._look_at_batch(standing, files, outcome)
        blamed = [f for f in missed if outcome.blames(f.path)] or missed
        refused += [(f, self._why_missing(standing, f, outcome)) for f in blamed]
        test_point("digested")
        good = []
        if rows:
            verdicts = link.call("confirm", backup=self.name, source=standing.name,
                                 rows=rows)["verdicts"]
            for (f, info), verdict, row in zip(arrived, verdicts, rows):
                if verdict == "ok":
                    good.append((f, bytes.fromhex(row[2]), info))
                elif verdict == "unproven":
                    self.waiting.add((standing.name, f.path))
                    self.figures.acted()
                else:
                    refused.append((f, self.VERDICTS.get(verdict, verdict)))
        self._place(standing, link, good, refused, updating)
        changed = [(f, why) for f, why in refused if why == "changed"]
        failed = [(f, why) for f, why in refused if why != "changed"]
        if changed:
            self.decline(standing, link, changed, failed=False)
            self.figures.acted()
        if failed:
            self.decline(standing, link, failed)
        if len(blamed) < len(missed):  # not its fault: to be claimed again
            self.give_back(standing, link, [f for f in missed if f not in blamed])
        if outcome.full_disk:
            self.stuck = True
            self.figures.complain("%s: %s is full or cannot be written: %s" % (
                self.name, self.vault.spec.path, outcome.full_disk[:160]))
        elif outcome.how == "own":
            here = {f.path for f, _ in arrived}
            self.give_back(standing, link, [f for f in files if f.path not in here])
            raise outcome.own_failure()
        elif outcome.how != "done":
            raise Unreachable(standing.host,
                              "the transfer broke off: %s" % outcome.last_words[:160])

    VERDICTS = {"bad": "it did not arrive whole", "unreadable": "its host cannot read it",
                "rotten": "at its source the content changed while size and times did not: it may "
                          "have rotted there"}

    def _why_missing(self, standing: Standing, f: Wanted, outcome: Pull) -> str:
        """Why a file of the batch is not there as expected: "changed" when the source has another
        version by now."""
        why = outcome.why(f.path)
        if outcome.not_made(f.path):
            return "its name cannot be in %s: %s" % (self.vault.spec.path,
                                                     why) if "No such" in why else why
        info = self.vault.tree.lstat(self.vault.incoming(standing.name, f.path))
        # else it is the part that got there
        if info is not None and outcome.said_of(os.path.basename(f.path)) is None:
            return "changed"
        another = any(word in why
                      for word in ("vanished", "No such file", "non-regular", " directory",
                                   "symbolic links"))
        return "changed" if another or not outcome.errors else why

    def _place(self, standing: Standing, link: Any,
               good: "List[Tuple[Wanted, bytes, os.stat_result]]",
               refused: "List[Tuple[Wanted, str]]", updating: bool) -> None:
        """Put (file, digest, stat) that were confirmed into their places and have them counted; to
        `refused` goes what cannot be there."""
        vault, source = self.vault, standing.name
        bare = vault.plan_places(source, [(f.path, digest) for f, digest, _ in good])
        test_point("confirmed")
        placed, digests, old = [], [], dict(vault.under_way(source))
        for f, digest, info in good:
            try:
                vault.put_in_place(source, f.path, (f.mode, f.uid, f.gid, f.mtime, old.get(f.path)),
                                   f.path in bare, info)
                placed.append(f)
                digests.append(digest)
            except OSError as error:
                if error.errno in DISK_ERRORS:
                    raise
                refused.append((f, "cannot be put into %s: %s"
                                % (vault.spec.path, reason_of(error))))
        vault.sync_places(source, [f.path for f in placed])
        test_point("in-place")
        figures = {"updated_files": len(placed)} if updating else {
            "copied_files": len(placed), "copied_bytes": sum(f.size for f in placed)}
        self._count_in(standing, link, [(f.path, f.version, tag_of(f.path, f.size, f.mtime, digest))
                                        for f, digest in zip(placed, digests)], **figures)

    def _count_in(self, standing: Standing, link: Any, rows: "List[Tuple[bytes, int, int]]",
                  **figures: int) -> None:
        """Second step of a confirmation.  What the server does not count after all is ours all the
        same: it is told of it by the next report.  figures: what was done, once it has counted."""
        if rows:
            standing.barren = 0
            for page in in_pages([as_text(path), version, tag] for path, version, tag in rows):
                link.call("placed", backup=self.name, source=standing.name, rows=page)
            self.figures.add(**figures)
            test_point("counted")
            self.vault.arrived(standing.name, [row[0] for row in rows],
                               {path: tag for path, _, tag in rows})


class CatchUp(Copier):
    """What became of the copies here: moves, updates, retirements; and a report when the server
    believes something else."""

    def catch_up(self, standing: Standing) -> None:
        """Moves, updates, retirements; and a full report when the server's sum of our copies is not
        ours."""
        self.finish_placing(standing)
        if standing.facts["todo"] or self.vault.one("SELECT 1 FROM moving WHERE source=?",
                                                    standing.name):
            self.do_todo(standing)
            standing.facts = self._standing(standing)
        if tuple(standing.facts["sum"]) != self.vault.sum_of(standing.name):
            self.report(standing)
            if standing.usable:
                self.do_todo(standing)
        if standing.usable:
            if standing.facts["recovering"]:
                self.links[standing.host].call("caught_up", backup=self.name, source=standing.name)
            if standing.facts["claims"]:
                self.resume(standing)

    def resume(self, standing: Standing) -> None:
        """Go on with what an earlier pass had claimed: parts of large files lie in `incoming`."""
        rows = self.links[standing.host].call("claims", backup=self.name,
                                              source=standing.name)["rows"]
        files = [Wanted.from_row(row) for row in rows]
        while files and standing.usable and not self.stuck:
            part = self._next_part(files)
            del files[:len(part)]
            self.fetch(standing, part)
        self.pipeline.drain()

    def finish_placing(self, standing: Standing) -> None:
        """Files that were confirmed when an earlier pass ended: they lie at their places now, the
        server may count them."""
        vault = self.vault
        rows = vault.rows("SELECT path, version, size, mtime, digest FROM coming "
                          "WHERE source=? AND stage=1 AND books=?",
                          standing.name, standing.books)
        for page in in_pages(rows):
            vault.sync_places(standing.name, [row[0] for row in page])
            self._count_in(standing, self.links[standing.host],
                           [(row[0], row[1], tag_of(row[0], *row[2:])) for row in page])
        others = [row[0] for row in vault.rows("SELECT path FROM coming WHERE source=? AND stage=1",
                                               standing.name)]
        vault.sync_places(standing.name, others)
        with vault.write() as db:  # confirmed by books that are no more: held, and reported below
            vault.arrived(standing.name, others)
            db.execute("DELETE FROM coming WHERE source=? AND books<>?",
                       (standing.name, standing.books))

    def _pages(self, standing: Standing, kind: int) -> "Iterator[List[List[Any]]]":
        """Rows [cursor, path here, tag, the file or null], and for moves also the digest that the
        copy has to have.  Not much more of them than we hold: what the server believes beyond that,
        the report corrects."""
        after, rounds = 0, Rounds(standing.host, "things to do")
        most = 2 * self.vault.sum_of(standing.name)[0] + 50 * PAGE
        while True:
            answer = self.links[standing.host].call(
                "todo", backup=self.name, source=standing.name, kind=kind, after=after)
            rows = answer["rows"]
            if kind == TODO_MOVE:
                rows = [row + [digest]
                        for row, digest in zip(rows, answer.get("digests") or [None] * len(rows))]
            if rows:
                rounds.page(len(rows), rows[-1][0])
                if any(row[0] <= before
                       for row, before in zip(rows, [after] + [row[0] for row in rows])):
                    raise ProtocolError("a list that goes round in circles")
                if kind != TODO_RETIRE and any(row[3] is None for row in rows):
                    raise ProtocolError("a file without its figures")
                yield rows
            if not answer.get("more", len(rows) == PAGE) or not rows or rounds.rows > most:
                return
            after = rows[-1][0]

    def do_todo(self, standing: Standing) -> None:
        """Moved files are lifted before retired ones are set aside, and put down after it: a rename
        may lead to where a file, or a directory of files, still lies that is gone at the source."""
        settled, unknown = self.lift(standing)
        self.retire(standing)
        self.settle(standing, settled, unknown)
        self.touch(standing)
        self.update(standing)

    def _done(self, standing: Standing, kind: int, rows: "List[List[Any]]") -> None:
        for page in in_pages(rows):
            self.links[standing.host].call("done", backup=self.name, source=standing.name,
                                           kind=kind, rows=page)

    def lift(self, standing: Standing) -> "Tuple[List[List[Any]], List[str]]":
        """All renames at once, so that swaps of whole directories work.  Returns ([cursor, tag] of
        those that are done already, paths of which we have nothing).  Only a copy of just the
        content that the server names is moved: what is not is reported again, and compared."""
        vault, settled, unknown = self.vault, [], []
        for page in self._pages(standing, TODO_MOVE):
            plan = []
            for cursor, old_text, tag, row, digest in page:
                old, new = check_relative(as_raw(old_text)), Wanted.from_row(row).path
                have, there = vault.held(standing.name, old), vault.held(standing.name, new)
                if vault.one("SELECT 1 FROM moving WHERE source=? AND old=? AND new=?",
                             standing.name, old, new):
                    vault.write_cursor(standing.name, old, new, cursor)
                elif have and have[3] == tag and digest in (None, have[2].hex()):
                    # else another file of a swap that is done already lies there
                    plan.append((cursor, old, new))
                elif there and digest == there[2].hex():
                    settled.append([cursor, there[3]])
                else:
                    unknown.append(as_text(old))
            vault.plan_moves(standing.name, plan)
        vault.lift_moves(standing.name)
        return settled, unknown

    def settle(self, standing: Standing, settled: "List[List[Any]]", unknown: "List[str]") -> None:
        done, failed = self.vault.settle_moves(standing.name, last=True)
        unknown = unknown + [as_text(path) for path in failed]
        for page in in_pages(unknown):  # first: what is done may be called now as these were
            self.links[standing.host].call("forget", backup=self.name, source=standing.name,
                                           paths=page)
        self._done(standing, TODO_MOVE, settled + [[cursor, tag] for cursor, tag in done])
        self.figures.add(moved_files=len(done))

    def touch(self, standing: Standing) -> None:
        """New modes and owners; the contents are the same."""
        for page in self._pages(standing, TODO_TOUCH):
            for _, _, _, row in page:
                f = Wanted.from_row(row)
                have = self.vault.held(standing.name, f.path)
                # else it is an older version, and is updated
                if have and have[:2] == (f.size, f.mtime):
                    with contextlib.suppress(OSError):
                        self.vault.set_metadata(self.vault.place_of(standing.name, f.path), f.mode,
                                                f.uid, f.gid, f.mtime)
            self._done(standing, TODO_TOUCH, [[row[0], None] for row in page])
            self.figures.acted()

    def retire(self, standing: Standing) -> None:
        """Files deleted at the source go to the attic."""
        vault = self.vault
        for page in self._pages(standing, TODO_RETIRE):
            paths = []
            for _, text, tag, _ in page:
                path = check_relative(as_raw(text))
                held = vault.held(standing.name, path)
                # Another file may have come to this path meanwhile; its tag is another one.
                if held and tag in (None, held[3]):
                    paths.append(path)
            vault.set_aside(standing.name, list(dict.fromkeys(paths)), "deleted")
            self._done(standing, TODO_RETIRE, [[row[0], None] for row in page])
            self.figures.acted()

    def report(self, standing: Standing) -> None:
        """Tell the server everything that we hold of a source."""
        link, vault, after = self.links[standing.host], self.vault, b""
        self.figures.acted()
        serial = link.call("report_start", backup=self.name, source=standing.name)["serial"]
        while True:
            page = vault.held_page(standing.name, after)
            for part in in_pages([as_text(path), size, mtime, tag]
                                 for path, size, mtime, _, tag in page):
                link.call("report", backup=self.name, source=standing.name, serial=serial,
                          rows=part)
            if len(page) < PAGE:
                break
            after = page[-1][0]
        standing.facts = link.call("report_end", backup=self.name, source=standing.name,
                                   serial=serial)
        if standing.facts["state"] != "ok":
            self.keep_what_is_held()
            self.figures.complain("%s is held: %s"
                                  % (standing.name, held_advice(standing.name, standing.facts)))

    def update(self, standing: Standing) -> None:
        """Files of which we have an older version: confirmed anew when nothing is different, else
        fetched as a difference.  Where there is no room for both versions, others are asked to take
        the file."""
        for page in self._pages(standing, TODO_UPDATE):
            batch: "List[Wanted]" = []
            same: "List[Wanted]" = []
            for _, _, _, row in page:
                f = Wanted.from_row(row)
                held = self.vault.held(standing.name, f.path)
                (same if held and held[0] == f.size and may_be_time(held[1], f.mtime)
                 else batch).append(f)
            batch = sorted(batch + self.confirm_again(standing, same), key=lambda f: f.path)
            while batch and standing.usable and not self.stuck:
                part = self._next_part(batch)
                del batch[:len(part)]
                self.fetch(standing, part, updating=True)
        self.pipeline.drain()


class Placer(CatchUp):
    """Rules 0 to 5 of placing: over capacity, claim, make room, relieve.  Touches no file."""

    def place(self) -> None:
        """Rules 0 to 5: until nothing applies."""
        if self.vault.spec.leaving:
            self.demand()
            self.figures.short = self.figures_short
        while not self.stuck and not self.vault.spec.leaving:
            if self.drop_surplus() or self.claim_some():
                continue
            if self.pipeline.drain():
                self._asked = None
            if self.claim_some() or self.swap_in() or self.relieve():
                continue
            self.pipeline.drain()
            break
        self.pipeline.drain()

    def demand(self, beyond: bool = False) -> "List[Tuple[Standing, Dict[str, Any]]]":
        """What is missing of each source; those with the highest pressure (missing bytes by room)
        first.  `beyond`: ask also for what there is no room for anywhere.  Not asked again before
        this pass has changed something."""
        if self._asked is not None and not beyond:
            return self._asked
        found: "List[Tuple[Standing, Dict[str, Any]]]" = []
        self.words, self.figures_short = {}, 0
        # Looked at once: the thread that checks the last batch may put a source out meanwhile.
        usable = self.usable()
        for host in sorted({standing.host for standing in usable}):
            one = next(s for s in usable if s.host == host)
            answer = self.guarded(one, lambda s: self.links[s.host].call(
                "demand", backup=self.name, capacity=self.vault.capacity(), free=self.offered(),
                beyond=beyond))
            if answer is None:
                continue
            for name, facts in answer["sources"].items():
                if name in self.standings and self.standings[name].host == host:
                    found.append((self.standings[name], facts))
                    self.figures_short += facts["short"]
            for words in answer["backups"]:
                self._merge(words)
        found.sort(key=lambda item: (-self._pressure(*item), item[0].name))
        self._asked = found
        return found

    def _merge(self, words: "Dict[str, Any]") -> None:
        """Keep the most recent words of each backup; what it could drop adds up over the
        servers."""
        known = self.words.get(words["name"])
        if known is None:
            self.words[words["name"]] = dict(words)
            return
        total = known["droppable"] + words["droppable"]
        if words["age"] is not None and (known["age"] is None or words["age"] < known["age"]):
            known.update(words)
        known["droppable"] = total

    def _pressure(self, standing: Standing, facts: "Dict[str, Any]") -> float:
        room = sum(max(0, w["free"] or 0) for w in self.words.values()
                   if w["host"] not in (standing.host, self.host) and not w["lost"])
        return facts["missing"] / (1.0 + room + max(0, self.vault.free()))

    def claim_some(self) -> bool:
        """Rule 1: claim and fetch a batch of underserved files from the first source that has
        something that fits."""
        demands = self.demand()
        lacking = sum(facts["lacking"] for _, facts in demands)
        self.figures.short = self.figures_short
        free = self.vault.free()
        self._total = max(self._total, self._moved + min(lacking, max(0, free)))
        if free < 0:
            return False
        most = BATCH_BYTES if lacking < free / 2 else min(BATCH_BYTES,
                                                          max(SCARCE_BYTES, free // 100))
        for standing, facts in demands:
            if not facts["lacking_files"]:
                continue
            rows = self.guarded(standing, lambda s: self.links[s.host].call(
                "claim", backup=self.name, source=s.name, free=free, most_files=BATCH_FILES,
                most_bytes=most)["rows"])
            if rows:
                self._fetch_claimed(standing, rows)
                return True
        return False

    def _fetch_claimed(self, standing: Standing, rows: "List[List[Any]]") -> None:
        """Fetch what was claimed; a source that hands out files again and again of which none comes
        is out."""
        self._asked = None
        standing.barren += 1
        if standing.barren > BARREN_LIMIT:
            standing.out = True
            self.figures.gone(Unreachable(
                standing.host, "talks nonsense: it hands out files of %s, and none of them comes"
                % standing.name))
            return
        self.guarded(standing, lambda s: self.fetch(s, [Wanted.from_row(row) for row in rows]))

    def drop_surplus(self) -> bool:
        """Rule 0: over capacity, drop overserved files; the smallest set that is enough, or what
        there is."""
        need = -self.vault.free()
        if need <= 0:
            if self.vault.used() > self.vault.capacity():
                self.make_room(0)
            return False
        self.make_room(0)
        return self.drop(self.choose_drops(need)) > 0

    def choose_drops(self, need: int) -> "List[Tuple[Standing, bytes, int]]":
        """Overserved copies of ours: the smallest set of at least `need` bytes, else all that were
        offered."""
        offers = []
        for standing in self.usable():
            rows = self.guarded(standing, lambda s: self.links[s.host].call(
                "droppable", backup=self.name, source=s.name, need=need)["rows"])
            offers += [(standing, check_relative(as_raw(path)), size) for path, size in rows or []]
        return choose_around(offers, need)

    def drop(self, chosen: "List[Tuple[Standing, bytes, int]]") -> int:
        """Ask for the grants and carry them out.  Returns the bytes freed."""
        freed = 0
        for standing in self.usable():
            paths = [as_text(path) for s, path, _ in chosen if s is standing]
            for page in in_pages(paths):
                granted = self.guarded(standing, lambda s: self.links[s.host].call(
                    "drop", backup=self.name, source=s.name, paths=page)["granted"]) or []
                test_point("granted")
                grants = [Grant(standing.name, check_relative(as_raw(path))) for path in granted
                          if path in paths]
                size = self.vault.drop(grants)
                self._asked = None
                self.figures.add(dropped_files=len(grants), dropped_bytes=size)
                freed += size
        return freed

    def swap_in(self) -> bool:
        """Rule 2: drop overserved copies where that lets an underserved file in; nothing when it
        would not suffice."""
        free = max(0, self.vault.free())
        for standing, facts in self.demand():
            if not facts["lacking"]:
                continue
            found = self.guarded(standing, lambda s: self.links[s.host].call(
                "smallest", backup=self.name, source=s.name, above=free,
                most=self.vault.capacity())["file"])
            if not found:
                continue
            path, size = found
            chosen = self.choose_drops(size - free)
            if sum(each for _, _, each in chosen) < size - free or self.drop(chosen) < size - free:
                continue
            rows = self.guarded(standing, lambda s: self.links[s.host].call(
                "claim_paths", backup=self.name, source=s.name, free=self.vault.free(),
                paths=[path], relieved=None)["rows"])
            if rows:
                self._fetch_claimed(standing, rows)
            return True
        return False

    def relieve(self) -> bool:
        """Rules 3 and 4: tell what we want, and take from one backup that is short of room files
        that it can drop then."""
        free = self.vault.free()
        want = sum(facts["lacking"] for _, facts in self.demand())
        want = max(want, 1) if free < 0 else want
        self.tell(want)
        if free <= 0 or not any(words["name"] != self.name
                                and (words["want"] or (words["free"] or 0) < 0)
                                for words in self.words.values()):
            return False
        demands = self.demand(beyond=True)  # it costs the servers something, and is seldom needed
        me = dict(self.words.get(self.name) or {"droppable": 0}, name=self.name, free=free,
                  want=want)
        missing = sum(facts["beyond"] for _, facts in demands) + self._own_missing()
        over = sum(-w["free"] for w in self.words.values() if (w["free"] or 0) < 0
                   and w["name"] != self.name)
        for other in sorted(self.words.values(), key=self._relief_order):
            if other["name"] == self.name or other["lost"] or other["free"] is None:
                continue
            if want and self._relief_order(other) > self._relief_order(me):
                return False
            wanted = other["want"] or 0
            if other["host"] == self.host:
                wanted = 0
            if not wanted and other["free"] >= 0:
                continue
            gap = min(wanted, missing + over) - other["free"] - other["droppable"]
            if gap <= 0:
                if other["age"] is not None and other["age"] > 3 * (other["period"] or 3600.0):
                    continue
                return False
            if self._take_from(other["name"], min(gap, 1 << 60), free):
                return True
        return False

    def _own_missing(self) -> int:
        """Bytes that our own host's sources lack and nobody has room for."""
        if self.own is None:
            return 0
        try:
            answer = self.own.call("demand", backup=self.name, capacity=self.vault.capacity(),
                                   free=self.offered(), beyond=True)
        except (Unreachable, Refused):
            return 0
        for words in answer["backups"]:
            self._merge(words)
        return sum(facts["beyond"] for name, facts in answer["sources"].items()
                   if name in self.config.sources and self.config.sources[name].host == self.host)

    @staticmethod
    def _relief_order(words: "Dict[str, Any]") -> "Tuple[float, str]":
        return -((words["free"] or 0) + words["droppable"]), words["name"]

    def _take_from(self, other: str, gap: int, free: int) -> bool:
        offers = []
        for standing in self.usable():
            rows = self.guarded(standing, lambda s: self.links[s.host].call(
                "relief", backup=self.name, source=s.name, relieved=other, gap=gap,
                most=free)["rows"])
            offers += [(standing, path, size) for path, size in rows or []]
        above = sorted((o for o in offers if o[2] >= gap), key=lambda o: o[2])[:1]
        chosen, room = [], min(free, gap)
        for offer in above or sorted(offers, key=lambda o: -o[2]):
            if offer[2] <= (free if above else room):
                chosen.append(offer)
                room -= offer[2]
        done = False
        for standing in self.usable():
            paths = first_page(path for s, path, _ in chosen if s is standing)
            rows = paths and self.guarded(standing, lambda s: self.links[s.host].call(
                "claim_paths", backup=self.name, source=s.name, free=free, paths=paths,
                relieved=other)["rows"])
            if rows:
                self._fetch_claimed(standing, rows)
                done = True
        self.pipeline.drain()
        return done


class Keeper(Placer):
    """Catalogs, and the reading of old copies."""

    # -- catalogs --

    def fetch_own_catalogs(self) -> None:
        """The catalogs of our own host's sources: nothing of them lies here, but any backup knows
        what there was."""
        for standing in self.own_standings:
            # our own server is not needed for a pass
            with contextlib.suppress(Unreachable, Refused):
                self.fetch_catalog(standing)

    def fetch_catalog(self, standing: Standing) -> None:
        """Fetch what is new in a source's catalog, keep it, and bring the skeleton in line."""
        vault, name = self.vault, standing.name
        directory = vault.catalog_directory(name)
        # no copies are news
        still = standing.host == self.host or self.figures.actions == self._actions
        gen = standing.facts["gen"] if still else self._standing(standing)["gen"]
        try:
            self._set_ahead_aside(standing, directory, gen)
            link = self.own if standing.host == self.host else self.links[standing.host]
            level, kept = min(LEVEL, link.peer_level()), vault.meta("catalog-level:" + name) or 1
            # What a level has more is missing in rows that came before this cbackup understood it.
            since = self._catalog_kept(standing, directory) if kept >= level else 0
            header = {"catalog": 1, "source": name, "books": standing.books, "since": since,
                      "upto": since, "time": 0}
            written = since != gen and write_catalog(directory, header,
                                                     self._catalog_news(standing, header))
            if written:
                vault.set_meta("catalog:" + name, standing.books)
            if kept != level:
                vault.set_meta("catalog-level:" + name, level)
            if standing.host != self.host:
                self._apply_skeleton(name, directory)
                if written:  # a disk that is put back as it was before this is known by it
                    link.call("told", backup=self.name, lists={name: header["upto"]})
        except DamagedCatalog as error:
            log.warning("%s: %s; the next pass fetches all of it", self.name, error)
            vault.set_meta("catalog:" + name, None)

    def _set_ahead_aside(self, standing: Standing, directory: str, gen: int) -> None:
        """The source's own server knows best how far its catalog is (at the begin of a pass it
        heard of what we have): what is ahead of it would hide all that comes."""
        for found in catalogs_in(directory):
            if found.upto > gen:
                log.warning("%s: the catalog %s of %s is ahead of what its server says (%d): set "
                            "aside", self.name, found.name,
                            standing.name, gen)
                os.rename(os.path.join(directory, found.name),
                          os.path.join(directory, found.name + ".ahead"))
                self.vault.set_meta("skeleton:" + standing.name, 0)

    def _catalog_kept(self, standing: Standing, directory: str) -> int:
        """The generation from which on news are to be fetched; 0: everything, because too much has
        changed since the last whole catalog, or it is of other books."""
        if self.vault.meta("catalog:" + standing.name) != standing.books:
            return 0
        chain = catalog_chain(catalogs_in(directory))
        sizes = [os.path.getsize(os.path.join(directory, f.name)) for f in chain]
        if not chain or sum(sizes[1:]) > max(sizes[0], 1 << 20):
            return 0
        if len(chain) > CATALOG_FILES:
            self.vault.merge_catalogs(standing.name, standing.books, chain)
        return chain[-1].upto

    def _apply_skeleton(self, name: str, directory: str) -> None:
        done = self.vault.meta("skeleton:" + name) or 0
        chain = [f for f in catalog_chain(catalogs_in(directory)) if f.upto > done]
        failed: "Dict[str, List[bytes]]" = {}
        for found in chain:
            rows = read_catalog(os.path.join(directory, found.name), no_file)
            for path, error in self.vault.apply_skeleton(name, rows):
                failed.setdefault(reason_of(error), []).append(path)
        for reason, paths in failed.items():
            self.figures.remark(
                "%s: %s: %s cannot be in %s (%s): %s%s; a restore brings them all the same" % (
                    self.name, name, count_of(len(paths), "directory or symlink" if len(paths) == 1
                                              else "directories or symlink"), self.vault.spec.path,
                    reason, ", ".join(map(shown, paths[:3])), ", ..." if len(paths) > 3 else ""))
        if chain:
            self.vault.set_meta("skeleton:" + name, chain[-1].upto)

    def _catalog_news(self, standing: Standing, header: "Dict[str, Any]") -> "Iterator[List[Any]]":
        """Rows, checked, of everything since header["since"], in rounds until the server has
        nothing newer."""
        link, since = self.own if standing.host == self.host else self.links[standing.host], \
            header["since"]
        rows = 0
        for _ in range(ROUNDS_LIMIT):
            cursor, after, upto, rounds = [0, 0], "", 0, Rounds(standing.host,
                                                                "news of the catalog")
            rounds.rows = rows
            while cursor[0] != -2:
                page = link.call("catalog", source=standing.name, since=since, upto=upto,
                                 cursor=cursor, after=after)
                if upto and page["upto"] != upto:
                    raise ProtocolError("a catalog that changes while it is read")
                upto = page["upto"]
                if upto <= since:
                    return
                well = CatalogRow.are_well(page["rows"])
                parse = CatalogRow.of_checked if well else CatalogRow.from_json
                for row in page["rows"]:
                    yield row if well and len(row) <= 12 else parse(row, None).to_wire(LEVEL)
                entries, cursor = cursor[0] >= 0, page["cursor"]
                if not entries and page["rows"]:
                    after = page["rows"][-1][0]
                # First the entries by (generation, number), then the paths that are no more, then
                # the end.
                rounds.page(len(page["rows"]), (0, *cursor) if cursor[0] >= 0 else
                            (1, as_raw(after)) if cursor[0] == -1 else (2,))
            header["upto"], header["time"] = upto, page["time"]
            since, rows = upto, rounds.rows

    # -- scrub --

    def scrub(self) -> None:
        """Read a few copies again: each once in the scrub period, the oldest reading first.

        What is due grows with the time since the last scrub; an idle pass shortly after another
        writes nothing.
        """
        vault, now = self.vault, clock.now()
        last = vault.meta("scrubbed")
        # the clock was ahead: nothing would be read until it is then
        if last is not None and last > now + CLOCK_SLACK:
            last = None
            with vault.write() as db:
                db.execute("UPDATE held SET checked=? WHERE checked>?", (now, now))
        if last is None:
            vault.set_meta("scrubbed", now)
            vault.set_meta("walked", now)
            return
        if now - (vault.meta("walked") or 0) > self.config.scrub:
            self.look_around()
            vault.set_meta("walked", now)
        total = vault.one("SELECT COALESCE(SUM(bytes), 0) + 4096 * COALESCE(SUM(files), 0) "
                          "FROM sums")[0]
        budget = total * max(0.0, now - last) / max(1.0, self.config.scrub)
        checked = self.verify(budget, now - self.config.scrub / 2,
                              time.monotonic() + SCRUB_PASS_SECONDS)
        if checked:
            vault.set_meta("scrubbed", now)

    def verify(self, budget: float, before: float, deadline: float = float("inf")) -> int:
        """Read copies whose last reading is older than `before`, the oldest first, for at most
        `budget` bytes (a file counts 4 KiB more than its size).  Returns how many were read."""
        vault, count = self.vault, 0
        pace = Pace(self.config.rate(vault.spec, key="read_rate"))
        while time.monotonic() < deadline:
            page = vault.rows("SELECT source, path, size, digest FROM held WHERE checked<? "
                              "ORDER BY checked LIMIT 200", before)
            read, lost = [], {}
            for source, path, size, digest in page:
                if size + 4096 > budget or time.monotonic() > deadline:
                    break
                budget -= size + 4096
                self.progress.say("%s: reading %s" % (self.name, shown(path)))
                verdict = self._read_copy(source, path, digest, pace)
                if verdict:
                    lost.setdefault(source, []).append((path, verdict))
                else:
                    read.append((max(clock.now(), before), source, path))
            with vault.write() as db:
                db.executemany("UPDATE held SET checked=? WHERE source=? AND path=?", read)
            for source, rows in lost.items():
                self.lose(source, rows)
            done = len(read) + sum(map(len, lost.values()))
            count += done
            if len(page) < 200 or done < len(page):  # the last page, or the end of budget or time
                break
        return count

    def look_around(self) -> None:
        """What belongs to checking, besides the copies: files that are not ours, and the
        catalogs."""
        self.find_strangers()
        for name in sorted(self.config.sources):
            directory = os.path.join(self.vault.meta_path, "catalog", name)
            for found in catalogs_in(directory):
                try:
                    for _ in read_catalog(os.path.join(directory, found.name)):
                        pass
                except DamagedCatalog as error:
                    self.figures.complain("%s: %s; deleted, the next pass fetches all of it again"
                                          % (self.name, error))
                    self.vault.set_meta("catalog:" + name, None)
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(directory, found.name))

    def find_strangers(self) -> None:
        """Say which files below our copies are none: put there by hand, or left by something that
        was cut off.  They are left alone.  Looks at every name, so not in every pass."""
        vault, count, some = self.vault, 0, []
        for source in sorted(set(self.config.sources) | set(vault.sources())):
            for rel in vault.tree.walk_files(source.encode()):
                path = rel[len(source) + 1:]
                info = vault.tree.lstat(rel)
                if info is not None and stat.S_ISREG(info.st_mode) and info.st_mode & 0o7000:
                    with contextlib.suppress(OSError):  # from a time when copies had these
                        vault.tree.chmod(rel, stat.S_IMODE(info.st_mode) & 0o777)
                if info is None or stat.S_ISLNK(info.st_mode) or vault.is_known(source, path) \
                        or vault.is_here_as(source, path):
                    continue
                count += 1
                some += [shown(rel)] if count <= 3 else []
        if count:
            self.figures.complain("%s: %s in %s %s not ours, and left alone: %s%s" % (
                self.name, count_of(count, "file"), vault.spec.path, "is" if count == 1 else "are",
                ", ".join(some),
                ", ..." if count > 3 else ""))

    def _read_copy(self, source: str, path: bytes, digest: bytes, pace: Pace) -> str:
        """What is wrong with a copy: "" when it has its digest."""
        try:
            return "" if self.vault.tree.digest(self.vault.place_of(source, path),
                                                pace)[0] == digest else "damaged"
        except OSError as error:
            return "gone" if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP,
                                             errno.EINVAL) else reason_of(error)

    def lose(self, source: str, rows: "List[Tuple[bytes, str]]") -> None:
        """Copies, (path, what is wrong), that are none: set them aside, then tell the server: were
        they still there, the next pass could confirm them by samples again.  A server that cannot
        be told hears of it by the next report."""
        for path, why in rows:
            self.figures.complain("%s: the copy of %s in %s is %s; it will be copied again" % (
                self.name, shown(path), source, why))
        self.figures.acted()
        self.vault.set_aside(source, [path for path, _ in rows], "bad")
        standing = self.standings.get(source)
        if standing and not standing.out:
            with contextlib.suppress(Unreachable, Refused):
                self.links[standing.host].call("forget", backup=self.name, source=source,
                                               paths=[as_text(path) for path, _ in rows])


class Pass(Keeper):
    """One pass over one backup, from its begin to its end; each of the classes above is a part of
    it."""

    def run(self) -> None:
        try:
            with self.renewing():
                self.prepare()
                for standing in list(self.standings.values()):
                    self.guarded(standing, self.catch_up)
                self.place()
            for standing in list(self.standings.values()):
                self.guarded(standing, self.fetch_catalog)
            self.fetch_own_catalogs()
            self.clean_up()
            self.scrub()
            self.tell()
            for link in self.links.values():
                link.done()
        except Exception:
            self.give_all_back()
            raise
        finally:
            if self._early[0]:
                self.figures.remark(
                    "%s: %s (%s) %s deleted before their time: their room was needed" % (
                        self.name, count_of(self._early[0], "old version"),
                        format_size(self._early[1]), "was" if self._early[0] == 1 else "were"))
            for link in list(self.links.values()) + list(
                    self.check_links.values()) + ([self.own] if self.own else []):
                link.close()

    def prepare(self) -> None:
        """Finish what was left half done, have every server look at its sources, learn how they
        stand."""
        vault = self.vault
        vault.recover()
        if vault.needs_rebuild():
            found = vault.rebuild(self.config.sources, lambda path: self.progress.say(
                "%s: reading what lies here: %s" % (self.name, shown(path))))
            if found:
                self.figures.complain("%s: its database was lost; it was made again from %s" % (
                    self.name, count_of(found, "file")))
                self.find_strangers()
            vault.set_meta("complete", 1)
        in_parallel(self._begin, sorted(self.links))
        self.keep_what_is_held()
        if self.misplaced:  # so one server says: nothing is done for the others either
            for standing in self.standings.values():
                standing.out = True
        if self.own is not None:
            with contextlib.suppress(Unreachable, Refused):
                answer = self._introduce(self.own, self.host)
                self.own_standings = [Standing(name, self.host, None, str(answer["books"]), facts)
                                      for name, facts in sorted(answer["sources"].items())
                                      if name in self.config.sources
                                      and self.config.sources[name].host == self.host]

    def _begin(self, host: str) -> None:
        link = self.links[host]
        try:
            self._wait_for_look(link, host)
            answer = self._introduce(link, host)
        except Unreachable as error:
            self.figures.gone(error)
            return
        except Refused as error:
            self.misplaced = self.misplaced or error.reason == "identity"
            self.figures.complain("%s: %s" % (self.name, error))
            return
        for name, facts in sorted(answer["sources"].items()):
            spec = self.config.sources.get(name)
            if spec is None:  # not in our configuration yet, or not any more
                continue
            if spec.host != host:
                self.figures.complain("%s speaks for the source %s, which is %s's by the "
                                      "configuration: not listened to"
                                      % (host, name, spec.host))
                continue
            with self.figures.lock:
                self.standings[name] = Standing(name, host, spec, str(answer["books"]), facts)
            if facts["state"] != "ok":
                self.figures.complain("%s is held: %s" % (name, held_advice(name, facts)))

    def _wait_for_look(self, link: Any, host: str) -> None:
        deadline = time.monotonic() + LOOK_LIMIT
        while link.call("look")["waiting"]:
            self.progress.say("%s: %s is looking at its sources" % (self.name, host))
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)  # its answer takes LOOK_WAIT, unless it is broken

    def _introduce(self, link: Any, host: str) -> "Dict[str, Any]":
        vault = self.vault
        sums = {source.name: [self._newest(source.name)] for source in self.config.sources_of(host)}
        return link.call("begin", backup=self.name, identity=vault.identity, adopt=self.adopt,
                         sums=sums,
                         capacity=vault.capacity(), free=self.offered(), used=vault.used(),
                         files=vault.files())

    def _newest(self, source: str) -> int:
        files = catalogs_in(self.vault.catalog_directory(source))
        return files[0].upto if files else 0

    def clean_up(self) -> None:
        """Give back claims that were not carried out, delete what arrived of them, and versions
        older than `keep`."""
        vault = self.vault
        for standing in self.usable():
            paths = [path for (path,) in vault.rows("SELECT path FROM coming WHERE source=?",
                                                    standing.name)
                     if (standing.name, path) not in self.waiting]
            vault.give_up(standing.name, paths)
            for page in in_pages(paths):
                self.guarded(standing, lambda s: self.links[s.host].call(
                    "release", backup=self.name, source=s.name, all=False,
                    paths=[as_text(path) for path in page]))
        vault.sweep_incoming()
        vault.keep_text("cbackup.conf", self.config.text)
        self.keep_what_is_held()
        vault.expire_attic(self.config.keep)
        if abs(clock.now() - (vault.meta("pruned") or 0)) > PRUNE_EVERY and not self.clock_wrong:
            for name in self.config.sources:
                if not vault.keeps_old(name):
                    prune_catalogs(vault.catalog_directory(name), self.config.keep)
            vault.set_meta("pruned", clock.now())


def choose_around(offers: "List[Tuple[Any, bytes, int]]",
                  need: int) -> "List[Tuple[Any, bytes, int]]":
    """Of (…, path, size): the smallest single one of at least `need` bytes, or several smaller ones
    that are together less; all of the smaller ones when even they do not suffice."""
    above = sorted((o for o in offers if o[2] >= need), key=lambda o: o[2])[:1]
    several, total = [], 0
    for offer in sorted((o for o in offers if o[2] < need), key=lambda o: -o[2]):
        if total >= need:
            break
        several.append(offer)
        total += offer[2]
    for offer in list(several)[::-1]:
        if total - offer[2] >= need:
            several.remove(offer)
            total -= offer[2]
    if above and (total < need or above[0][2] <= total):
        return above
    return several


class Client:
    """Runs passes over all backups of this host: side by side where they are on different disks."""

    def __init__(self, home: Home, config: Config, host: str, progress: Progress,
                 adopt: "Optional[str]" = None) -> None:
        self.home, self.config, self.host, self.progress = home, config, host, progress
        self.adopt, self.foreign = adopt, False  # `foreign`: also from another cluster, see Vault
        self.dialer = Dialer(home, impatient=True)
        self.cluster = home.cluster_id()
        # how far ours is ahead of that of each host's server, seconds
        self.clocks: "Dict[str, float]" = {}
        self.clock_wrong = False

    def open_vault(self, spec: Backup) -> Vault:
        """The backup's directory, when it is the one that was used before (state/backups.json
        remembers)."""
        if self.home.outside(spec.path):
            raise Misplaced("%s: %s" % (spec.name, self.home.outside(spec.path)))
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a home on a full disk is good enough for a pass
                stack.enter_context(self.home.lock("backups.lock"))
            known = read_json(os.path.join(self.home.state_path, "backups.json"))
            return Vault(spec, self.cluster, known.get(spec.name), self.adopt == spec.name,
                         self.foreign)

    def remember(self, vault: Vault, figures: Figures) -> None:
        """Its directory is the one that the servers know, or they know of none."""
        path = os.path.join(self.home.state_path, "backups.json")
        if read_json(path).get(vault.name) == vault.identity:
            return
        try:
            with self.home.lock("backups.lock"):
                atomic_write(path, json.dumps(dict(read_json(path),
                                                   **{vault.name: vault.identity})).encode())
        except OSError as error:
            figures.complain("%s: %s" % (path, reason_of(error)))

    def exchange_config(self, figures: "Optional[Figures]" = None) -> None:
        """Take a newer configuration from the servers of all hosts, give them a newer one of ours:
        also those of hosts without sources, which the edit may just have changed.  Again when ours
        became another: what one server knew and the others did not.  Hosts that cannot be reached
        are entered in `figures`."""
        told = figures or Figures()
        for _ in range(2):
            before = self.home.config_state()
            in_parallel(lambda host: self._exchange_with(host, told), self.config.all_hosts(),
                        self.progress)
            if self.home.config_state() == before:
                return
            self.config = self.home.config()

    def _exchange_with(self, host: str, figures: Figures) -> None:
        link = Link(host, self.config, self.dialer)
        try:
            link.greet()
            # the same home; what matters is that restore can ask it for what lies here
            if host == self.host:
                return
            theirs_now = link.hello.get("time")
            if isinstance(theirs_now, (int, float)):
                self.clocks[host] = clock.now() - theirs_now
            theirs, ours = link.hello.get("config"), self.home.config_state()
            if not isinstance(theirs,
                              list) or len(theirs) != 3 or ours \
                    and tuple(theirs) == config_order(ours):
                return
            # Not taken: an edit that the server had not noticed yet, and that is newer.
            if not ours or tuple(theirs) > config_order(ours) \
                    or link.call("new_config",
                                 config=self.home.config_offer()).get("taken") is False:
                self.home.take_config(check_offer(link.call("config").get("config")))
        except Unreachable as error:  # of hosts that are needed the pass itself says so
            figures.silent(error)
        except (Refused, ProtocolError, ConfigError, TypeError) as error:
            log.warning("%s: the configurations could not be compared: %s", host,
                        str(error).replace("\n", "; "))
        finally:
            link.done()

    def run(self) -> Figures:
        """One pass over every backup of this host."""
        figures, begun, since = Figures(), clock.now(), clock.steady()
        with contextlib.suppress(OSError):
            self.exchange_config(figures)
        for line in self.home.news_of_lines("client", self.config, self.host):
            figures.remark(line)
        self.clock_wrong = self.compare_clocks(figures)
        disks: "Dict[Any, List[Backup]]" = {}
        for spec in self.config.backups_of(self.host):
            try:
                disk: Any = os.stat(spec.path).st_dev
            except OSError:
                disk = spec.path
            disks.setdefault(disk, []).append(spec)
        in_parallel(lambda specs: [self.run_one(spec, figures) for spec in specs], disks.values())
        self.progress.clear()
        self.home.note_pass(dict(figures.as_json(), time=round(begun),
                                 seconds=round(clock.steady() - since, 1),
                                 wrong=figures.lines[:20]))
        return figures

    def compare_clocks(self, figures: Figures) -> bool:
        """Whether our clock is not to be trusted with what is old: at least half of the servers
        have another time."""
        other = {host: ahead for host, ahead in sorted(self.clocks.items())
                 if abs(ahead) > CLOCK_SLACK}
        wrong = bool(other) and 2 * len(other) >= len(self.clocks)
        for host, ahead in other.items():
            if wrong:
                figures.complain(
                    "this machine's clock is %s %s that of %s: no old version is deleted until "
                    "they agree" % (format_age(abs(ahead)), "ahead of" if ahead > 0 else "behind",
                                    host))
            else:
                figures.complain(
                    "the clock of %s is %s %s this machine's and most others': set it" % (
                        host, format_age(abs(ahead)), "behind" if ahead > 0 else "ahead of"))
        return wrong

    def links(self) -> "Dict[str, Link]":
        hosts = sorted({s.host for s in self.config.sources.values() if s.host != self.host})
        return {name: Link(name, self.config, self.dialer) for name in hosts}

    def own_link(self) -> "Optional[Link]":
        return Link(self.host, self.config,
                    self.dialer) if self.config.sources_of(self.host) else None

    @staticmethod
    def _where(error: Exception, spec: Backup) -> str:
        """The file of which a system's error speaks, and a colon; its backup when it is one
        within."""
        if not isinstance(error, OSError):
            return ""
        name = error.filename if isinstance(error.filename, (str, bytes)) else ""
        return shown(os.path.join(os.fsencode(spec.path), os.fsencode(name)).rstrip(b"/")) + ": "

    def run_one(self, spec: Backup, figures: Figures,
                work: "Optional[Callable[[Pass], None]]" = None,
                again: bool = True) -> None:
        """A pass over one backup, or other `work` that needs one.  With a damaged database a second
        time (`again`): what lies in the directory is entered into a new one."""
        damage: "Optional[sqlite3.Error]" = None
        vault: "Optional[Vault]" = None
        database = os.path.join(spec.path, META_DIR.decode(), "backup.db")
        try:
            vault = self.open_vault(spec)
            with vault.locked():
                one = Pass(vault, self.config, self.host, self.links(), figures, self.progress,
                           adopt=self.adopt == spec.name, own=self.own_link())
                one.clock_wrong = self.clock_wrong
                self.home.void_forgets(self.config)
                for name in filter(_is_name, self.home.to_forget().get(spec.name, [])):
                    vault.forget_source(name)
                    self.home.note_forget(name, [spec.name], forget=False)
                (work or Pass.run)(one)
                if one.standings and not one.misplaced:
                    self.remember(vault, figures)
        except Busy as error:  # nothing that cron would have to mail
            (figures.remark if work or sys.stderr.isatty() else log.info)(str(error))
        except Misplaced as error:
            figures.broke(str(error))
        except UsageError:
            raise
        except sqlite3.Error as error:
            if is_damage(error) and again:
                damage = error
            else:
                figures.broke("%s: %s: its database: %s"
                              % (spec.name, spec.path, database_words(error, database)))
                if vault is not None:
                    vault.empty_incoming()
        except (OSError, CBackupError) as error:
            figures.broke("%s: %s" % (spec.name, self._where(error, spec) + reason_of(error)))
        finally:
            if vault is not None:
                vault.close()
        if damage is not None:
            set_database_aside(database, str(damage))
            self.run_one(spec, figures, work, again=False)


# ==== 14. Restore =================================================================================
#
# Holders (who can be reached, and their catalogs) -> Plan (what is wanted, and who has it)
# -> Target (what is there already) -> Schedule (who fetches what next) -> Target (checked, renamed
# into place, linked).  Restore puts them together, and says what became of it.

PLAN_SCHEMA = """
-- What is to be restored.  state: 0 open | 1 in place | 3 a hard link to another path
--                                | 4 in the way: another file is there | 5 missing
-- asked: not only a directory above what is asked for.
CREATE TABLE want(
    path BLOB PRIMARY KEY, kind TEXT, size INTEGER, mtime INTEGER, mode INTEGER, uid INTEGER,
    gid INTEGER, user TEXT, grp TEXT, link INTEGER, target BLOB, digest BLOB, holders TEXT,
    proven INTEGER DEFAULT 1, xattrs TEXT, readable INTEGER DEFAULT 1, state INTEGER DEFAULT 0,
    asked INTEGER DEFAULT 1, note TEXT) WITHOUT ROWID;
CREATE INDEX want_link ON want(link, path) WHERE link IS NOT NULL;

-- Who has the wanted version, and where: place is empty for the file's own path, else its name in
-- the attic, or with a `/` before it another path, where it was or is called so.  doubt: only the
-- size says that it is this version.
CREATE TABLE have(
    path BLOB, holder INTEGER, place BLOB, doubt INTEGER,
    PRIMARY KEY(path, holder, doubt, place)) WITHOUT ROWID;

-- What the holders have, as it comes in.
CREATE TABLE came(holder INTEGER, path BLOB, place BLOB, size INTEGER, mtime INTEGER, digest BLOB);

-- What else the holders have, which may be a wanted file under another name.
CREATE TABLE other(
    path BLOB, holder INTEGER, place BLOB, size INTEGER, mtime INTEGER, digest BLOB);
CREATE INDEX other_path ON other(path);
CREATE INDEX other_digest ON other(digest);
CREATE INDEX other_size ON other(size, mtime);

-- What nobody is fetching yet.  turn: twice the number of its holders, 1 more for a small file.
CREATE TABLE queue(turn INTEGER, path BLOB, PRIMARY KEY(turn, path)) WITHOUT ROWID;
"""

METADATA = "mode, uid, gid, user, grp, mtime, xattrs"
"""The columns of `want` that say what a path is to look like, in the order of `Metadata`."""

HAS = "EXISTS(SELECT 1 FROM have h WHERE h.path=want.path)"
"""Whether somebody has a wanted file."""

SAME_VERSION = """(CASE WHEN c.digest IS NOT NULL AND w.digest IS NOT NULL THEN c.digest=w.digest
    ELSE c.size=w.size AND (c.digest IS NULL OR c.mtime=w.mtime) END)"""
"""Whether what came (c) may be what is wanted (w)."""

TO_QUEUE = """INSERT OR REPLACE INTO queue
    SELECT 2 * COUNT(DISTINCT h.holder) + (w.size<=%d), w.path FROM have h CROSS JOIN want w
    ON w.path=h.path WHERE w.kind='f' AND w.state=0 %%s GROUP BY h.path""" % PLAIN_BELOW

LISTS = {
    "all": ("kind, size, mtime, target, holders", "1"),
    "files": ("size, mtime", "kind='f'"),
    "files and their versions": ("digest, size, mtime", "kind='f'"),
    "files and their states": ("size, state, " + HAS, "kind='f'"),
    "files that somebody has": ("size, link", "kind='f' AND " + HAS),
    "open files": ("size, digest, " + METADATA, "kind='f' AND state=0"),
    "open files of nobody": ("size", "kind='f' AND state=0 AND NOT " + HAS),
    "open files and who has them": (
        "size, (SELECT group_concat(DISTINCT holder) FROM have h WHERE h.path=want.path)",
        "kind='f' AND state=0 AND " + HAS),
    "files of nobody": ("size", "kind='f' AND NOT " + HAS),
    "open links": (
        "(SELECT path FROM want w WHERE w.link=want.link AND w.digest IS want.digest "
        "AND w.kind='f' AND w.state=1 ORDER BY path LIMIT 1), digest, " + METADATA,
        "kind='f' AND link IS NOT NULL AND state IN (0, 3)"),
    "symlinks": ("target, mtime, xattrs, uid, gid, user, grp", "kind='l' AND state<>4"),
    "directories": ("asked", "kind='d' AND path<>x''"),
    "directories to make": ("state", "kind='d' AND asked=1 AND path<>x'' AND state<>4"),
    "directories, the deepest first": (
        "asked, " + METADATA, "kind='d' AND state<>4", "deepest first"),
    "missing or refused": (
        "state, note, holders, readable, (SELECT group_concat(DISTINCT holder) FROM other o "
        "WHERE o.path=want.path)", "state IN (4, 5) AND asked=1"),
    "missing": ("state", "state=5 AND asked=1"),
    "refused": ("state", "state=4 AND asked=1"),
    "unproven": ("state", "kind='f' AND state=1 AND proven=0"),
    "unreadable": ("state", "kind='f' AND readable=0 AND asked=1"),
}
"""What of `want` a plan lists: (columns beside the path, condition)."""

XATTRS_OF_USERS = ("user.", "system.posix_acl_")
"""How the names of extended attributes begin that anybody may set on his files; those that a
restore takes away where the catalog has none."""

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""What link(2) says where a file cannot have another name."""

COPY_NAME = b".cbackup-restore-new"
"""A file that is being copied to where none can be renamed or linked to."""

DONE_SCHEMA = """
CREATE TABLE done(path BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, ino INTEGER, digest BLOB)
    WITHOUT ROWID;
"""

BATCH_SECONDS, FIRST_BATCH = 5.0, 8 << 20
"""A holder gets at most as much at once as it delivers in this time; before its rate is known,
FIRST_BATCH bytes.  And at most half of its share of what is left, so that all end at about the same
time."""

LEAST_SECONDS = 1.0
"""But not less than it delivers in this time: each batch is two processes and a connection."""

FILES_AT_ONCE, FIRST_FILES = 4000, 1000
"""Most files of one batch, and of the first one."""

FEW_FILES = 50000
"""Of so many files that are asked for, and the rest not, what they look like is kept in memory."""

STEAL_AFTER = 2.0
"""Seconds that a holder has for a batch before others look whether they would be faster."""

SILENT_AFTER = 10.0
"""Seconds without a byte, after which a holder's work is for the others, whatever its rate was."""

INHERIT_FROM = 1 << 20
"""A file of so many bytes is looked for in parts that another holder delivered."""

COMPARE_RATE, DIGEST_RATE = 40 << 20, 200 << 20
"""Bytes a second of a file that rsync compares with a part of it, and of the part."""

FAILURES = 3
"""Batches in a row of which nothing came, until a holder is given up."""

if TYPE_CHECKING:
    Holding = Tuple[bytes, bytes, int, int, Optional[bytes]]
    """(path, place, size, mtime, digest) of what a holder has; place: see PLAN_SCHEMA."""


_TIME = re.compile(r"(\d{4})-(\d\d?)-(\d\d?)(?:[ T](\d\d?):(\d\d)(?::(\d\d)(?:\.\d*)?)?)?"
                   r"\s*(Z|[+-][01]\d:?[0-5]\d)?\Z", re.A)


def parse_time(word: str) -> float:
    """Seconds since 1970 of `2026-11-01` (the end of that day), `2026-11-01 14:00` (the end of that
    minute), `2026-11-01 14:00:05`, each also with a zone (`+01:00`, `Z`), `yesterday` (24 hours
    ago), `3d` (3 days ago).  Without a zone it is local time, and in the hour that comes twice the
    second one.  Raises UsageError."""
    import datetime
    now = clock.now()
    if word in ("yesterday", "now", "today"):
        return now - (86400 if word == "yesterday" else 0)
    with contextlib.suppress(ValueError):
        return now - parse_duration(word)
    match = _TIME.match(word)
    with contextlib.suppress(ValueError, OverflowError):
        year, month, day, hour, minute, second, zone = match.groups() if match else ("x",) * 7
        when = datetime.datetime(int(year), int(month), int(day),
                                 int(hour or 23), int(minute or 59), int(second or 59), fold=1)
        plain = (when - datetime.datetime(1970, 1, 1)).total_seconds()
        if zone:
            digits = zone.replace(":", "").replace("Z", "+0000")
            return plain - int(digits[0] + "1") * (int(digits[1:3]) * 3600 + int(digits[3:5]) * 60)
        try:
            return when.timestamp()
        except (ValueError, OverflowError, OSError):  # a year of which this machine knows no zone
            return plain
    raise UsageError("%r is not a time: write 2026-11-01, \"2026-11-01 14:00\", \"2026-11-01 "
                     "14:00:05+01:00\", yesterday, or 3d for three days ago" % word)


def format_time(seconds: float) -> str:
    """Local time with its zone, as `parse_time` reads it."""
    try:
        text = time.strftime("%Y-%m-%d %H:%M:%S%z", time.localtime(seconds // 1))
    except (ValueError, OverflowError, OSError):
        return "%d s after 1970" % seconds
    return text[:-2] + ":" + text[-2:]


class RemoteHolder:
    """A backup on a host whose server is up."""

    def __init__(self, link: Link, backup: str, catalogs: "List[CatalogFile]",
                 limit: "Optional[int]") -> None:
        self.link, self.backup, self.catalogs, self.limit = link, backup, catalogs, limit
        self.name = "%s on %s" % (backup, link.host)
        self.key = backup

    def catalog_paths(self, source: str, files: "List[CatalogFile]", scratch: str) -> "List[str]":
        """Local paths of catalog files, fetched into `scratch`."""
        outcome = self._pull("catalog", source, [f.name.encode() for f in files],
                             os.fsencode(scratch))
        if outcome.how == "own":
            raise outcome.own_failure()
        if outcome.full_disk:
            raise OwnFailure("%s is full: %s" % (scratch, outcome.full_disk[:160]))
        paths = [os.path.join(scratch, f.name) for f in files]
        if outcome.how != "done" and not all(map(os.path.exists, paths)):
            raise Unreachable(self.link.host,
                              "the transfer broke off: %s" % outcome.last_words[:160])
        return paths

    def holdings(self, source: str, old: bool, prefix: bytes = b"") -> "Iterator[Holding]":
        """Copies, or with `old` older versions: of paths that begin with `prefix`, and from
        servers that do not know that field, of all.  (path, place: see PLAN_SCHEMA, size, mtime,
        digest if known)."""
        narrow: "Dict[str, Any]" = {}
        if prefix and self.link.peer_level() > 1:
            narrow["prefix"] = as_text(prefix)
        for rows in self._pages("copies", "", source, narrow) if not old else ():
            for path, size, mtime, digest in rows:
                yield as_raw(path), b"", size, mtime, bytes.fromhex(digest) if digest else None
        for rows in self._pages("old versions", 0, source, dict(narrow, kind=2)) if old else ():
            for _, path, stored, size, mtime, digest in rows:
                yield (as_raw(path), as_raw(stored), size, mtime,
                       bytes.fromhex(digest) if digest else None)

    def _pages(self, what: str, after: Any, source: str, fields: "Dict[str, Any]",
               ) -> "Iterator[List[Any]]":
        """The pages of a listing; the channel has checked their paths."""
        rounds, columns = Rounds(self.link.host, what), 6 if "kind" in fields else 4
        while True:
            answer = self.link.call("holdings", backup=self.backup, source=source, after=after,
                                    **fields)
            rows = answer["rows"]
            if any(len(row) != columns for row in rows):
                raise self.link.nonsense("the answer to holdings has rows of the other kind")
            yield rows
            if not rows or not answer.get("more", len(rows) == PAGE):
                return
            after = rows[-1][0]
            rounds.page(len(rows), as_raw(after) if columns == 4 else after)

    def fetch(self, source: str, names: "List[Tuple[bytes, bytes]]", into: bytes, most: int,
              on_bytes: "Callable[[int], None]", whole: bool = False) -> Pull:
        """Bring (path, place, see PLAN_SCHEMA) to `into`/path; nothing that has grown beyond
        `most` bytes.  whole: without making anything of parts that are there."""
        outcome = Pull()
        current = [path for path, place in names if not place]
        if current:
            outcome = self._pull("backup", source, current, into, most, on_bytes, whole)
        for of, prefix in (("backup", b"/"), ("attic", b"attic/" + source.encode() + b"/")):
            elsewhere = [(path, place[len(prefix):]) for path, place in names
                         if place and place.startswith(prefix)]
            if elsewhere and outcome.went_through:
                beside = into + b".elsewhere"  # not in it: a file may be called so
                outcome.add(self._pull(of, source, [place for _, place in elsewhere], beside, most,
                                       on_bytes, whole))
                with Tree(os.path.dirname(into)) as tree:
                    for path, place in elsewhere:
                        with contextlib.suppress(OSError):
                            tree.rename(os.path.basename(beside) + b"/" + place,
                                        os.path.basename(into) + b"/" + path)
        return outcome

    def _pull(self, of: str, source: str, paths: "List[bytes]", into: bytes,
              most: "Optional[int]" = None,
              on_bytes: "Callable[[int], None]" = lambda count: None, whole: bool = False) -> Pull:
        os.makedirs(into, mode=0o700, exist_ok=True)
        limit, came = CATALOG_BYTES, 0
        if most is not None:
            limit = EXCESS_BYTES + len(paths) * (2 * most + EXCESS_PER_FILE)

        def counted(count: int) -> None:
            nonlocal came
            came += count
            if came > limit:
                raise self.link.nonsense("it sends much more than it was asked for")
            on_bytes(count)

        return pull_apart(paths, lambda path: path, lambda some: pull(
            self.link.again().stream(of=of, name=self.backup, source=source), some, into,
            self.limit, on_bytes=counted, most=most,
            plain=most is not None and most <= PLAIN_BELOW, whole=whole, trusted=True))


class DirectoryHolder:
    """A backup directory that is mounted here: no server needed."""

    def __init__(self, path: str, source: str) -> None:
        meta = os.path.join(path, META_DIR.decode())
        if not os.path.isdir(meta):
            raise UsageError("%s is not a backup's directory: it has no .cbackup" % path)
        self.path, self.name = path, path
        self.key = "directory-" + hashlib.blake2b(
            os.fsencode(os.path.abspath(path)), digest_size=8).hexdigest()
        self.backup = str(read_json(os.path.join(meta, "identity")).get("backup") or path)
        self.catalogs = catalogs_in(os.path.join(meta, "catalog", source))

    def catalog_paths(self, source: str, files: "List[CatalogFile]", scratch: str) -> "List[str]":
        above = os.path.join(self.path, META_DIR.decode(), "catalog", source)
        return [os.path.join(above, f.name) for f in files]

    def holdings(self, source: str, old: bool, prefix: bytes = b"") -> "Iterator[Holding]":
        """From the directory itself, not from the database: digests are checked when the files are
        read.  Of paths that begin with `prefix`."""
        with Tree(self.path) as tree:
            below = prefix.rpartition(b"/")[0]
            for path, size, mtime in files_here(tree, source, below=below) if not old else ():
                if path.startswith(prefix):
                    yield path, b"", size, mtime, None
            for path, stored, size, mtime in old_files_here(tree, source) if old else ():
                if path.startswith(prefix):
                    yield path, stored, size, mtime, None

    def fetch(self, source: str, names: "List[Tuple[bytes, bytes]]", into: bytes, most: int,
              on_bytes: "Callable[[int], None]", whole: bool = False) -> Pull:
        """The same; here a part costs nothing."""
        outcome = Pull()
        os.makedirs(into, mode=0o700, exist_ok=True)
        with Tree(self.path) as tree, Tree(into) as target:
            for path, place in names:
                try:
                    if self._bring(tree, self._name(source, path, place), target, path, most,
                                   on_bytes):
                        outcome.parts.add(path)
                except OSError as error:
                    outcome.errors.append("%s: %s" % (shown(path), reason_of(error)))
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        break
        return outcome

    @staticmethod
    def _name(source: str, path: bytes, place: bytes) -> bytes:
        """Where in the directory a file is.  place: see PLAN_SCHEMA."""
        if not place:
            return source.encode() + b"/" + path
        return source.encode() + place if place.startswith(b"/") else META_DIR + b"/" + place

    def _bring(self, tree: Tree, rel: bytes, target: Tree, path: bytes, most: int,
               on_bytes: "Callable[[int], None]") -> bool:
        """One file; see `_copy`."""
        info = tree.lstat(rel)
        if info is not None and info.st_size > most:
            raise OSError(errno.EFBIG, "it has grown")
        part = part_of(path)
        target.make_directory(part.rpartition(b"/")[0])
        added = self._copy(tree, rel, os.path.join(target.root, part), on_bytes)
        target.rename(part, path)
        return added

    @staticmethod
    def _copy(tree: Tree, rel: bytes, into: bytes, on_bytes: "Callable[[int], None]") -> bool:
        """Copy a file, or the rest of one that was begun: true then, and only its digest tells
        whether it is one file."""
        reader = tree.open(rel)
        try:
            with open(os.open(into, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600),
                      "r+b") as writer:
                begun = writer.seek(0, os.SEEK_END)
                if begun >= os.fstat(reader).st_size:
                    writer.truncate(0)
                    begun = 0
                os.lseek(reader, writer.seek(begun), os.SEEK_SET)
                copy_rest(reader, writer, lambda block: on_bytes(len(block)))
                return begun > 0
        finally:
            os.close(reader)


class Holders:
    """The backups from which a source may come back: who they are, and which catalogs they have.
    May touch: the links to their servers."""

    def __init__(self, source: str, each: "Iterable[Any]" = ()) -> None:
        self.source = source
        self.each: "List[Any]" = list(each)  # known from here on by their number in it
        self.down: "Dict[str, str]" = {}  # backup -> its name for people, of those not reachable
        self.differs: "Dict[int, bool]" = {}  # generation -> whether something changed in it
        self._lock = threading.Lock()

    def find(self, config: Config, dialer: Dialer) -> None:
        """Ask the servers of all backups; those that do not answer are listed in `down`.  And the
        source's own server, which catalogs it made."""
        made: "Dict[int, int]" = {}
        own = config.sources.get(self.source)
        jobs: "List[Callable[[], None]]" = [
            functools.partial(self._ask_for_catalogs, Link(host, config, dialer))
            for host in sorted({b.host for b in config.backups.values()})]
        if own:
            jobs.append(functools.partial(self._ask_what_was_made, Link(own.host, config, dialer),
                                          made))
        in_parallel(lambda job: job(), jobs)
        self.each.sort(key=lambda holder: holder.name)
        self._leave_out_unknown(made, own.host if own else "")

    def _ask_for_catalogs(self, link: Link) -> None:
        """Enter the backups of a host among the holders."""
        config, host = link.config, link.host
        try:
            vaults = link.call("vaults", source=self.source)["vaults"]
        except (Unreachable, Refused) as error:
            with self._lock:
                self.down.update((b.name, "%s on %s" % (b.name, host))
                                 for b in config.backups_of(host))
            log.info("%s", error)
            return
        finally:
            link.done()
        for name, facts in sorted(vaults.items()):
            spec = config.backups.get(name)
            if spec and spec.host == host:
                catalogs = list_catalogs(str(row[0]) for row in facts["catalogs"])
                limit = config.rate(spec, key="bwlimit")
                with self._lock:
                    self.each.append(RemoteHolder(link.again(), name, catalogs, limit))

    def _ask_what_was_made(self, link: Link, made: "Dict[int, int]") -> None:
        """Enter generation -> time of the catalogs that the source's own server made, if it
        answers."""
        try:
            rows = link.call("generations", source=self.source)["rows"]
            made.update((gen, int(when)) for gen, when, _ in rows)
            self.differs.update((gen, differs) for gen, _, differs in rows)
        except (Unreachable, Refused) as error:
            log.info("%s", error)
        finally:
            link.done()

    def _leave_out_unknown(self, made: "Dict[int, int]", host: str) -> None:
        """A catalog that is newer than all that the source's own server made does not count: its
        number was made up.  Where that server does not answer, or made none of those that are there
        (its books are new), nobody knows better.

        made: of `_ask_what_was_made`, by the server on `host`.
        """
        top = max((f.upto for holder in self.each for f in holder.catalogs
                   if made.get(f.upto) == f.time), default=None)
        for holder in self.each if top is not None else ():
            wrong = [f for f in holder.catalogs if f.upto >= top and made.get(f.upto) != f.time]
            if wrong:
                holder.catalogs = [f for f in holder.catalogs if f not in wrong]
                log.warning(
                    "%s has a catalog of %s (%d, of %s) that the source's own server on %s did not "
                    "make: not taken; if that server has lost what it knew of its last days, stop "
                    "it, and run this again", holder.name, self.source, wrong[0].upto,
                    format_time(wrong[0].time), host)

    def lose(self, number: int) -> None:
        """One of them no longer answers."""
        with self._lock:
            self.down[self.each[number].backup] = self.each[number].name

    def unreachable(self) -> str:
        """The end of a sentence: who could not be asked; "" when all could."""
        return "; not reachable: %s" % ", ".join(sorted(self.down.values())) if self.down else ""

    def catalogs(self, at: "Optional[float]") -> "List[Tuple[int, int, List[CatalogFile]]]":
        """(time, number of the holder, the files that a catalog consists of), the newest (not newer
        than `at`) first."""
        choices = [(chain[-1].upto, chain[-1].time, number, chain)
                   for number, holder in enumerate(self.each)
                   for chain in catalog_chains(holder.catalogs, at)]
        return [c[1:] for c in sorted(choices, key=lambda c: c[:3], reverse=True)]

    def no_catalog(self, at: "Optional[float]") -> CBackupError:
        """What to raise when none of them could be read."""
        where = self.unreachable()
        oldest = min((f.time for holder in self.each for f in holder.catalogs if not f.since),
                     default=0)
        if at and oldest > at:
            where = "; the oldest is of %s" % format_time(oldest) + where
        return CBackupError("no backup that can be reached has a catalog of %s%s%s" % (
            self.source, " of %s" % format_time(at) if at else "", where))


class Asked:
    """What of a source is asked for: all of it, or what the patterns say; or, with `only`, a path
    and what is directly in it.  Touches nothing."""

    def __init__(self, patterns: "Iterable[str]" = (), only: "Optional[bytes]" = None) -> None:
        import fnmatch
        self.patterns = [os.fsencode(p).strip(b"/") for p in patterns]
        self._tests = [re.compile(fnmatch.translate(as_text(p))) for p in self.patterns]
        self._only = only

    def has(self, path: bytes) -> bool:
        """Whether a pattern says so."""
        return any(path == p or path.startswith(p + b"/") for p in self.patterns) \
            or any(test.match(as_text(path)) for test in self._tests)

    def takes(self, path: bytes) -> bool:
        """Whether a path of a catalog concerns us."""
        if (path + b"/").startswith(RESTORE_DIR + b"/"):
            return False  # no source has that, and what is laid there would be a later run's
        return self._only is None or path == self._only or path.rpartition(b"/")[0] == self._only

    def in_vain(self, paths: "Callable[[], Iterable[bytes]]") -> "List[bytes]":
        """The patterns that none of the paths fulfils."""
        return [pattern for pattern, test in zip(self.patterns, self._tests)
                if not any(path == pattern or path.startswith(pattern + b"/")
                           or test.match(as_text(path)) for path in paths())]

    def prefixes(self) -> "Optional[List[bytes]]":
        """How every path begins that is asked for, none of them within another; None: it may be
        anything."""
        prefixes = sorted({re.split(rb"[*?[]", pattern, maxsplit=1)[0]
                           for pattern in self.patterns})
        if b"" in prefixes or not prefixes:
            return None
        return [p for p in prefixes
                if not any(p.startswith(other) for other in prefixes if other != p)]

    def lines(self) -> "Optional[Callable[[bytes], bool]]":
        """A test for a catalog's lines: what has to be understood is what is asked for, and the
        directories above.  None: everything."""
        if self._only is not None:
            return PathsOf([self._only], [self._only + b"/" if self._only else b""])
        prefixes = self.prefixes()
        if prefixes is None:
            return DirectoriesAnd(self.has) if self.patterns else None
        above = {b""}
        for prefix in prefixes:
            parts = prefix.split(b"/")
            above.update(b"/".join(parts[:count]) for count in range(1, len(parts)))
        return PathsOf(above, prefixes)


class Item(namedtuple("Item", "path size place digest mode uid gid user group mtime xattrs")):
    """A file that is to be fetched.  place: where its holder has it, see PLAN_SCHEMA."""

    __slots__ = ()

    @property
    def look(self) -> "Tuple[Any, ...]":
        """See METADATA."""
        return self[4:]


class Plan:
    """What is wanted, who has it, and what has become of it: the one place for the SQL of a plan.
    May touch: its database.  Safe to use by several threads."""

    def __init__(self, work: str) -> None:
        """A new one, in the directory `work`."""
        path = os.path.join(work, "plan.db")
        for suffix in ("", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + suffix)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("PRAGMA journal_mode=TRUNCATE")  # in memory it would grow with the files
        self._db.executescript(PLAN_SCHEMA)

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def at_once(self) -> "Iterator[None]":
        """One transaction; all of it or, when something is raised, nothing."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _one(self, sql: str, *values: Any) -> Any:
        with self._lock:
            return self._db.execute(sql, values).fetchone()

    def _rows(self, sql: str, *values: Any) -> "List[Any]":
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _many(self, sql: str, rows: "Iterable[Tuple[Any, ...]]") -> None:
        with self.at_once():
            self._db.executemany(sql, rows)

    # -- what is wanted --

    def load(self, files: "Iterable[Iterable[CatalogRow]]", asked: Asked) -> None:
        """The rows of a catalog's files, oldest first.  Raises what they raise: then there is
        nothing."""
        with self.at_once():
            self._db.execute("DELETE FROM want")
            for rows in map(iter, files):
                for page in iter(lambda: list(itertools.islice(rows, 1000)), []):
                    news = {row.path: row for row in page if asked.takes(row.path)}
                    self._enter(list(news.values()))

    def _enter(self, rows: "List[CatalogRow]") -> None:
        """Rows of different paths."""
        self._db.executemany("DELETE FROM want WHERE path=?",
                             [row[:1] for row in rows if row.kind is None])
        self._db.executemany(
            "INSERT OR REPLACE INTO want(path, kind, size, mtime, mode, uid, gid, user, grp, link, "
            "target, digest, holders, proven, xattrs, readable) "
            "VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            [row[:12] + (",".join(row.holders), row.proven,
                         None if row.xattrs is None else json.dumps(row.xattrs), row.readable)
             for row in rows if row.kind is not None])

    def select(self, asked: Asked) -> "List[bytes]":
        """Keep what the patterns ask for.  Directories stay in any case, for the parents of what is
        restored.  Returns the patterns that nothing fulfils."""
        if not asked.patterns:
            return []
        with self.at_once():
            self._db.create_function("asked_for", 1, lambda path: int(asked.has(path)))
            self._db.execute("DELETE FROM want WHERE kind<>'d' AND NOT asked_for(path)")
            self._db.execute("UPDATE want SET asked=0 WHERE NOT asked_for(path)")
        return asked.in_vain(lambda: (
            path for (path,) in self._db.execute("SELECT path FROM want WHERE asked=1")))

    def each(self, what: str) -> "Iterator[Any]":
        """(path, columns...) of a list of LISTS, by path; the states may be changed meanwhile."""
        columns, condition, *deepest = LISTS[what]
        order, beyond = ("DESC", "<") if deepest else ("", ">")
        after: "Tuple[Any, ...]" = ()
        while True:
            page = self._rows(
                "SELECT path, %s FROM want WHERE %s %s ORDER BY path %s LIMIT 1000" % (
                    columns, condition, "AND path%s?" % beyond if after else "", order), *after)
            yield from page
            if len(page) < 1000:
                return
            after = page[-1][:1]

    def count(self, what: str) -> "Tuple[int, int]":
        """(how many, bytes) of a list of LISTS."""
        return self._one("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM want WHERE "
                         + LISTS[what][1])

    def set_state(self, path: bytes, state: int, note: "Optional[str]" = None) -> None:
        with self._lock:
            self._db.execute("UPDATE want SET state=?, note=COALESCE(?, note) WHERE path=?",
                             (state, note, path))

    def refuse_below(self, path: bytes) -> None:
        """What is not a directory is where one belongs: nothing below it is to be fetched."""
        self._one("UPDATE want SET state=4, note=? WHERE path>? AND path<?",
                  "%s is not a directory" % shown(path), path + b"/", path + b"0")

    def note(self, path: bytes, text: str) -> None:
        """What is said of a path should it be missing in the end."""
        self._one("UPDATE want SET note=? WHERE path=?", text, path)

    def settle(self, paths: "Iterable[bytes]") -> None:
        """They are in place."""
        self._many("UPDATE want SET state=1 WHERE path=?", [(path,) for path in paths])

    def end(self) -> None:
        """What is not there now is missing."""
        with self._lock:
            self._db.execute("UPDATE want SET state=5 WHERE kind='f' AND state IN (0, 3)")

    def is_file(self, path: bytes) -> bool:
        return self._one("SELECT 1 FROM want WHERE path=? AND kind='f'", path) is not None

    def leads_to(self, path: bytes, *state: int) -> bool:
        """Whether a directory is above something that is wanted, or that is in this state."""
        return self._one("SELECT 1 FROM want WHERE path>? AND path<? AND kind<>'d' %s LIMIT 1" % (
            "AND state=?" if state else ""), path + b"/", path + b"0", *state) is not None

    def alike(self) -> "Iterator[List[Tuple[bytes, str]]]":
        """(path, kind) of those that some file systems take for one name, directories first."""
        self._db.create_function("fold_key", 1, fold_key)
        rows = self._rows(
            "SELECT fold_key(path), path, kind FROM want WHERE fold_key(path) IN (SELECT "
            "fold_key(path) FROM want GROUP BY 1 HAVING COUNT(*)>1 AND SUM(kind<>'d')>0) "
            "ORDER BY 1, kind<>'d', path")
        for _, alike in itertools.groupby(rows, lambda row: row[0]):
            yield [row[1:] for row in alike]

    # -- who has it --

    def enter_holdings(self, number: int, rows: "Iterable[Holding]") -> None:
        """What a holder has; `match` says what of it is wanted.  The pages before something is
        raised stay."""
        rows = iter(rows)
        for page in iter(lambda: list(itertools.islice(rows, PAGE)), []):
            self._many("INSERT INTO came VALUES(%d,?,?,?,?,?)" % number, page)

    def match(self) -> None:
        """Find among what was entered the wanted versions; the rest may be one by another name."""
        with self.at_once():
            self._db.execute(
                "INSERT OR IGNORE INTO have SELECT c.path, c.holder, c.place, c.digest IS NULL AND "
                "c.mtime<>w.mtime FROM came c CROSS JOIN want w ON w.path=c.path WHERE w.kind='f' "
                "AND " + SAME_VERSION)
            self._db.execute(
                "INSERT INTO other SELECT c.path, c.holder, CASE c.place WHEN x'' THEN "
                "CAST('/' || c.path AS BLOB) ELSE c.place END, c.size, c.mtime, c.digest "
                "FROM came c LEFT JOIN want w ON w.path=c.path AND w.kind='f' WHERE w.path IS NULL "
                "OR NOT "
                + SAME_VERSION)
            self._db.execute("DELETE FROM came")

    def match_renamed(self) -> None:
        """What nobody has under its path may have been renamed since: the same bytes under another
        name."""
        for condition in ("o.digest=w.digest",
                          "o.size=w.size AND o.mtime=w.mtime AND o.digest IS NULL"):
            if self._one("SELECT 1 FROM other LIMIT 1"):
                self._one("INSERT OR IGNORE INTO have SELECT w.path, o.holder, o.place, 0 "
                          "FROM want w JOIN other o ON %s WHERE w.kind='f' AND NOT EXISTS("
                          "SELECT 1 FROM have h WHERE h.path=w.path)" % condition)

    def may_come(self, path: bytes) -> bool:
        """Whether somebody has a file, or another path of the same hard links."""
        return self._one(
            "SELECT 1 FROM want WHERE path=? AND (%s OR EXISTS(SELECT 1 FROM want w JOIN have h "
            "ON h.path=w.path WHERE w.link=want.link AND w.digest IS want.digest AND w.kind='f'))"
            % HAS, path) is not None

    def lead_links(self) -> None:
        """Of hard links one path is fetched: one that somebody has, if not one of them is there
        already."""
        self._one(
            "UPDATE want SET state=3 WHERE kind='f' AND link IS NOT NULL AND state=0 AND EXISTS("
            "SELECT 1 FROM want w WHERE w.link=want.link AND w.kind='f' AND w.digest IS "
            "want.digest AND w.path<>want.path AND (w.state=1 OR w.state=0 AND %s AND (NOT %s OR "
            "w.path<want.path)))" % (
                HAS.replace("want.", "w."), HAS))

    def lead_other_links(self) -> bool:
        """Where the path that was to be fetched did not come: another one of the same links.  False
        when there is none."""
        with self.at_once():
            changed = self._db.execute(
                "UPDATE want SET state=0 WHERE kind='f' AND link IS NOT NULL AND state=3 AND %s "
                "AND NOT EXISTS(SELECT 1 FROM want w WHERE w.link=want.link AND w.kind='f' AND "
                "w.digest IS want.digest AND w.state=1)" % HAS).rowcount
            self.lead_links()
        return changed > 0

    # -- what is still to be fetched --

    def open_all(self) -> int:
        """Everything that is wanted and that somebody has is to be fetched.  Returns its bytes."""
        with self.at_once():
            self._db.execute("DELETE FROM queue")
            self._db.execute(TO_QUEUE % "")
            return self._one("SELECT COALESCE(SUM(size), 0) FROM queue JOIN want USING(path)")[0]

    def open_again(self, number: int, paths: "List[bytes]",
                   without: "List[Tuple[bytes, bytes]]") -> None:
        """Some are to be fetched after all.  without: (path, place) that this holder does not
        deliver."""
        with self.at_once():
            self._db.executemany("DELETE FROM have WHERE path=? AND holder=? AND place=?",
                                 [(path, number, place) for path, place in without])
            self._db.executemany(TO_QUEUE % "AND h.path=?", [(path,) for path in paths])

    def is_open(self) -> bool:
        return self._one("SELECT 1 FROM queue LIMIT 1") is not None

    def page(self, number: int, turn: int, after: bytes, most: int) -> "List[Item]":
        """Open files of one turn (see PLAN_SCHEMA) that a holder has, behind a path, by path; a
        file that it has at several places comes once, and a place, too."""
        rows = map(Item._make, self._rows(
            "SELECT w.path, w.size, h.place, w.digest, %s FROM queue q CROSS JOIN have h "
            "ON h.path=q.path AND h.holder=? CROSS JOIN want w ON w.path=q.path WHERE q.turn=? "
            "AND q.path>? ORDER BY q.path, h.doubt, h.place LIMIT ?" % METADATA,
            number, turn, after, most))
        first: "Dict[bytes, Item]" = {}
        for row in rows:
            first.setdefault(row.path, row)
        return list({row.place or row.path: row for row in reversed(first.values())}.values())[::-1]

    def take(self, turn: int, paths: "Iterable[bytes]") -> None:
        """They are being fetched."""
        self._many("DELETE FROM queue WHERE turn=? AND path=?", [(turn, path) for path in paths])

    def places(self, number: int, items: "Iterable[Item]") -> "List[Item]":
        """Those of the files that a holder has, and where."""
        found = []
        for item in items:
            row = self._one("SELECT place FROM have WHERE holder=? AND path=? "
                            "ORDER BY doubt, place LIMIT 1", number, item.path)
            if row:
                found.append(item._replace(place=row[0]))
        return found

    def lose(self, number: int) -> None:
        """A holder delivers nothing any more."""
        with self.at_once():
            self._db.execute("DELETE FROM have WHERE holder=?", (number,))
            self._db.execute("DELETE FROM queue WHERE NOT EXISTS("
                             "SELECT 1 FROM have h WHERE h.path=queue.path)")

    def needed(self) -> int:
        """Bytes of all that somebody has; of hard links once."""
        return sum(self._one(sql)[0] for sql in (
            "SELECT COALESCE(SUM(size), 0) FROM want WHERE kind='f' AND link IS NULL AND " + HAS,
            "SELECT COALESCE(SUM(size), 0) FROM (SELECT MAX(size) size FROM want WHERE kind='f' "
            "AND link IS NOT NULL AND %s GROUP BY link)" % HAS))


class Done:
    """What this and earlier runs put into place, durably: kept while the restore is not over, so
    that nothing of it is read again.  Where files could be synced only one by one there is nothing
    in it: reading them again costs less.  May touch: its database."""

    def __init__(self, work: str) -> None:
        self._lock = threading.Lock()
        self._db = open_database(os.path.join(work, "done.db"), DONE_SCHEMA, 1, "DELETE")
        self._db.execute("PRAGMA synchronous=OFF")  # a row that is lost costs a look at the file

    def close(self) -> None:
        self._db.close()

    def has(self, path: bytes, info: os.stat_result, digest: "Optional[bytes]") -> bool:
        return self._db.execute(
            "SELECT 1 FROM done WHERE path=? AND size=? AND mtime=? AND ino=? AND digest IS ?",
            (path, info.st_size, info.st_mtime_ns, info.st_ino, digest)).fetchone() is not None

    def add(self, rows: "List[Tuple[bytes, os.stat_result, Optional[bytes]]]") -> None:
        """(path, what is there, its digest): of files that are durable by now."""
        with self._lock:
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT OR REPLACE INTO done VALUES(?,?,?,?,?)",
                [(path, info.st_size, info.st_mtime_ns, info.st_ino, digest)
                 for path, info, digest in rows])
            self._db.execute("COMMIT")


class Metadata:
    """Modes, owners, times and extended attributes of what is brought back; what could not be set
    is counted.  May touch: what it is told to, in the tree that it is given."""

    def __init__(self) -> None:
        self.notes: "Dict[str, int]" = {}  # what could not be set -> how often
        self._names = Names()
        self._owners: "Dict[Tuple[Any, ...], Tuple[int, int]]" = {}
        self._lock = threading.Lock()
        self._root = os.geteuid() == 0

    def note(self, text: str) -> None:
        with self._lock:
            self.notes[text] = self.notes.get(text, 0) + 1

    def owner(self, uid: int, gid: int, user: str, group: str) -> "Tuple[int, int]":
        """By name, when this machine knows it, else by number."""
        known = self._owners.get((uid, gid, user, group))
        if known is None:
            known = self._names.uid(user, uid), self._names.gid(group, gid)
            self._owners[uid, gid, user, group] = known
        return known

    def is_right(self, info: os.stat_result, look: "Tuple[Any, ...]") -> bool:
        """Whether nothing is left to be set.  look: see METADATA."""
        mode, uid, gid, user, group, mtime, xattrs = look
        return xattrs is None and info.st_mtime_ns == mtime and info.st_mode & 0o7777 == mode and (
            not self._root or (info.st_uid, info.st_gid) == self.owner(uid, gid, user, group))

    def set(self, tree: Tree, rel: bytes, look: "Tuple[Any, ...]") -> None:
        """Of a file or a directory, where they are others: what is right already is not touched."""
        mode, uid, gid, user, group, mtime, xattrs = look
        info = tree.lstat(rel)
        self.set_owner(tree, rel, info, uid, gid, user, group)
        try:
            self.set_mode(tree, rel, mode, xattrs, lambda mode: tree.chmod(rel, mode))
            if info is None or info.st_mtime_ns != mtime:
                tree.set_mtime(rel, mtime)
        except OSError as error:
            self.note("modes or times could not be set (%s)" % reason_of(error))

    def set_owner(self, tree: Tree, rel: bytes, info: "Optional[os.stat_result]", uid: int,
                  gid: int, user: str, group: str) -> None:
        """As root, where it is another one than in `info`."""
        owner = self.owner(uid, gid, user, group)
        if not self._root or info is not None and (info.st_uid, info.st_gid) == owner:
            return
        try:
            tree.chown(rel, *owner)
        except OSError as error:
            self.note("owners could not be set (%s)" % reason_of(error))

    def set_mode(self, tree: Tree, rel: bytes, mode: int, xattrs: "Optional[str]",
                 chmod: "Callable[[int], None]") -> None:
        """Mode and extended attributes: a mode may forbid those of `user.`, and is a part of an
        ACL."""
        different = self._different_xattrs(tree, rel, xattrs)
        early = {name for name in different if name.startswith("user.")}
        if early:
            chmod(mode | stat.S_IWUSR)
        self._set_xattrs(tree, rel, {name: different.pop(name) for name in early})
        chmod(mode)
        self._set_xattrs(tree, rel, different)

    def set_xattrs(self, tree: Tree, rel: bytes, xattrs: "Optional[str]") -> None:
        """Extended attributes alone, as of a symlink."""
        self._set_xattrs(tree, rel, self._different_xattrs(tree, rel, xattrs))

    def _different_xattrs(self, tree: Tree, rel: bytes, xattrs: "Optional[str]",
                          ) -> "Dict[str, Optional[bytes]]":
        """What is to be set, or with None removed, so that an entry has the extended attributes
        that the catalog says.  What cannot be is noted."""
        wanted = {name: base64.b64decode(value)
                  for name, value in json.loads(xattrs or "{}").items() if value is not None}
        if wanted and not hasattr(os, "setxattr"):
            self.note("extended attributes could not be set (Python cannot on this system)")
        if xattrs is None or not hasattr(os, "setxattr"):
            return {}
        if not self._root and not all(name.startswith(XATTRS_OF_USERS) for name in wanted):
            self.note("extended attributes could not be set that only root may set (security., "
                      "trusted.)")
            wanted = {name: value for name, value in wanted.items()
                      if name.startswith(XATTRS_OF_USERS)}
        there: "Dict[str, bytes]" = {}
        with contextlib.suppress(OSError):
            there = tree.xattrs(rel)
        different: "Dict[str, Optional[bytes]]" = {
            name: None for name in there if name not in wanted and name.startswith(XATTRS_OF_USERS)}
        different.update(one for one in wanted.items() if there.get(one[0]) != one[1])
        return different

    def _set_xattrs(self, tree: Tree, rel: bytes, different: "Dict[str, Optional[bytes]]") -> None:
        for name, value in different.items():
            try:
                tree.set_xattr(rel, name, value)
            except OSError as error:
                kind = shown(os.fsencode(name.partition(".")[0])) + "."
                self.note("extended attributes (%s) could not be set (%s)" % (
                    "ACLs" if "posix_acl" in name else kind, reason_of(error)))


class Work:
    """The working directory of a restore, in its target: the lock, the plan, and where the holders'
    files arrive.  May touch: that directory."""

    def __init__(self, target: str) -> None:
        self.target, self.path = target, os.path.join(target, RESTORE_DIR.decode())
        self._mark = os.path.join(self.path, RESTORE_MARK.decode())
        self._lock = os.path.join(self.path, "lock")

    def make(self) -> bool:
        """Returns whether it was not there before.  Raises CBackupError when something is in it
        that was not made by a restore: it could lead elsewhere."""
        if os.path.islink(self.path):
            raise CBackupError("%s is a symlink; remove it" % self.path)
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise CBackupError("%s is not a directory; remove it" % self.path)
        new = not os.path.exists(self.path)
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        with Tree(self.path) as tree:
            for rel in tree.walk_files(b""):
                info = tree.lstat(rel)
                if info is not None and (not stat.S_ISREG(info.st_mode) or info.st_nlink > 1):
                    raise CBackupError("%s/%s is none of cbackup's files; remove %s" % (
                        self.path, shown(rel), self.path))
        return new

    @contextlib.contextmanager
    def locked(self) -> "Iterator[None]":
        with open(self._lock, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # one that was just over may have taken it away
                ours = os.path.samestat(os.fstat(lock.fileno()), os.stat(self._lock))
            except OSError:
                ours = False
            if not ours:
                raise CBackupError("another restore is at work in %s" % self.target)
            yield

    def mark(self) -> None:
        """From now on the source is held, until the whole of it is back."""
        atomic_write(self._mark, b"")

    def is_marked(self) -> bool:
        return os.path.exists(self._mark)

    def remove(self) -> str:
        """The mark last: where only a part is gone, the next run finds that there is something to
        do.  Returns why something stays, "" when nothing does."""
        why, last = "", (self._lock, self._mark)
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        paths = [os.path.join(self.path, name) for name in names]
        for path in sorted(paths, key=lambda path: path in last):
            try:
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
            except OSError as error:
                why = reason_of(error)
        with contextlib.suppress(OSError):
            os.rmdir(self.path)
        return why

    # -- where files arrive: below the target, in two directories for each holder, by its key: the
    # next run may have others --

    @staticmethod
    def staging(holder: Any, side: int, path: bytes = b"") -> bytes:
        """Relative to the target.  side: 0 and 1 in turn, so that nothing can be written any more
        to what is checked, whatever the holder sends meanwhile."""
        return RESTORE_DIR + b"/files-%s-%d" % (os.fsencode(holder.key), side) \
            + (b"/" + path if path else b"")

    @staticmethod
    def all_staging(tree: Tree) -> "List[bytes]":
        """Where files of holders are, or were in an earlier run.  tree: the target."""
        return [RESTORE_DIR + b"/" + name for name in tree.list(RESTORE_DIR)
                if name.startswith(b"files-")]

    def keep_parts(self, tree: Tree, plan: Plan) -> None:
        """What an earlier run that was killed has left is used, as parts: these are compared with
        what comes.  A whole file is not believed to be one: size and time may have come to the disk
        without the bytes, and rsync would not look at them."""
        for top in self.all_staging(tree):
            keep_parts(tree, top, plan.is_file)
            for rel in list(tree.walk_files(top)):
                info = tree.lstat(rel)
                if info is None or rel.rpartition(b"/")[0].endswith(b"/" + PART_SUFFIX_DIR):
                    continue
                if info.st_size > PLAIN_BELOW:
                    tree.chmod(rel, 0o600)
                    tree.rename(rel, part_of(rel))
                else:
                    tree.unlink(rel)

    def arrived(self, tree: Tree) -> "Iterator[bytes]":
        """What lies there."""
        for top in self.all_staging(tree):
            yield from tree.walk_files(top)


class Target:
    """The tree that is written.  May touch: everything below its path, and never through a link;
    the states in the plan."""

    def __init__(self, path: str, force: bool, progress: Progress) -> None:
        self.path, self.force, self.progress = path, force, progress
        self.metadata = Metadata()
        self.tree: "Any" = None  # a Tree, while there is one: see `opened`
        self._started = clock.now()
        self._look: "Optional[Tuple[Any, ...]]" = None  # of the target itself
        self._folds = False

    @contextlib.contextmanager
    def opened(self) -> "Iterator[Tree]":
        with Tree(self.path) as self.tree:
            yield self.tree

    # -- before --

    def free(self) -> int:
        """Bytes that can be written at the target, or where it will be."""
        path = self.path
        while not os.path.isdir(path) and path != os.path.dirname(path):
            path = os.path.dirname(path)
        info = os.statvfs(path)
        if not info.f_blocks:  # a file system that does not know how large it is
            return 1 << 62
        return (info.f_bfree if os.geteuid() == 0 else info.f_bavail) * info.f_frsize

    def there(self, plan: Plan) -> int:
        """Bytes of what is to be restored that need no room, because they are there, or because
        something else is, or because an earlier run has begun with them."""
        if not os.path.isdir(self.path):
            return 0
        seen, count = set(), 0
        with Tree(self.path) as tree:
            for path, size, link in plan.each("files that somebody has"):
                with contextlib.suppress(OSError):
                    info = tree.lstat(path)
                    if info is not None and link not in seen \
                            and (not self.force or info.st_size == size):
                        count += size
                        seen |= {link} - {None}
            begun = [tree.lstat(path) for path in Work(self.path).arrived(tree)]
            return count + sum(info.st_size for info in begun if info is not None)

    def count(self, plan: Plan) -> "Tuple[int, int]":
        """(files that are there with the right size and time, paths where something else is), for a
        dry run."""
        there = differ = 0
        if os.path.isdir(self.path):
            with self.opened(), plan.at_once():
                for path, size, mtime in plan.each("files"):
                    info = self._what_is_at(path, plan)
                    if info is None:
                        continue
                    if (info.st_size, info.st_mtime_ns) == (size, mtime) \
                            and stat.S_ISREG(info.st_mode):
                        there += 1
                        plan.set_state(path, 1)
                    elif plan.may_come(path):
                        differ += 1
                        if not self.force:
                            plan.set_state(path, 4)
        return there, differ

    def leave_out_folded(self, plan: Plan) -> None:
        """Where the target takes several wanted names for one, bring one of them: a directory, that
        which is there already, or the first.  The others have their reason noted, and are not
        fetched: each would take the other's place."""
        if not self._finds_folding():
            return
        for rows in plan.alike():
            there = [path for path, kind in rows if kind == "d"
                     or path.rpartition(b"/")[2] in self.tree.list(path.rpartition(b"/")[0])]
            first = there[0] if there else rows[0][0]
            for path, kind in rows:
                if path != first and kind != "d" and self._is_one_name(first, path):
                    plan.set_state(path, 4, "%s: %s takes both for one name" % (
                        difference(first, path), self.path))

    def _finds_folding(self) -> bool:
        """Whether the target takes some names for others; also when that cannot be found out."""
        probe = RESTORE_DIR + "/probe-\u00e9".encode()
        with contextlib.suppress(OSError):
            self.tree.make_directory(probe)
            folds = self.tree.lstat(RESTORE_DIR.upper()) \
                or self.tree.lstat(RESTORE_DIR + "/probe-e\u0301".encode())
            self.tree.rmdir(probe)
            return bool(folds)
        return True

    def _is_one_name(self, one: bytes, other: bytes) -> bool:
        """Whether the target takes two paths, alike but for case or forms of letters, for one:
        tried out part by part."""
        probe = RESTORE_DIR + b"/probe"
        try:
            for part, same in zip(one.split(b"/"), other.split(b"/")):
                self.tree.make_directory(probe + b"/" + part)
                if self.tree.lstat(probe + b"/" + same) is None:
                    return False
            return True
        except OSError:
            return False
        finally:
            self.tree.clear_empty(probe)

    def prepare(self, plan: Plan, done: Done) -> int:
        """Find what is there already: what has the right digest stays, what differs is in the way.
        Returns how many files stay."""
        kept, absent = 0, None
        with plan.at_once():
            for path, asked in plan.each("directories"):
                info = self._what_is_at(path, plan)
                if info is not None and not stat.S_ISDIR(info.st_mode) \
                        and (asked or plan.leads_to(path)) and not self._meet(path, plan):
                    plan.refuse_below(path)
            for path, size, digest, *look in plan.each("open files"):
                above = path.rpartition(b"/")[0]
                if above == absent:
                    continue
                info = self._what_is_at(path, plan)
                if info is None:
                    absent = above if above and self._is_absent(above) else None
                elif stat.S_ISREG(info.st_mode) and info.st_size == size \
                        and self._is_right(path, info, digest, look[-2], done):
                    if not self.metadata.is_right(info, tuple(look)):
                        self.metadata.set(self.tree, path, tuple(look))
                    plan.set_state(path, 1)
                    kept += 1
                elif plan.may_come(path):
                    self._meet(path, plan)
        return kept

    def _is_absent(self, directory: bytes) -> bool:
        """Whether nothing can be in a directory, because there is none."""
        try:
            return self.tree.lstat(directory, strict=True) is None
        except OSError:
            return False

    def _what_is_at(self, path: bytes, plan: Plan) -> "Optional[os.stat_result]":
        """lstat; a path that cannot be there, such as one with a name too long for this file
        system, has its reason noted."""
        try:
            return self.tree.lstat(path, strict=True)
        except OSError as error:
            plan.set_state(path, 4, reason_of(error))
            return None

    def _meet(self, path: bytes, plan: Plan) -> bool:
        """Something else is where a path belongs.  Returns whether it is no longer there."""
        try:
            if self.force:
                self._move_aside(path)
            else:
                plan.set_state(path, 4)
            return self.force
        except OSError as error:
            plan.set_state(path, 4, "what is there cannot be moved aside: " + reason_of(error))
            return False

    def _move_aside(self, path: bytes) -> None:
        """Under a name that nothing has: what came back to a path meanwhile is kept, too."""
        when = time.strftime("%Y%m%dT%H%M%S", time.localtime(self._started))
        aside = BEFORE_RESTORE + when.encode() + b"/" + path
        for number in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                return self.tree.rename_new(path, aside if number == 1 else b"%s.%d" % (
                    aside, number))

    def _is_right(self, path: bytes, info: os.stat_result, digest: "Optional[bytes]", mtime: int,
                  done: Done) -> bool:
        """Whether a file of the right size is the wanted one; without a digest its time has to
        do."""
        if done.has(path, info, digest):
            return True
        if digest is None:
            return info.st_mtime_ns == mtime
        self.progress.say("checking what is there: %s" % shown(path))
        with contextlib.suppress(OSError):  # what cannot be read is not right
            return bool(self.tree.digest(path)[0] == digest)
        return False

    # -- a file that arrived --

    def check(self, staged: bytes, item: Item) -> "Tuple[Optional[bool], Any]":
        """(whether it is what was wanted, its stat), with its metadata; None: it did not arrive.  A
        file without a digest in the catalog was never confirmed: size has to do.  Raises OSError
        when it cannot be read here."""
        try:
            descriptor, info = self.tree.open_file(staged)
        except OSError as error:
            if error.errno in Tree.NO_FILE:
                return None, None
            raise
        try:
            right = info.st_size == item.size and item.digest in (
                None, digest_descriptor(descriptor, size=item.size)[0])
        finally:
            os.close(descriptor)
        if right and not self.metadata.is_right(info, item.look):
            self.metadata.set(self.tree, staged, item.look)
            info = self.tree.lstat(staged)
        return right, info

    def place(self, staged: bytes, item: Item) -> None:
        """Rename a checked file to its place; raises OSError when something is in the way."""
        try:
            self._rename(staged, item)
        except FileExistsError:
            if not self.force:
                raise
            self._move_aside(item.path)
            self._rename(staged, item)

    def _open_above(self, path: bytes) -> None:
        """An earlier run may have made directories read-only already: those above a path are
        opened, and closed again at the end."""
        for end in (number for number, byte in enumerate(path) if byte == ord("/")):
            info = self.tree.lstat(path[:end])
            if info is not None and stat.S_ISDIR(info.st_mode) and info.st_mode & 0o700 != 0o700:
                self.tree.chmod(path[:end], stat.S_IMODE(info.st_mode) | 0o700)

    def _make(self, make: "Callable[..., None]", *paths: bytes) -> None:
        """Call one of the tree's methods that makes something at the last of the paths."""
        try:
            make(*paths)
        except PermissionError:
            self._open_above(paths[-1])
            make(*paths)

    def _rename(self, staged: bytes, item: Item) -> None:
        try:
            self._make(self.tree.rename_new, staged, item.path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._copy(staged, item.path, item.digest, item.look)
            self.tree.unlink(staged)

    def _copy(self, old: bytes, new: bytes, digest: "Optional[bytes]", look: "Tuple[Any, ...]",
              ) -> None:
        """Put a copy of a checked file where it can be neither renamed nor linked to: on another
        file system, or one without hard links.  Raises OSError."""
        beside = b"/".join(filter(None, (new.rpartition(b"/")[0], COPY_NAME)))
        with contextlib.suppress(FileNotFoundError):
            self.tree.unlink(beside)  # of a run that was killed
        if self.tree.lstat(new) is not None:
            raise FileExistsError(errno.EEXIST, "something else is there")
        try:
            if self.tree.copy(old, beside) != digest and digest is not None:
                raise OSError(errno.EIO, "it cannot be copied: its bytes come back as others")
            self.metadata.set(self.tree, beside, look)
            self.tree.rename_new(beside, new)
        except OSError:
            with contextlib.suppress(OSError):
                self.tree.unlink(beside)
            raise

    # -- after the files --

    def links(self, plan: Plan) -> int:
        """Hard links: to whichever of their paths is there.  Returns how many were made."""
        made = 0
        for path, first, digest, *look in plan.each("open links"):
            if first is None:
                continue
            try:
                try:
                    self._make(self.tree.link, first, path)
                except OSError as error:
                    if error.errno not in NO_LINKS:
                        raise
                    self._copy(first, path, digest, tuple(look))
                    self.metadata.note("hard links could not be made (%s): there are copies"
                                       % reason_of(error))
                made += 1
                plan.set_state(path, 1)
            except OSError as error:
                plan.set_state(path, 4, reason_of(error))
        return made

    def symlinks(self, plan: Plan) -> None:
        for path, target, mtime, xattrs, *owner in plan.each("symlinks"):
            try:
                info = self.tree.lstat(path)
                if info is None or not stat.S_ISLNK(info.st_mode) \
                        or self.tree.readlink(path) != target:
                    if info is not None and not self.force:
                        plan.set_state(path, 4, "something else is there")
                        continue
                    if info is not None:
                        self._move_aside(path)
                    self._make(self.tree.symlink, target, path)
                    info = None
                self.metadata.set_owner(self.tree, path, info, *owner)
                self.metadata.set_xattrs(self.tree, path, xattrs)
                with contextlib.suppress(OSError, NotImplementedError):
                    if info is None or info.st_mtime_ns != mtime:
                        self.tree.set_mtime(path, mtime)
                plan.set_state(path, 1)
            except OSError as error:
                plan.set_state(path, 4, reason_of(error))

    def directories(self, plan: Plan) -> None:
        """Make the directories that are asked for, then set the metadata of all, the deepest
        first."""
        for path, _ in plan.each("directories to make"):
            try:
                self._make(self.tree.make_directory, path)
            except OSError as error:
                plan.set_state(path, 4, reason_of(error))
        for path, asked, *look in plan.each("directories, the deepest first"):
            if not asked and (path == b"" or not plan.leads_to(path, 1)):
                continue
            try:
                if path == b"":
                    self._look = tuple(look)
                elif self.tree.lstat(path) is not None:
                    self.metadata.set(self.tree, path, tuple(look))
            except OSError as error:
                self.metadata.note("metadata of directories could not be set (%s)"
                                   % reason_of(error))

    def finish(self) -> None:
        """The target's own metadata, when nothing is written there any more."""
        if self._look:
            mode, uid, gid, user, group, mtime, xattrs = self._look
            try:
                with self.opened() as tree:
                    if os.geteuid() == 0:
                        os.chown(self.path, *self.metadata.owner(uid, gid, user, group))
                    self.metadata.set_mode(tree, b"", mode, xattrs,
                                           lambda mode: os.chmod(self.path, mode))
                    os.utime(self.path, ns=(mtime, mtime))
            except OSError as error:
                self.metadata.note("metadata of directories could not be set (%s)"
                                   % reason_of(error))


class Flight:
    """What one holder is at, for the others to see.  fetching, checking: path -> file, of the batch
    that is on its way, and of the one before it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.fetching: "Dict[bytes, Item]" = {}
        self.checking: "Dict[bytes, Item]" = {}
        self.since = self.heard = 0.0  # when the batch was begun, and when a byte came last
        self.asked = self.came = 0  # bytes of it
        self.parts = 0  # bytes of it that are there already
        self.most = FIRST_FILES  # files that are looked at for the next batch
        self.vain = 0  # bytes that came since a file arrived, by batches that failed
        self.rate: "Optional[float]" = None  # bytes a second
        self.turn: "Tuple[int, bytes]" = (0, b"")  # everything before it is in hand
        self.arrived = 0  # files of the batch that was checked last
        self.side = 0  # of Work.staging, where the batch arrives


class Schedule:
    """Which holder fetches what next: one queue, and at the end idle holders take over what a slow
    one has not delivered.  While one batch of a holder is checked and put into place, its next one
    is on its way.  May touch: the plan, the holders, the files that arrive."""

    def __init__(self, source: str, plan: Plan, holders: Holders, progress: Progress) -> None:
        self.source, self.plan, self.holders, self.progress = source, plan, holders, progress
        self.flights = [Flight(number) for number in range(len(holders.each))]
        self.files = self.bytes = 0  # that were restored
        self._left = self._fetched = self._total = 0  # bytes: in nobody's hands, came, in all
        self._known = 0, 0  # files: in place before we began, in all
        self._twice: "set[bytes]" = set()  # that one holder took over from another
        self._changed = threading.Condition()
        self._ended = False  # something went so wrong that all stop

    def fetch_all(self, target: Target, done: Done, known: "Tuple[int, int]") -> None:
        """All holders at once, each taking the next batch that it can deliver, until nobody can
        deliver more.  known: (files that were in place before, files in all), to be shown."""
        self._target, self._done, self._known = target, done, known
        self._left = self.plan.open_all()
        self._total = self._fetched + self._left
        while self.plan.is_open():
            for flight in self.flights:
                flight.turn = 0, b""
            in_parallel(self._fly, self.flights)
        self.progress.clear()

    def _fly(self, flight: Flight) -> None:
        checker = Pipeline()
        try:
            try:
                self._work_through(flight, checker)
            finally:
                checker.drain()
        except BaseException:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            raise

    def _work_through(self, flight: Flight, checker: Pipeline) -> None:
        failures = 0
        while failures < FAILURES:
            batch = self._next_batch(flight)
            if not batch:
                busy = bool(flight.checking)
                checker.drain()
                if busy and not self._ended:
                    continue
                return
            outcome = self._fetch(flight, batch)
            flight.rate = flight.came / max(0.01, time.monotonic() - flight.since)
            failed = outcome.errors or outcome.how == "own"
            checker.drain()
            with self._changed:
                flight.checking, flight.fetching = flight.fetching, {}
            checker.submit(functools.partial(
                self._take, flight, batch, outcome,
                Work.staging(self.holders.each[flight.number], flight.side)))
            if not failed:
                failures = 0
                continue
            checker.drain()
            failures = failures + 1 if self._was_in_vain(flight) else 0
            self._meet_failure(flight, outcome, failures)
        self._give_up_on(flight)

    @staticmethod
    def _was_in_vain(flight: Flight) -> bool:
        """Whether nothing came of a batch that failed.  A part of a large file is something, too:
        the next try goes on behind it; but not when that comes again and again."""
        flight.vain = 0 if flight.arrived else flight.vain + flight.came
        return not flight.arrived and (flight.came < INHERIT_FROM or flight.vain > 2 * flight.asked)

    def _meet_failure(self, flight: Flight, outcome: Pull, failures: int) -> None:
        """Wait before the next try, or raise what makes every one of them vain, with whomever.
        failures: how many in a row were in vain."""
        if outcome.full_disk:
            raise CBackupError("%s is full: %s" % (self._target.path, outcome.errors[0][:160]))
        if failures == FAILURES and outcome.how == "own":
            raise outcome.own_failure()
        here = outcome.not_written(self._into(flight))
        if failures == FAILURES and here:
            raise CBackupError("%s: %s" % (self._target.path, here))
        if failures:
            log.info("%s: %s", self.holders.each[flight.number].name,
                     (outcome.errors or [outcome.own_failure()])[-1])
        time.sleep(max(0.2, failures - 1))  # the others choose first: they may go on with it

    def _into(self, flight: Flight) -> bytes:
        """Where the files of a holder arrive, the whole path."""
        return os.path.join(os.fsencode(self._target.path),
                            Work.staging(self.holders.each[flight.number], flight.side))

    def _fetch(self, flight: Flight, batch: "List[Item]") -> Pull:
        holder = self.holders.each[flight.number]
        try:
            return holder.fetch(
                self.source, [(item.path, item.place) for item in batch], self._into(flight),
                max(item.size for item in batch), lambda count: self._count(flight, count),
                self._is_quicker_whole(flight))
        except Cancelled:
            return Pull(how="cut")
        except (UsageError, OwnFailure):
            raise
        except (CBackupError, OSError) as error:
            return Pull(code=1, how="cut", errors=[reason_of(error)])

    def _count(self, flight: Flight, count: int) -> None:
        """Bytes came.  Raises Cancelled when they are not needed any more."""
        if not flight.fetching or self._ended:
            raise Cancelled("others were faster")
        flight.came += count
        if count:
            flight.heard = time.monotonic()
        self._fetched += count
        if self.progress.on:
            before, files = self._known
            self.progress.update(
                "restoring %s from %s" % (self.source, count_of(len(self.flights), "place")),
                self._fetched, max(self._total, self._fetched), ", %s of %s" % (
                    format(self.files + before, ","), count_of(files, "file")))

    def _give_up_on(self, flight: Flight) -> None:
        log.warning("%s no longer answers; going on with the others",
                    self.holders.each[flight.number].name)
        self.plan.lose(flight.number)
        self.holders.lose(flight.number)

    # -- the next batch --

    def _next_batch(self, flight: Flight) -> "List[Item]":
        """Files for one holder: as much as it delivers in BATCH_SECONDS, so that all holders end at
        about the same time.  When all are taken, part of what a slow one has not delivered.  Waits
        while that may still become necessary; []: nothing is left for this holder, or nothing
        before its last batch is checked."""
        with self._changed:
            while not self._ended:
                items = self._open_files(flight)
                if items:
                    batch = self._first_of(items, flight)
                    flight.most = min(FILES_AT_ONCE, max(FIRST_FILES, 2 * len(batch)))
                    self.plan.take(flight.turn[0], [item.path for item in batch])
                    flight.turn = flight.turn[0], batch[-1].path
                    self._left -= sum(item.size for item in batch)
                    return self._begun(flight, batch)
                items, waiting = self._slow_ones(flight)
                if items:
                    batch = self._first_of(items, flight)
                    self._twice.update(item.path for item in batch)
                    return self._begun(flight, batch)
                if flight.checking or not waiting:
                    break
                self._changed.wait(0.5)
            return []

    def _begun(self, flight: Flight, batch: "List[Item]") -> "List[Item]":
        flight.side = 1 - flight.side
        flight.parts = sum(self._inherit(flight, item) for item in batch
                           if item.size >= INHERIT_FROM)
        flight.fetching = {item.path: item for item in batch}
        flight.since = flight.heard = time.monotonic()
        flight.asked, flight.came = sum(item.size for item in batch), 0
        return batch

    def _open_files(self, flight: Flight) -> "List[Item]":
        """Files that are still to be fetched and that this holder has: first those that few others
        have, by path, and of these the large ones.  From where its turn is."""
        turn, after = flight.turn
        while turn <= 2 * len(self.flights) + 1:
            items = self.plan.page(flight.number, turn, after, flight.most)
            flight.turn = turn, after
            if items:
                return items
            turn, after = turn + 1, b""
        flight.turn = turn, after
        return []

    def _first_of(self, items: "List[Item]", flight: Flight) -> "List[Item]":
        """As many of these files as a holder gets at once."""
        rate, rates = flight.rate, [f.rate for f in self.flights if f.rate]
        share = rate / sum(rates) if rate and len(rates) > 1 else 1 / max(1, len(self.flights))
        limit = min(BATCH_BYTES, int(rate * BATCH_SECONDS) if rate else FIRST_BATCH,
                    int(self._left * share / 2))
        # A batch costs something, too.
        limit = max(limit, 1 << 20, min(BATCH_BYTES, int((rate or 0) * LEAST_SECONDS)))
        batch, size = [], 0
        for item in items:
            if batch and size + item.size > limit:
                break
            batch.append(item)
            size += item.size
        return batch

    def _slow_ones(self, flight: Flight) -> "Tuple[List[Item], bool]":
        """(files that another holder is fetching and that this one would deliver sooner, whether
        there may be such later): the later half of its list, which it comes to last."""
        waiting, now = False, time.monotonic()
        for other in self.flights:
            if other is flight or not (other.fetching or other.checking):
                continue
            waiting, elapsed = True, now - other.since
            pace = other.came / max(0.01, elapsed)
            left = other.asked - other.came  # what others took over it delivers all the same
            silent = now - other.heard > SILENT_AFTER
            if elapsed <= STEAL_AFTER or not silent and left <= 0:
                continue
            items = self.plan.places(flight.number,
                                     (other.fetching[path] for path in sorted(other.fetching)))
            items = items[len(items) // 2:]
            mine = sum(item.size for item in items) / max(1.0, flight.rate or pace)
            if items and (silent or mine < left / max(1.0, pace)):
                return items, True
        return [], waiting

    def _inherit(self, flight: Flight, item: Item) -> int:
        """Take over the part of a large file that came from a holder which does not go on with it.
        Returns how many bytes of it are there."""
        tree, each = self._target.tree, self.holders.each
        part = part_of(item.path)
        own = Work.staging(each[flight.number], flight.side, part)
        if tree.lstat(own) is None:
            at_work = {Work.staging(each[f.number], f.side): f.fetching for f in self.flights}
            for top in Work.all_staging(tree):
                if item.path not in at_work.get(top, ()) \
                        and tree.lstat(top + b"/" + part) is not None:
                    with contextlib.suppress(OSError):
                        tree.rename(top + b"/" + part, own)
                    break
        info = tree.lstat(own)
        return min(info.st_size, item.size) if info is not None else 0

    @staticmethod
    def _is_quicker_whole(flight: Flight) -> bool:
        """Whether a batch comes sooner from its beginning than behind the parts that are there:
        what is behind them is compared with them byte by byte."""
        if not flight.rate or not flight.parts:
            return False
        rest = (flight.asked - flight.parts) / min(flight.rate, COMPARE_RATE)
        return flight.asked / flight.rate < rest + flight.parts / DIGEST_RATE

    # -- what arrived --

    def _take(self, flight: Flight, batch: "List[Item]", outcome: Pull, top: bytes) -> None:
        """Check and put into place what arrived of a batch in `top`; the rest is open again."""
        holder = self.holders.each[flight.number]
        into = os.path.join(os.fsencode(self._target.path), top)
        again: "List[bytes]" = []
        without: "List[Tuple[bytes, bytes]]" = []
        placed: "List[Tuple[bytes, os.stat_result, Optional[bytes]]]" = []
        for item in batch:
            if item.path not in flight.checking:
                continue  # another holder was faster
            staged = top + b"/" + item.path
            try:
                right, info = self._target.check(staged, item)
                if right:
                    if self._put(flight, staged, item):
                        placed.append((item.path, info, item.digest))
                    continue
                if right is False:  # or rsync would take it for what it wants the next time
                    self._target.tree.unlink(staged)
            except OSError as error:
                self._refuse(flight, item, error.errno, reason_of(error))
                continue
            why = outcome.not_written(into, item.path) if outcome.errors else ""
            if why:
                self._refuse(flight, item, None, why)
                continue
            again.append(item.path)
            if self._is_its_fault(item, right, outcome):
                without.append((item.path, item.place))
                if right is False and not item.place.startswith(b"attic/"):
                    log.warning("%s: the copy of %s is damaged; taking another", holder.name,
                                shown(item.path))
                    self.plan.note(item.path, "the copy of %s is damaged" % holder.name)
        self._settle(flight, placed, again, without)

    def _refuse(self, flight: Flight, item: Item, number: "Optional[int]", why: str) -> None:
        """A file cannot be written or read here, whoever delivers it.  number: of the error.
        Raises CBackupError when nothing can be written any more."""
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise CBackupError("%s: %s" % (self._target.path, why))
        with self._changed:
            if flight.checking.pop(item.path, None):
                self.plan.set_state(item.path, 4, why)

    @staticmethod
    def _is_its_fault(item: Item, right: "Optional[bool]", outcome: Pull) -> bool:
        """Whether a file that is not there is not to be had from this holder."""
        if right is None:
            return outcome.went_through
        if item.path in outcome.parts:
            return False  # the part was of another version: now from the beginning
        # Cut off, a small file may lie torn under its own name.
        return outcome.went_through or item.size > PLAIN_BELOW

    def _put(self, flight: Flight, staged: bytes, item: Item) -> bool:
        """Into its place; when another holder has delivered it meanwhile, it is left where it is:
        False."""
        with self._changed:
            if item.path not in flight.checking:
                return False
            self._target.place(staged, item)
            self.files += 1
            self.bytes += item.size
            if item.path in self._twice:
                for other in self.flights:
                    other.fetching.pop(item.path, None)
                    other.checking.pop(item.path, None)
        return True

    def _settle(self, flight: Flight, placed: "List[Any]", again: "List[bytes]",
                without: "List[Tuple[bytes, bytes]]") -> None:
        """The end of a batch.  What did not arrive is for everybody, but for what another one has
        in hand already; `without`: this holder does not deliver it from that place after all."""
        self.plan.settle(row[0] for row in placed)
        if placed and self._target.tree.sync_at_once():
            self._done.add(placed)
        with self._changed:
            mine, flight.checking = flight.checking, {}
            again = [path for path in again if path in mine
                     and not any(path in f.fetching or path in f.checking for f in self.flights)]
            self.plan.open_again(flight.number, again, without)
            self._left += sum(mine[path].size for path in again)
            if again:
                for each in self.flights:
                    each.turn = 0, b""
            flight.arrived = len(placed)
            self._changed.notify_all()

    # -- a dry run --

    def measure(self, scratch: str) -> None:
        """The rate of each holder, all at once as in a restore: a first batch is fetched into
        `scratch`, and thrown away."""
        self._left = self.plan.open_all()
        in_parallel(functools.partial(self._try_out, scratch), self.flights)

    def _try_out(self, scratch: str, flight: Flight) -> None:
        holder = self.holders.each[flight.number]
        batch = self._first_of(self._open_files(flight), flight)
        into = os.fsencode(os.path.join(scratch, "files-%d" % flight.number))
        if not batch:
            return
        came = [(time.monotonic(), 0)]  # (when, bytes until then)

        def on_bytes(count: int) -> None:
            if count:
                came.append((time.monotonic(), came[-1][1] + count))
        try:
            holder.fetch(self.source, [(item.path, item.place) for item in batch], into,
                         max(item.size for item in batch), on_bytes)
            # Without the time until the first tenth is there: a connection is made once, not for
            # every 8 MB.
            begun, before = next(point for point in came if 10 * point[1] >= came[-1][1])
            flight.rate = max(1, came[-1][1] - before) / max(0.01, came[-1][0] - begun)
        except (CBackupError, OSError) as error:
            log.info("%s: %s", holder.name, reason_of(error))
            self._give_up_on(flight)
        shutil.rmtree(into, ignore_errors=True)

    def forecast(self) -> "Dict[int, Tuple[int, int, float]]":
        """holder -> (files, bytes, seconds): each file from the holder that is ready with it first,
        as `_next_batch` has it."""
        rates = {flight.number: flight.rate for flight in self.flights if flight.rate is not None}
        share = {number: (0, 0, 0.0) for number in rates}
        for _, size, holders in self.plan.each("open files and who has them"):
            able = [int(n) for n in holders.split(",") if int(n) in share]
            if able:
                best = min(able, key=lambda n: share[n][2] + size / rates[n])
                files, total, seconds = share[best]
                share[best] = files + 1, total + size, seconds + size / rates[best]
        return share


class Restore:
    """Brings a source, or parts of it, back from whichever backups can be reached.  May touch: the
    parts that it puts together."""

    def __init__(self, source: str, target: str, patterns: "List[str]", at: "Optional[float]",
                 force: bool, progress: Progress, directories: "Iterable[str]" = ()) -> None:
        """target: "" for a dry run that need not know it.  directories: backups mounted here."""
        self.source, self.at, self.progress = source, at, progress
        self.asked = Asked(patterns)
        self.holders = Holders(source, [DirectoryHolder(path, source) for path in directories])
        self.target = Target(target, force, progress)
        self.unmatched: "List[bytes]" = []
        self.counts = dict.fromkeys(("files", "bytes", "restored_files", "restored_bytes",
                                     "kept_files"), 0)
        self.catalog_time, self.catalog_from = 0, ""

    # -- what there should be, and who has it --

    def open_plan(self, work: str) -> None:
        """Make the plan in the directory `work`, with what is asked for of the newest catalog that
        can be had, and who has it."""
        self.plan = Plan(work)
        self.catalog_time, self.catalog_from = load_catalog(
            self.plan, self.holders, self.asked, self.at, work)
        self.unmatched = self.plan.select(self.asked)
        if self.unmatched and len(self.unmatched) == len(self.asked.patterns):
            raise CBackupError("nothing in %s matches %s" % (
                self.source, ", ".join(shown(p) for p in self.asked.patterns)))
        self.counts["files"], self.counts["bytes"] = self.plan.count("files")
        self._find_holders()

    def _find_holders(self) -> None:
        """Enter who has what is wanted.  Older versions count as well where no copy is the wanted
        one: it was updated after the newest catalog that can be had."""
        prefixes, kinds = self.asked.prefixes(), (False,) if self.at is None else (False, True)
        if prefixes is not None:
            self._ask_holders(prefixes, kinds)
        if prefixes is None or self.plan.count("files of nobody")[0]:
            self._ask_holders([b""], kinds)
        self.plan.match_renamed()
        if self.at is None and self.plan.count("files of nobody")[0]:
            self._ask_holders(prefixes or [b""], (True,))
            self.plan.match_renamed()

    def _ask_holders(self, prefixes: "List[bytes]", kinds: "Iterable[bool]") -> None:
        """Enter what the holders have of paths that begin so: copies (False), older versions."""
        few = self._few_wanted()
        for number, holder in enumerate(self.holders.each):
            self.progress.say("asking %s what it holds of %s" % (holder.name, self.source))
            try:
                for prefix, old in itertools.product(prefixes, kinds):
                    rows = holder.holdings(self.source, old, prefix)
                    if few is not None:
                        rows = (row for row in rows if row[0] in few or row[4] in few
                                or row[4] is None and row[2:4] in few)
                    self.plan.enter_holdings(number, rows)
            except (Unreachable, Refused, ProtocolError, OSError) as error:
                self.holders.lose(number)
                log.warning("%s: %s", holder.name, error)
        self.plan.match()

    def _few_wanted(self) -> "Optional[set[Any]]":
        """When only some files of a source are asked for: their paths, digests, and (size, mtime);
        what has none of these is of no use.  None: too many to keep them in memory."""
        if not self.asked.patterns or self.counts["files"] > FEW_FILES:
            return None
        few: "set[Any]" = set()
        for path, digest, size, mtime in self.plan.each("files and their versions"):
            few |= {path, digest, (size, mtime)}
        return few - {None}

    # -- the whole --

    def run(self, whole: bool) -> bool:
        """Restore into the target.  Returns whether everything that was asked for is there now."""
        target = self.target
        fresh = not os.path.isdir(target.path)
        os.makedirs(target.path, exist_ok=True)
        work = Work(target.path)
        made = work.make()
        with work.locked():
            try:
                self.open_plan(work.path)
                if whole:
                    self._check_room()
            except CBackupError:
                if made:  # nothing has been done, and nothing of an earlier run is in it
                    work.remove()
                    with contextlib.suppress(OSError):
                        os.rmdir(target.path) if fresh else None
                raise
            log.info("restoring %s into %s, as of %s, with the catalog of %s", self.source,
                     target.path, format_time(self.catalog_time), self.catalog_from)
            if whole:
                work.mark()
            with target.opened() as tree:
                complete = self._bring_back(work, tree)
                parts = any(True for _ in work.arrived(tree))
            if complete and whole or not work.is_marked() and (complete or not parts):
                why = work.remove()
                if why:
                    target.metadata.note("%s could not be removed (%s)" % (work.path, why))
        target.finish()
        return complete

    def _bring_back(self, work: Work, tree: Tree) -> bool:
        plan, target, done = self.plan, self.target, Done(work.path)
        schedule = Schedule(self.source, plan, self.holders, self.progress)
        target.leave_out_folded(plan)
        self.counts["kept_files"] = target.prepare(plan, done)
        known = self.counts["kept_files"], self.counts["files"]
        work.keep_parts(tree, plan)
        plan.lead_links()
        schedule.fetch_all(target, done, known)
        while plan.lead_other_links():
            schedule.fetch_all(target, done, known)
        done.close()
        self.counts["restored_files"] = schedule.files + target.links(plan)
        self.counts["restored_bytes"] = schedule.bytes
        target.symlinks(plan)
        target.directories(plan)
        tree.sync_all()  # before the source is no longer held
        plan.end()
        return not self.unmatched and not self.missing_count() and not self.in_the_way()

    def room(self) -> "Tuple[int, int]":
        """(bytes that the files need which have to be fetched, bytes that are free at the target).
        What is there with the right size is not fetched again, as far as one can tell without
        reading it, nor what an earlier run has begun."""
        needed, free = self.plan.needed(), self.target.free()
        if needed > free:
            needed -= self.target.there(self.plan)
        return max(0, needed), free

    def _check_room(self) -> None:
        """Before anything is written: what cannot end well is not begun."""
        needed, free = self.room()
        if needed > free:
            raise CBackupError(
                "%s has no space for all of %s: %s are needed, %s are free; make room, say --to "
                "for another disk, or name the PATHs to begin with ('*' tries all of it)" % (
                    self.target.path, self.source, format_size(needed), format_size(free)))

    def dry_run(self, scratch: str) -> "Dict[str, Any]":
        """What `run` would do, without writing anything but in `scratch`: files that are there
        already by size and time, that are in the way, that nobody has; what each holder would
        deliver at its measured rate (bytes a second), and for how long (seconds)."""
        self.open_plan(scratch)
        there, differ = self.target.count(self.plan)
        self.plan.lead_links()
        needed, free = self.room() if self.target.path else (self.counts["bytes"], None)
        schedule = Schedule(self.source, self.plan, self.holders, self.progress)
        schedule.measure(scratch)
        share = schedule.forecast()
        seconds = max([seconds for _, _, seconds in share.values()], default=0.0)
        missing = self.plan.count("open files of nobody")[0]
        return {"needed_bytes": needed, "free_bytes": free, "kept_files": there,
                "refused_files": differ, "missing_files": missing, "seconds": round(seconds, 1),
                "holders": {self.holders.each[n].name: {
                    "files": files, "bytes": size, "rate": int(schedule.flights[n].rate or 0)}
                    for n, (files, size, _) in sorted(share.items())}}

    def planned(self) -> "Iterator[Tuple[bytes, int, str]]":
        """(path, size, what becomes of it) of each file, after `dry_run`."""
        for path, size, state, had in self.plan.each("files and their states"):
            word = {1: "there", 3: "link", 4: "in way"}.get(state, "fetch" if had else "MISSING")
            yield path, size, word

    # -- what became of it --

    def missing(self) -> "Iterator[Tuple[bytes, str]]":
        """(path, reason) of what could not be restored."""
        for pattern in self.unmatched:
            yield pattern, "nothing in %s is called so, or matches it" % self.source
        for path, state, note, *facts in self.plan.each("missing or refused"):
            if state == 5:
                yield path, self._why_missing(note, *facts)
            else:
                yield path, note or "a different file is there; --force moves it aside"

    def _why_missing(self, note: "Optional[str]", holders: str, readable: int,
                     others: "Optional[str]") -> str:
        """holders: the backups that had it by the catalog; others: the numbers of holders with
        other versions, both with commas."""
        down, each = self.holders.down, self.holders.each
        if holders:
            up = {holder.backup: holder.name for holder in each}
            known = ["%s (not reachable)" % down[name] if name in down else "%s (%s)" % (
                up.get(name, name), "it has no good copy now" if name in up
                else "no longer in the configuration") for name in holders.split(",")]
            return "its last known holders: %s%s" % (", ".join(known), "; " + note if note else "")
        if not readable:
            why = "its own host could not read it, so that it was never backed up"
        elif others:
            why = "only other versions of it are at hand (%s)" % ", ".join(
                sorted(each[int(number)].name for number in others.split(",")))
        else:
            why = "no backup is known to have had it: not copied yet when the catalog was made"
        return why + self.holders.unreachable()

    def unproven(self) -> "Iterator[bytes]":
        """Files that were brought back although the catalog does not call their contents proven."""
        return (path for path, _ in self.plan.each("unproven"))

    def unproven_count(self) -> int:
        return self.plan.count("unproven")[0]

    def unreadable(self) -> "Iterator[bytes]":
        """Files that the source's host could not read when the catalog was made: missing, or of
        before."""
        return (path for path, _ in self.plan.each("unreadable"))

    def in_the_way(self) -> int:
        return self.plan.count("refused")[0]

    def missing_count(self) -> int:
        return self.plan.count("missing")[0]


def load_catalog(plan: Plan, holders: Holders, asked: Asked, at: "Optional[float]", work: str,
                 ) -> "Tuple[int, str]":
    """Load the newest catalog (not newer than `at`) that can be had.  Returns its time, and from
    whom it is."""
    for when, number, chain in holders.catalogs(at):
        holder = holders.each[number]
        scratch = os.path.join(work, "catalog-%d" % number)
        try:
            paths = holder.catalog_paths(holders.source, chain, scratch)
            plan.load((read_catalog(path, asked.lines()) for path in paths), asked)
            return when, holder.name
        except (UsageError, OwnFailure):
            raise
        except (CBackupError, OSError) as error:
            log.warning("the catalog of %s: %s", holder.name, error)
    raise holders.no_catalog(at)


# ==== 15. Status and demo =========================================================================


def ask_all(dialer: Dialer, config: Config, hosts: "Iterable[str]", op: str, **fields: Any,
            ) -> "Tuple[Dict[str, Dict[str, Any]], Dict[str, str]]":
    """The same request to several servers at once: (host -> answer, host -> why there is none)."""
    lock = threading.Lock()
    answers: "Dict[str, Dict[str, Any]]" = {}
    down: "Dict[str, str]" = {}

    def ask(host: str) -> None:
        link = Link(host, config, dialer)
        try:
            answer = link.call(op, **fields)
            with lock:
                answers[host] = answer
        except (Unreachable, Refused) as error:
            with lock:
                down[host] = str(error)
        finally:
            link.done()

    in_parallel(ask, hosts, Progress())
    return answers, down


def collect_status(home: Home, config: Config, down: "Iterable[str]" = (),
                   dialer: "Optional[Dialer]" = None,
                   ) -> "Dict[str, Any]":
    """What is safe and what is not, from all servers that answer, and from what the others said
    last (kept in `state/`).

    `down`: hosts that are not to be asked, because they were just found not to answer.  `hosts` in
    what is returned: for each, the seconds since its server answered here (`answered`), and since
    it or a backup of it was heard of by anybody (`silent`); None: never.
    """
    hosts = sorted({s.host for s in config.sources.values()}
                   | {b.host for b in config.backups.values()})
    answers = ask_all(dialer or Dialer(home), config, sorted(set(hosts) - set(down)), "status")[0]
    then = {host: _aged(answer, ago) for host, (ago, answer) in home.last_answers().items()
            if host not in answers and not misfit(answer, OPERATIONS["status"].answer)}
    home.note_answers(answers, hosts)
    sources = {name: dict(_source_status(spec, answers.get(spec.host), then.get(spec.host)),
                          impossible=config.too_few_hosts(spec))
               for name, spec in sorted(config.sources.items())}
    backups = {name: _backup_status(spec, config, answers, then)
               for name, spec in sorted(config.backups.items())}
    answered = {host: 0.0 if host in answers else then[host]["age"] if host in then else None
                for host in hosts}
    heard = {host: [age for age in [answered[host]]
                    + [b["last_seen"] for b in backups.values() if b["host"] == host]
                    if age is not None] for host in hosts}
    return {"cluster": config.name, "config_version": home.config_state().get("version", 0),
            "sources": sources,
            "backups": backups,
            "unreachable": sorted(host for host in hosts if host not in answers),
            "hosts": {host: {"answered": answered[host], "silent": min(ages, default=None)}
                      for host, ages in heard.items()},
            "warn_after": config.warn_after, "conflicts": home.conflicts(), "warnings": [
                line for host in hosts
                for line in shared_disks(answers.get(host, {}).get("mine", {}), host)],
            "config_held": _held_configs(home, answers),
            "config_age": max(0.0, clock.now() - home.config_state().get("stamp", clock.now()))}


def _held_configs(home: Home, answers: "Dict[str, Dict[str, Any]]") -> "Dict[str, List[str]]":
    """What a held configuration removes -> the hosts that hold it back."""
    found: "Dict[str, List[str]]" = {}
    held = {host: answer["config_held"] for host, answer in answers.items()
            if answer.get("config_held")}
    if home.held_config():  # also where no server runs
        held[home.own_name()] = home.held_config()["removes"]
    for host, removes in sorted(held.items()):
        found.setdefault(removes, []).append(host)
    return found


HELD_CHANGES = {"gone": "is gone", "changed": "has changed"}


def held_files_of(link: Link, source: str) -> "Iterator[Tuple[str, str]]":
    """(path, "gone" or "changed") of all files for which a source is held.  A server that is older
    names none."""
    after = ""
    while True:
        try:
            answer = link.call("held_files", source=source, after=after)
        except (Refused, ProtocolError):
            return
        rows = answer["rows"]
        yield from rows
        if not rows or not answer.get("more", len(rows) == PAGE):
            return
        after = rows[-1][0]


def print_held_files(rows: "Iterable[Iterable[str]]", most: "Optional[int]",
                     indent: str = "") -> int:
    """Print the first files for which a source is held, or all (`most` None); returns how many
    there are."""
    count = 0
    for count, (path, change) in enumerate(rows, 1):
        if most is None or count <= most:
            print("%s%s %s" % (indent, shown(as_raw(path)), HELD_CHANGES[change]))
    if most is not None and count > most:
        print("%sand more: -v names all" % indent)
    return count


def _aged(answer: "Dict[str, Any]", ago: float) -> "Dict[str, Any]":
    """What a server said some time ago (`age`), with all that counts from a moment that much
    older."""
    def older(facts: "Dict[str, Any]", key: str) -> "Dict[str, Any]":
        return facts if facts.get(key) is None else dict(facts, **{key: facts[key] + ago})
    sources = {name: older(older(s, "last_scan"), "unproven_since")
               for name, s in answer["sources"].items()}
    return dict(answer, age=ago, sources=sources,
                backups=[older(words, "age") for words in answer["backups"]])


def _source_status(spec: Source, answer: "Optional[Dict[str, Any]]",
                   then: "Optional[Dict[str, Any]]") -> "Dict[str, Any]":
    """From its server; when that does not answer, what it said last is `then` (None when it never
    did)."""
    out: "Dict[str, Any]" = {"host": spec.host, "path": spec.path, "replicas": spec.replicas,
                             "files": None, "bytes": None,
                             "copies": {}, "underserved_files": None, "underserved_bytes": None,
                             "overserved_files": None,
                             "state": "unreachable", "last_scan": None, "unproven_files": None,
                             "unproven_since": None,
                             "then": None, "unknown": False}
    found = (answer or {}).get("sources", {}).get(spec.name)
    if found:
        for key in ("replicas", "files", "bytes", "copies", "underserved_files",
                    "underserved_bytes", "overserved_files",
                    "short_since", "state", "last_scan", "reason", "cause", "special", "problems",
                    "short", "stuck", "late",
                    "failed", "held_files", "unproven_files", "unproven_since"):
            out[key] = found.get(key)
    elif answer:
        out["unknown"] = True
    elif then and spec.name in then["sources"]:
        out["then"] = dict(_source_status(spec, then, None), impossible="")
    return out


def _backup_status(spec: Backup, config: Config, answers: "Dict[str, Dict[str, Any]]",
                   then: "Dict[str, Dict[str, Any]]") -> "Dict[str, Any]":
    """From its own host when that is up, else from the last words that the others remember."""
    out: "Dict[str, Any]" = {"host": spec.host, "path": spec.path, "capacity": spec.size,
                             "used": None, "files": None,
                             "last_seen": None, "state": "ok" if spec.host in answers
                             else "unreachable"}
    for answer in list(answers.values()) + list(then.values()):
        for words in answer["backups"]:
            if words["name"] == spec.name and words.get("age") is not None \
                    and (out["last_seen"] is None or words["age"] < out["last_seen"]):
                out.update(last_seen=words["age"], capacity=words["capacity"], used=words["used"],
                           files=words["files"])
                if words.get("lost") and out["state"] == "unreachable":
                    out["state"] = "lost"
    out.update(answers.get(spec.host, {}).get("mine", {}).get(spec.name, {}))
    if spec.leaving:
        counts = [answers.get(host, {}).get("duties", {}).get(spec.name)
                  for host in {s.host for s in config.sources.values()}]
        out.update(leaving=True, duties=None if None in counts else sum(counts))
    return out


class Verdict:
    """What everything that is known comes to.  `trouble`: why it is not safe, a sentence each;
    `pending`: those of them that the next passes are expected to mend, or that another machine's
    passes report, so that a pass says nothing of them; `remarks`: what else one should know.  The
    same sentences everywhere: in `status`, in its --check, in each pass."""

    def __init__(self, trouble: "Iterable[str]" = (),
                 at_most: "Optional[Dict[str, float]]" = None) -> None:
        self.trouble = list(trouble)
        self.pending: "List[str]" = []
        self.remarks: "List[str]" = []
        self.at_most = at_most or {}  # trouble -> seconds: it cannot have lasted longer

    @property
    def safe(self) -> bool:
        return not self.trouble

    def wrong(self, line: str, pending: bool = False) -> None:
        """A reason why it is not safe."""
        self.trouble.append(line)
        if pending:
            self.pending.append(line)

    def note(self, line: str) -> None:
        if line not in self.remarks:
            self.remarks.append(line)

    def lasting(self) -> "List[str]":
        """The trouble that a pass reports."""
        return [line for line in self.trouble if line not in self.pending]


def verdict(status: "Dict[str, Any]") -> Verdict:
    """Whether everything is safe, and why not.  `status`: what `collect_status` returns."""
    found = Verdict()
    if not status["sources"]:
        found.wrong("no source is configured: nothing is backed up")
    for removes, hosts in status["config_held"].items():
        found.wrong(held_config_text(hosts, removes))
    for name, s in status["sources"].items():
        _judge_source(found, name, s, status)
        _judge_proof(found, name, s["then"] or s, status["warn_after"])
    for name, b in status["backups"].items():
        _judge_backup(found, name, b, status)
    for line in status["warnings"] + [
            "%s: an edit made here lost against one made elsewhere at the same time; merge it and "
            "delete it" % name
            for name in status["conflicts"]]:
        found.note(line)
    return found


def _judge_source(found: Verdict, name: str, s: "Dict[str, Any]", status: "Dict[str, Any]") -> None:
    """Enter what is wrong with a source, as its server says now, or said when it was last awake."""
    if s["unknown"]:
        found.wrong("%s is not known to its server on %s: is its configuration the same?"
                    % (name, s["host"]), pending=True)
    elif s["state"] != "unreachable":
        for line, pending in source_trouble(name, s):
            found.wrong(line, pending)
            if pending and s["underserved_files"] and s.get("short_since") is not None:
                found.at_most[line] = s["short_since"]
    elif s["then"] is None:
        found.wrong("%s is unreachable: its server on %s does not answer, and nothing is known of "
                    "it here" % (name, s["host"]),
                    pending=True)  # the pass has said that it does not answer
    elif status["hosts"][s["host"]]["answered"] > status["warn_after"]:
        found.wrong("%s was last heard of %s ago, and nothing is known of %s since" % (
            s["host"], format_age(status["hosts"][s["host"]]["answered"]), name))
    else:
        asleep = "%s asleep since %s" % (s["host"],
                                         format_age(status["hosts"][s["host"]]["answered"]))
        before = source_trouble(name, s["then"])
        for line, pending in before:
            found.wrong("%s; then: %s" % (asleep, line), pending)
        if not before:
            found.note(asleep + "; safe then")


def source_trouble(name: str, s: "Dict[str, Any]") -> "List[Tuple[str, bool]]":
    """Why a source is not safe: (a sentence, whether the next passes are expected to mend it).
    `s`: of `_source_status`."""
    out = []
    if s["state"] == "held":
        out.append(("%s is held: %s" % (name, held_advice(name, s)), False))
    if s["last_scan"] is None:
        out.append(("%s has not been looked at yet" % name, s["state"] != "held"))
    elif s["underserved_files"]:
        out.append(("%s of %s in %s have fewer than %d copies%s" % (
            format(s["underserved_files"], ","), count_of(s["files"], "file"), name, s["replicas"],
            s["impossible"] and " (%s)" % s["impossible"]), True))
    if s["failed"]:
        out.append(("%s cannot be looked at: %s; what has changed since is not backed up"
                    % (name, s["failed"]), False))
    elif s["late"]:
        out.append(("%s was last looked at %s ago, which is too long"
                    % (name, format_age(s["last_scan"])), False))
    for facts, word, what in ((s["problems"], "path", "could not be read"),
                              (s["stuck"] or {}, "file", "cannot be copied")):
        if facts.get("count"):
            some = facts["some"][:3]
            out.append(("%s: %s %s: %s%s"
                        % (name, count_of(facts["count"], word), what, ", ".join(some),
                           ", ..." if facts["count"] > len(some) else ""), False))
    return out


def without_named(status: "Dict[str, Any]", lines: "List[str]") -> None:
    """Take out of a status the files that a pass could not copy, and named itself just now in these
    lines."""
    for name, s in status["sources"].items():
        stuck = s.get("stuck") or {"some": [], "count": 0}
        rest = [line for line in stuck["some"]
                if not any(said.endswith(": %s: %s" % (name, line)) for said in lines)]
        s["stuck"] = {"some": rest, "count": stuck["count"] - len(stuck["some"]) + len(rest)}


def _judge_backup(found: Verdict, name: str, b: "Dict[str, Any]", status: "Dict[str, Any]") -> None:
    """Enter what is wrong with a backup.  Its own machine's passes report what is wrong with its
    disk, other machines' that it is silent while its host cannot be reached."""
    silent = b["last_seen"] if b["state"] not in ("unreachable",
                                                  "lost") else status["hosts"][b["host"]]["silent"]
    here = "%s on %s" % (name, b["host"])
    if b["state"] not in ("ok", "unreachable", "lost") and not b.get("new"):
        found.wrong("%s: %s" % (here, b["state"]), pending=True)
    if silent is None:
        if status["config_age"] > status["warn_after"]:
            found.wrong("%s has not been heard of yet: does its client run?" % here,
                        pending=b["state"] != "unreachable")
    elif silent > status["warn_after"]:
        found.wrong("%s was last heard of %s ago%s" % (
            here, format_age(silent), ", and its copies no longer count" if b["state"] == "lost"
            else ""),
            pending=b["state"] not in ("unreachable", "lost"))
    elif b["state"] in ("unreachable", "lost") and not any(
            line.startswith(b["host"] + " asleep since ")
            for line in found.remarks + found.trouble):
        found.note("%s asleep since %s" % (b["host"], format_age(silent)))


def _judge_proof(found: Verdict, name: str, s: "Dict[str, Any]", warn_after: float) -> None:
    """Files that are only presumed to have their copies: for a while that is as good as safe."""
    if not s.get("unproven_files") or s.get("unproven_since") is None:
        return
    line = "%s of %s are still being compared with their copies, since %s" % (
        count_of(s["unproven_files"], "file"), name, format_seconds(s["unproven_since"]))
    if s["unproven_since"] > warn_after:
        found.wrong(line + ": its server reads too slowly, or cannot read them")
    else:
        found.note(line)


def print_status(status: "Dict[str, Any]", links: "Dict[str, Link]") -> None:
    """links: host -> Link where all files are to be listed for which a source is held."""
    if not status["sources"]:
        print("No source is configured: nothing is backed up.")
    for removes, hosts in status["config_held"].items():
        print(held_config_text(hosts, removes))
    for name in status["sources"]:
        print_source(status, name, links)
    for name in status["backups"]:
        print_backup(status, name)
    for line in verdict(status).remarks:
        print(line)


def print_source(status: "Dict[str, Any]", name: str, links: "Dict[str, Link]") -> None:
    s = status["sources"][name]
    print("%s  (%s:%s)" % (name, s["host"], s["path"]))
    if s["impossible"]:
        print(tint("wrong", "    IMPOSSIBLE: %s" % s["impossible"]))
    if s["state"] == "unreachable" and s["then"]:
        print("    its server does not answer; what it said %s ago:"
              % format_age(status["hosts"][s["host"]]["answered"]))
        s = s["then"]
    if s["state"] == "unreachable":
        print("    its server %s"
              % ("does not know it: is its configuration the same?" if s["unknown"] else
                 "does not answer: nothing is known of it from here"))
        return
    if s["state"] == "held":
        print(tint("wrong", "    HELD, nothing changes in the backups: %s"
                   % held_advice(name, s)))
        rows = held_files_of(links[s["host"]],
                             name) if s["host"] in links else s.get("held_files") or []
        print_held_files(rows, None if links else 5, " " * 8)
    if s["last_scan"] is None and s["state"] != "held":
        print(tint("wait", "    it has not been looked at yet"))
        return
    print("    %s, %s; %d copies wanted"
          % (count_of(s["files"], "file"), format_size(s["bytes"]), s["replicas"]))
    if s["underserved_files"]:
        print(tint("wait", "    NOT SAFE YET: %s (%s) with fewer copies: %s" % (
            count_of(s["underserved_files"], "file"), format_size(s["underserved_bytes"]),
            ", ".join("%s with %s" % (format(n, ","), k) for k, n in s["copies"].items()
                      if int(k) < s["replicas"]))))
        for path, size, why in s["short"][:5]:
            print("        %s, %s%s"
                  % (shown(as_raw(path)), format_size(size), ": " + why if why else ""))
    elif s["files"] and not source_trouble(name, s):
        print(tint("well", "    all safe"
                   + ("" if not s.get("unproven_files") else ", as far as is known")))
    for facts, what in ((s["problems"], "could not be read: %s"),
                        (s["stuck"] or {}, "cannot be copied: %s")):
        for line in facts.get("some", []):
            print("    " + what % line)
        if facts.get("count", 0) > len(facts.get("some", [])):
            print("    " + what % "and %d more" % (facts["count"] - len(facts["some"])))


def print_backup(status: "Dict[str, Any]", name: str) -> None:
    b = status["backups"][name]
    seen = "never heard of" if b["last_seen"] is None \
        else "heard of %s ago" % format_seconds(b["last_seen"])
    figures = "" if b["used"] is None or b["capacity"] is None else ", %s of %s used, %s" % (
        format_size(b["used"]), format_size(b["capacity"]), count_of(b["files"] or 0, "file"))
    print("%s  (%s:%s)  %s%s, %s" % (name, b["host"], b["path"], b["state"], figures, seen))
    for source, files in sorted(b.get("sources", {}).items()):
        if source not in status["sources"]:
            print("    has %s of %s, which is no longer configured; `cbackup.pyz restore %s "
                  "--to DIR` brings them back, `cbackup.pyz forget %s` deletes them"
                  % (count_of(files, "file"), source, source, source))
    if b.get("leaving"):
        duties = b["duties"]
        needed = "it is not known what is" if duties is None \
            else count_of(duties, "copy" if duties == 1 else "copie")
        print("    leaving: %s"
              % ("it can be unplugged now" if duties == 0 else "%s still needed here" % needed))


def check_line(status: "Dict[str, Any]") -> str:
    """The one line of `status --check`."""
    found = verdict(status)
    if not found.safe:
        return tint("wrong" if found.lasting() else "wait",
                    "NOT SAFE") + ": " + "; ".join(found.trouble)
    files = sum((s["then"] or s)["files"] for s in status["sources"].values())
    return "; ".join([tint("well", "safe") + ": %s of %s have all their copies" % (
        count_of(files, "file"), count_of(len(status["sources"]), "source"))] + found.remarks)


def bytes_that_fit(sources: "Iterable[Tuple[str, int, int]]", rooms: "Dict[str, int]") -> int:
    """How many bytes of copies find room, if files could be divided.  sources: (own host, replicas,
    bytes); rooms: host -> bytes.  A host takes nothing of its own sources, and of another's at most
    one copy.

    A largest flow: from each source to each host at most the source's bytes, from each host on at
    most its room.
    """
    left, given, total = dict(rooms), [], 0
    for own, replicas, size in sources:
        given.append(dict.fromkeys((host for host in rooms if host != own), 0))
        need = replicas * size
        while need > 0:
            # The shortest way to a host with room: straight, or by moving bytes of other sources
            # elsewhere.
            came: "Dict[Any, Any]" = {len(given) - 1: None}
            queue: "List[Any]" = [len(given) - 1]
            end = None
            for at in queue:
                if isinstance(at, int):
                    onward = [host for host, bytes_there in given[at].items()
                              if bytes_there < _size_of(sources, at)]
                elif left[at] > 0:
                    end = at
                    break
                else:
                    onward = [number for number in range(len(given)) if given[number].get(at)]
                for following in onward:
                    if following not in came:
                        came[following] = at
                        queue.append(following)
            if end is None:
                break
            steps, at = [], end
            while came[at] is not None:
                steps.append((came[at], at))
                at = came[at]
            amount = min([need, left[end]] + [
                _size_of(sources, a) - given[a][b] if isinstance(a, int) else given[b][a]
                for a, b in steps])
            for a, b in steps:
                if isinstance(a, int):
                    given[a][b] += amount
                else:
                    given[b][a] -= amount
            left[end] -= amount
            need -= amount
            total += amount
    return total


def _size_of(sources: "Any", number: int) -> int:
    return sources[number][2]


def collect_plan(home: Home, config: Config) -> "Dict[str, Any]":
    """Whether everything fits, and what the loss of each host means: the object that `plan --json`
    prints.

    `fits` is None when that is not known, because a server does not answer or a source was not
    looked at yet; `tight`: it fits only if whole files happen to go in.  `short_bytes`: the room
    that is missing, `missing_hosts`: how many more hosts with a backup are, whatever the room.
    """
    hosts = {s.host for s in config.sources.values()} | {b.host for b in config.backups.values()}
    answers, down = ask_all(Dialer(home), config, sorted(hosts), "plan")
    backups = {name: _planned_backup(spec, answers)
               for name, spec in sorted(config.backups.items())}
    sources = {name: _planned_source(spec, config, answers, backups)
               for name, spec in sorted(config.sources.items())}
    known = {name: s for name, s in sources.items() if s["bytes"] is not None}
    rooms, sure = _rooms(backups.values()), _rooms(b for b in backups.values()
                                                   if b["state"] == "ok")
    others = {name: len({b["host"] for b in backups.values() if not b["leaving"]} - {s["host"]})
              for name, s in sources.items()}
    lacking = {name: s["replicas"] - others[name] for name, s in sources.items()
               if s["replicas"] > others[name]}
    needs = [(s["host"], min(s["replicas"], others[name]), s["bytes"]) for name, s in known.items()]
    largest = max([s["largest_bytes"] for s in known.values()], default=0)
    needed, fit = sum(replicas * size for _, replicas, size in needs), bytes_that_fit(needs, rooms)
    fits: "Optional[bool]" = bytes_that_fit(needs, sure) == needed \
        and not any(s["problems"] for s in known.values())
    unsure = any(b["capacity"] is None for b in backups.values())
    if not lacking and (len(known) < len(sources) or not sources) and (fits or not known):
        fits = None
    elif not fits and not lacking and (unsure or fit == needed and sure != rooms):
        fits = None
    return {"cluster": config.name, "fits": fits,
            "needed_bytes": sum(s["needed_bytes"] for s in known.values()),
            "offered_bytes": sum(rooms.values()), "short_bytes": needed - fit,
            "missing_hosts": max(lacking.values(), default=0),
            "tight": fit == needed and needed > bytes_that_fit(
                needs, {host: max(0, room - largest) for host, room in rooms.items()}),
            "sources": sources, "backups": backups, "unreachable": sorted(down),
            "hosts": {host: _planned_loss(host, sources, rooms) for host in sorted(hosts)}}


def _rooms(backups: "Iterable[Dict[str, Any]]") -> "Dict[str, int]":
    """host -> the bytes that its backups offer together."""
    rooms: "Dict[str, int]" = {}
    for b in backups:
        if b["capacity"] is not None and not b["leaving"]:
            rooms[b["host"]] = rooms.get(b["host"], 0) + b["capacity"]
    return rooms


def _planned_backup(spec: Backup, answers: "Dict[str, Dict[str, Any]]") -> "Dict[str, Any]":
    found = answers.get(spec.host, {}).get("rooms", {}).get(spec.name, {})
    return {"host": spec.host, "path": spec.path, "capacity": found.get("capacity", spec.size),
            "used": found.get("used"),
            "leaving": spec.leaving, "state": "ok" if found else "unreachable"}


def _planned_source(spec: Source, config: Config, answers: "Dict[str, Dict[str, Any]]",
                    backups: "Dict[str, Dict[str, Any]]") -> "Dict[str, Any]":
    out: "Dict[str, Any]" = {"host": spec.host, "path": spec.path, "replicas": spec.replicas,
                             "files": None, "bytes": None,
                             "needed_bytes": None, "largest_bytes": None, "largest_path": None,
                             "problems": []}
    found = answers.get(spec.host, {}).get("sources", {}).get(spec.name)
    if not found or not found["scanned"]:
        return out
    out.update(files=found["files"], bytes=found["bytes"],
               needed_bytes=spec.replicas * found["bytes"],
               largest_bytes=found["largest"][0], largest_path=found["largest"][1],
               bare=found["bare"],
               without=found["without"])
    others = {b["host"] for b in backups.values() if b["host"] != spec.host and not b["leaving"]}
    able = {b["host"] for b in backups.values() if b["host"] in others and not b["leaving"]
            and b["capacity"] is not None
            and b["capacity"] >= out["largest_bytes"]}
    out["hosts_for_largest"] = len(able)
    if config.too_few_hosts(spec):
        out["problems"].append(config.too_few_hosts(spec))
    elif len(able) < spec.replicas:
        out["problems"].append("the largest file, %s with %s, is larger than the backups: they can "
                               "hold it on only %s"
                               % (shown(as_raw(out["largest_path"])),
                                  format_size(out["largest_bytes"]),
                                   count_of(len(able), "host")))
    return out


def _planned_loss(host: str, sources: "Dict[str, Dict[str, Any]]",
                  rooms: "Dict[str, int]") -> "Dict[str, Any]":
    """What is lost for good (own files without any copy), what becomes short of copies, and whether
    the other hosts have the room to make these again, if `host` dies now.  `unknown`: sources of
    which that cannot be said."""
    known = {name: s for name, s in sources.items() if s["bytes"] is not None}
    here = [s for s in known.values() if s["host"] == host]
    others = [s for s in known.values() if s["host"] != host]
    needs = [(s["host"], s["replicas"], s["bytes"]) for s in others]
    left = {name: room for name, room in rooms.items() if name != host}
    missing = sum(replicas * size for _, replicas, size in needs) - bytes_that_fit(needs, left)
    return {"lost_files": sum(s["bare"][0] for s in here),
            "lost_bytes": sum(s["bare"][1] for s in here),
            "short_files": sum(s["without"].get(host, (0, 0))[0] for s in others),
            "short_bytes": sum(s["without"].get(host, (0, 0))[1] for s in others),
            "room": missing == 0, "room_missing_bytes": missing,
            "missing_hosts": max([replicas - len(set(left) - {own}) for own, replicas, _ in needs]
                                 + [0]),
            "unknown": sorted(name for name, s in sources.items() if s["bytes"] is None),
            "sources": sorted(name for name, s in sources.items() if s["host"] == host)}


def print_plan(plan: "Dict[str, Any]") -> None:
    for name, s in plan["sources"].items():
        print("%s  (%s:%s)" % (name, s["host"], s["path"]))
        if s["bytes"] is None:
            print("    its size is unknown: %s"
                  % ("its server does not answer" if s["host"] in plan["unreachable"]
                       else "it has not been looked at yet"))
            continue
        print("    %s, %s; with %s of each %s" % (
            count_of(s["files"], "file"), format_size(s["bytes"]),
            "%d copies" % s["replicas"] if s["replicas"] > 1 else "1 copy",
            format_size(s["needed_bytes"])))
        if s["files"]:
            print("    the largest file: %s, %s"
                  % (shown(as_raw(s["largest_path"])), format_size(s["largest_bytes"])))
        for line in s["problems"]:
            print("    DOES NOT FIT: %s" % line)
    for name, b in plan["backups"].items():
        print("%s  (%s:%s)  %s%s%s" % (
            name, b["host"], b["path"],
            "what it offers is unknown" if b["capacity"] is None else
            "offers %s%s" % ("" if b["state"] == "ok" else "at most ", format_size(b["capacity"])),
            "" if b["used"] is None else ", %s used" % format_size(b["used"]),
            ", but it is leaving" if b["leaving"] else "" if b["state"] == "ok" else
            ", and how much of it is there is unknown: its server does not answer"))
    print("\n" + plan_verdict(plan))
    print("\nIf one host dies now:")
    for host, loss in plan["hosts"].items():
        print("    %s: %s" % (host, plan_loss_text(loss)))


def plan_verdict(plan: "Dict[str, Any]") -> str:
    figures = "%s are needed, %s are offered" % (format_size(plan["needed_bytes"]),
                                                 format_size(plan["offered_bytes"]))
    if not plan["sources"]:
        return "No source is configured: there is nothing that could fit or not."
    if plan["missing_hosts"]:
        return "It does NOT fit: %s with a backup %s missing (copies count on different hosts)" \
            "%s %s." % (
            count_of(plan["missing_hosts"], "more host"), "is" if plan["missing_hosts"] == 1
            else "are",
            ", and so is room for %s:" % format_size(plan["short_bytes"]) if plan["short_bytes"]
            else
            "; what the others can hold, they have room for:", figures)
    if plan["fits"] is None:
        return "It is unknown whether it fits: %s. Of what is known: %s." % (
            "no answer from %s" % ", ".join(plan["unreachable"]) if plan["unreachable"]
            else "not everything was looked at yet",
            figures)
    if plan["short_bytes"]:
        return "It does NOT fit: %s, and room for %s is missing (a host counts once for each " \
            "file, and not for its own)." % (figures, format_size(plan["short_bytes"]))
    if plan["fits"] is False:
        return "It does NOT fit: %s, but see above." % figures
    if plan["tight"]:
        return "It fits, but only just: %s. Files are not divided, so the last ones may find no " \
            "place." % figures
    return "It fits: %s." % figures


def plan_loss_text(loss: "Dict[str, Any]") -> str:
    parts = []
    unknown = sorted(set(loss["unknown"]) & set(loss["sources"]))
    known = sorted(set(loss["sources"]) - set(unknown))
    if unknown:
        parts.append("what would be lost of %s is unknown" % ", ".join(unknown))
    if loss["lost_files"]:
        parts.append("%s of it (%s) have no copy yet and would be LOST" % (
            count_of(loss["lost_files"], "file"), format_size(loss["lost_bytes"])))
    elif known or not unknown:
        parts.append("nothing of %s would be lost" % ", ".join(known) if known
                     else "nothing would be lost")
    if loss["short_files"]:
        parts.append("%s (%s) of others would be short of a copy" % (
            count_of(loss["short_files"], "file"), format_size(loss["short_bytes"])))
    elsewhere = sorted(set(loss["unknown"]) - set(loss["sources"]))
    if elsewhere:
        parts.append("what becomes of the copies of %s is unknown" % ", ".join(elsewhere))
    if loss["missing_hosts"]:
        parts.append("too few other hosts would be left for all copies: %s missing"
                     % count_of(loss["missing_hosts"], "host"))
    elif not loss["room"]:
        parts.append("the others do NOT have the room for all copies: %s are missing"
                     % format_size(loss["room_missing_bytes"]))
    elif not loss["unknown"]:
        parts.append("the others have the room to make its copies again")
    return "; ".join(parts)


def own_command() -> "List[str]":
    """How to start this very program again: as a zipapp or as a module."""
    path = os.path.abspath(__file__)
    above = os.path.dirname(path)
    return [sys.executable, above if os.path.isfile(above) else path]


def tree_facts(root: str) -> "Dict[bytes, Tuple[Any, ...]]":
    """An independent look at a tree: path -> (kind, content's digest or symlink's target, mode,
    mtime in ns)."""
    facts: "Dict[bytes, Tuple[Any, ...]]" = {}
    top = os.fsencode(root)
    for above, directories, files in os.walk(top):
        for name in directories + files:
            full = os.path.join(above, name)
            info = os.lstat(full)
            mode, rel = stat.S_IMODE(info.st_mode), os.path.relpath(full, top)
            if stat.S_ISLNK(info.st_mode):
                facts[rel] = ("l", os.readlink(full))
            elif stat.S_ISDIR(info.st_mode):
                facts[rel] = ("d", mode)
            elif stat.S_ISREG(info.st_mode):
                with open(full, "rb") as stream:
                    facts[rel] = ("f", digest_descriptor(stream.fileno())[0], mode,
                                  info.st_mtime_ns)
    return facts


class Demo:
    """Four hosts on loopback in a temporary directory: one with the source, three with backups."""

    def __init__(self, directory: "Optional[str]", base: str) -> None:
        self.base = base
        self.servers: "Dict[str, subprocess.Popen[str]]" = {}
        self.source = os.path.realpath(directory) if directory else self._make_files()
        self.files, self.bytes, self.largest = 0, 0, 0
        for above, _, names in os.walk(self.source):
            for name in names:
                info = os.lstat(os.path.join(above, name))
                if stat.S_ISREG(info.st_mode):
                    self.files, self.bytes = self.files + 1, self.bytes + info.st_size
                    self.largest = max(self.largest, info.st_size)
        if not self.files:
            raise UsageError("%s has no files to back up" % self.source)

    def _make_files(self) -> str:
        root, chance = os.path.join(self.base, "files"), random.Random(1)
        for number in range(600):
            path = os.path.join(root, "album %d" % (number % 12), "picture-%03d.raw" % number)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as stream:
                stream.write(chance.getrandbits(8 * 1024).to_bytes(1024,
                                                                   "big") * chance.randint(1, 200))
        os.symlink("album 0/picture-000.raw", os.path.join(root, "best"))
        os.makedirs(os.path.join(root, "empty"))
        return root

    def set_up(self) -> None:
        """Homes, one key, one configuration.  No backup is large enough for everything."""
        each = self.bytes * 2 // 3 + self.bytes // 12 + self.largest
        sockets = [socket.socket() for _ in range(4)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        lines = ["[cluster]", "name = demo", "replicas = 2", "scan_min = 0s", "[hosts]"]
        lines += ["%s = 127.0.0.1:%d" % pair for pair in zip(("desk", "pi1", "pi2", "pi3"), ports)]
        lines += ["[sources]", "demo = desk:%s" % shlex.quote(self.source), "[backups]"]
        lines += ["disk%d = pi%d:%s size=%d"
                  % (n, n, shlex.quote(os.path.join(self.base, "disk%d" % n)), each)
                  for n in (1, 2, 3)]
        key = os.path.join(self.base, "cluster.pem")
        make_cluster_key(key)
        for name in ("desk", "pi1", "pi2", "pi3", "new"):
            home = os.path.join(self.base, "home-" + name)
            os.mkdir(home, 0o700)
            shutil.copy(key, home)
            atomic_write(os.path.join(home, "cbackup.conf"), ("\n".join(lines) + "\n").encode())
            if name != "new":
                atomic_write(os.path.join(home, "host"), name.encode() + b"\n")
        self.each = each

    def start(self, host: str) -> None:
        process = subprocess.Popen(own_command()
                                   + ["--home", os.path.join(self.base, "home-" + host), "server"],
                                   stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                   universal_newlines=True)
        self.servers[host] = process
        if "listening" not in (process.stdout.readline() if process.stdout else ""):
            raise CBackupError("the demo's server %s did not start" % host)

    def command(self, host: str, *words: str,
                output: "Optional[int]" = None) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(own_command() + ["--home", os.path.join(self.base, "home-" + host)]
                              + list(words),
                              stdin=subprocess.DEVNULL, stdout=output, universal_newlines=True)

    def stop(self) -> None:
        for process in self.servers.values():
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()

    def run(self) -> int:
        begun = time.monotonic()
        print("source  %s: %s, %s"
              % (self.source, count_of(self.files, "file"), format_size(self.bytes)))
        self.set_up()
        print("hosts   desk has the source; pi1, pi2, pi3 have a backup of %s each; 2 copies of "
              "every file are wanted"
              % format_size(self.each))
        for host in ("desk", "pi1", "pi2", "pi3"):
            self.start(host)
        for host in ("pi1", "pi2", "pi3", "pi1"):
            if self.command(host, "client", "--until-settled").returncode:
                raise CBackupError("the client of %s failed" % host)
        for number in (1, 2, 3):
            facts = tree_facts(os.path.join(self.base, "disk%d" % number, "demo"))
            held = [f for f in facts.values() if f[0] == "f"]
            print("backup  disk%d on pi%d has %s as plain files"
                  % (number, number, count_of(len(held), "file")))
        check = self.command("pi1", "status", "--check", output=subprocess.PIPE)
        print("status  %s" % check.stdout.strip())
        print("backup took %s; now desk and pi2 are killed"
              % format_seconds(time.monotonic() - begun))
        for host in ("desk", "pi2"):
            self.servers[host].kill()
        begun = time.monotonic()
        target = os.path.join(self.base, "restored")
        restored = self.command("new", "restore", "demo", "--to", target)
        print("restore took %s on a machine that has only cbackup.conf and cluster.pem"
              % format_seconds(time.monotonic() - begun))
        wrong = self._differences(target)
        if restored.returncode or check.returncode or wrong:
            print("FAILED: %s differ, for example %s" % (
                count_of(len(wrong), "path"), shown(sorted(wrong)[0]) if wrong else "none"))
            return EXIT_INCOMPLETE
        print("compare %s restored: contents, modes, times and symlinks are those of the source"
              % count_of(self.files, "file"))
        return EXIT_DONE

    def _differences(self, target: str) -> "set[bytes]":
        before, after = tree_facts(self.source), tree_facts(target)
        return {path for path in set(before) | set(after) if before.get(path) != after.get(path)}


# ==== 16. Looking back: what was there, what passes did ===========================================


def ask_lists(home: Home, config: Config, source: str, directory: bytes,
              ) -> "Tuple[List[Tuple[str, str, Optional[int], int, float, bool]], Dict[str, str]]":
    """What all backups have directly in a directory of a source, or of that path: rows (backup,
    name, size or None for a directory, mtime, until when it was the present version, whether it is
    an old version); and host -> why it is not known."""
    dialer, lock = Dialer(home), threading.Lock()
    found: "List[Tuple[str, str, Optional[int], int, float, bool]]" = []
    down: "Dict[str, str]" = {}

    def ask(host: str) -> None:
        link = Link(host, config, dialer)
        try:
            if link.peer_level() < 2:
                raise Refused("old",
                              "%s: its cbackup is too old to be asked for this; update it" % host)
            for backup, kind in itertools.product(config.backups_of(host), (1, 2)):
                with contextlib.suppress(EmptyBackup):
                    for row in list_pages(link, backup.name, source, directory, kind):
                        with lock:
                            found.append((backup.name, row[0], row[1], row[2], row[3], kind == 2))
        except (Unreachable, Refused, ProtocolError) as error:
            down[host] = str(error)
        finally:
            link.close()

    in_parallel(ask, sorted({b.host for b in config.backups.values()}), Progress())
    return found, down


class EmptyBackup(CBackupError):
    """A backup in which nothing is yet, or whose disk is not mounted."""


def list_pages(link: Link, backup: str, source: str, directory: bytes,
               kind: int) -> "Iterator[List[Any]]":
    """The rows of `list`, page by page."""
    after: "Optional[str]" = ""
    while after is not None:
        try:
            answer = link.call("list", backup=backup, source=source, path=as_text(directory),
                               kind=kind, after=after)
        except Refused as error:
            if error.reason == "unknown":
                raise EmptyBackup(str(error))
            raise
        yield from answer["rows"]
        before, after = after, answer["next"]
        if after is not None and as_raw(after) <= as_raw(before):
            raise ProtocolError("%s: a listing without an end" % link.host)


def collect_listing(home: Home, config: Config, source: str, directory: bytes,
                    at: "Optional[float]") -> "Dict[str, Any]":
    """What a directory of a source had: the object that `ls --json` prints.  Raises CBackupError
    when it was not there.

    An entry's `copies`: on how many other hosts this version is, None for what is no file; `older`:
    how many other versions there are.  `gone`: names of which there are old versions only.
    """
    holders, asked = Holders(source), Asked(only=directory)
    holders.find(config, Dialer(home))
    with tempfile.TemporaryDirectory(prefix="cbackup-") as scratch, \
            contextlib.closing(Plan(scratch)) as plan:
        when, _ = load_catalog(plan, holders, asked, at, scratch)
        rows = list(plan.each("all"))
    own = [row for row in rows if row[0] == directory]
    if directory and not own:
        raise CBackupError("%s had no %s on %s; `find` looks everywhere" % (
            source, shown(directory), format_time(when)))
    single = bool(own) and own[0][1] != "d"
    there, down = ask_lists(home, config, source, directory)
    held: "Dict[str, List[Any]]" = {}
    for row in there:
        held.setdefault(row[1], []).append(row)
    shown_rows = own if single else [row for row in rows if row[0] != directory]
    entries = [_listed(config, source, row,
                       held.get("" if single else as_text(row[0].rpartition(b"/")[2]), []),
                       {config.backups[row[0]].host for row in there} | set(down))
               for row in shown_rows]
    names = {entry["name"] for entry in entries}
    return {"source": source, "path": as_text(directory), "catalog_time": when, "entries": entries,
            "gone": sorted(name for name, rows in held.items() if name and name not in names
                           and any(r[5] for r in rows)),
            "unreachable": sorted(set(down) | {config.backups[b].host for b in holders.down}),
            "reasons": sorted(set(down.values())
                              | {"%s cannot be asked" % name for b, name in holders.down.items()
                                 if config.backups[b].host not in down})}


def _listed(config: Config, source: str, row: "Tuple[Any, ...]", held: "List[Any]",
            asked: "set[str]") -> "Dict[str, Any]":
    """One entry of a listing.  row: of `Plan.each("all")`; held: what the backups have under that
    name."""
    path, kind, size, mtime, target, holders = row
    out = {"name": as_text(path.rpartition(b"/")[2]),
           "kind": {"f": "file", "d": "directory", "l": "symlink"}[kind],
           "size": size if kind == "f" else None, "mtime": mtime / 1e9, "target": None
           if target is None else as_text(target),
           "copies": None, "older": None}
    if kind == "f":
        own = config.sources[source].host
        hosts = {config.backups[r[0]].host for r in held if (r[2], r[3]) == (size, mtime)}
        # as of the catalog
        hosts |= {config.backups[b].host for b in holders.split(",") if b in config.backups} - asked
        out["copies"] = len(hosts - {own})
        out["older"] = len({(r[2], r[3]) for r in held if r[5] and (r[2], r[3]) != (size, mtime)})
    return out


def print_listing(listing: "Dict[str, Any]") -> None:
    for entry in listing["entries"]:
        name = shown(as_raw(entry["name"])) + ("/" if entry["kind"] == "directory" else "")
        if entry["kind"] == "symlink":
            name += " -> " + shown(as_raw(entry["target"]))
        facts = "" if entry["copies"] is None else "%s%s" % (
            count_of(entry["copies"], "copy") if entry["copies"] == 1
            else "%d copies" % entry["copies"],
            ", %d older" % entry["older"] if entry["older"] else "")
        print("%s %10s  %-18s  %s"
              % (format_when(entry["mtime"]), "" if entry["size"] is None
                 else format_size(entry["size"]),
                 facts, name))
    if listing["gone"]:
        names = ["%s" % shown(as_raw(name)) for name in listing["gone"][:10]]
        print("gone, with old versions: %s%s"
              % (", ".join(names), ", ..." if len(listing["gone"]) > 10 else ""))
    print("as of %s" % format_time(listing["catalog_time"]))


def format_when(seconds: float) -> str:
    """A time in a list: to the minute, local."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def pass_text(record: "Dict[str, Any]") -> str:
    """What a pass did, for people.  record: of `Home.passes`."""
    parts = []
    for key, word in (("copied", "copied"), ("updated", "changed"), ("moved", "moved"),
                      ("dropped", "dropped"),
                      ("failed", "failed")):
        files = record[key + "_files"]
        if files:
            size = record.get(key + "_bytes")
            parts.append("%s %s%s"
                         % (format(files, ","), word, " (%s)" % format_size(size) if size else ""))
    return ", ".join(parts) or "nothing to do"


def pass_lines(records: "Iterable[Dict[str, Any]]",
               ) -> "Iterator[Tuple[float, float, str, List[str]]]":
    """(time of the first, of the last, what was done, what was wrong) of passes, the newest first;
    passes in a row that had nothing to do and nothing to say are one."""
    idle: "List[Dict[str, Any]]" = []

    def idle_line() -> "List[Tuple[float, float, str, List[str]]]":
        if not idle:
            return []
        return [(idle[-1]["time"], idle[0]["time"], "nothing to do" if len(idle) == 1 else
                 "%d passes with nothing to do" % len(idle), [])]

    for record in records:
        if pass_text(record) == "nothing to do" and not record["wrong"] \
                and not record["unreachable"]:
            idle.append(record)
            continue
        yield from idle_line()
        idle.clear()
        yield (record["time"], record["time"],
               "%s, in %s" % (pass_text(record), format_seconds(max(1, record["seconds"]))),
               record["wrong"])
    yield from idle_line()


# ==== 17. Being told ==============================================================================

ALERT_SECONDS = 60.0
"""An `alert` has so long; then it is ended."""

ALERT_AGAIN, ALERT_RETRY = 86400.0, 3600.0
"""While something stays wrong it is told again after a day; when the telling failed, after an
hour."""


def trouble_key(line: str) -> str:
    """What stays the same in a sentence of a verdict while its figures, and the files that it
    names, change."""
    line = re.sub(r"\A\S+ asleep since [^;]*; then: ", "", line)
    line = re.sub(r"(?<![\w.-])[0-9][0-9,.]*(?: (?:second|minute|hour|day|file|path)s?)?(?![\w-])",
                  "#", line)
    return ": ".join(line.split(": ")[:2])[:300]


class Watch:
    """Since when what is wrong has been wrong, and what of it the user was told:
    `state/watch.json`.

    Its `wrong` has, for each `trouble_key`: `since`, `line`, and `told` (seconds since 1970, or
    None).  `over`: sentences that were told and are no longer true, until that is told too.
    """

    def __init__(self, home: Home, after: float) -> None:
        self.home, self.after = home, after
        self.now = clock.now()
        self.wrong: "Dict[str, Dict[str, Any]]" = {}
        self.over: "List[str]" = []

    def note(self, found: Verdict) -> None:
        """Enter a verdict.  Trouble that was not there the last time begins now."""
        with contextlib.suppress(OSError), self.home.lock("watch.lock"):
            before = self._read()
            self.wrong, old = {}, dict(self.wrong)
            for line in found.trouble:
                known = old.get(trouble_key(line), {"since": self.now, "told": None, "tried": None})
                since = min(self.now,
                            max(known["since"], self.now - found.at_most.get(line, float("inf"))))
                self.wrong[trouble_key(line)] = dict(known, since=since, line=line)
            self.over += [facts["line"] for key, facts in old.items()
                          if facts.get("told") is not None and key not in self.wrong]
            self._write(before)

    def _read(self) -> str:
        """What the last verdict left; what is not of the form counts as nothing.  Returns its
        text."""
        found = read_json(self.home.state("watch.json"))
        wrong, over = found.get("wrong"), found.get("over")
        self.wrong = {key: facts
                      for key, facts in (wrong.items() if isinstance(wrong, dict) else ())
                      if isinstance(facts, dict) and isinstance(facts.get("line"), str)
                      and isinstance(facts.get("since"), (int, float)) and all(
                          isinstance(facts.get(key), (int, float, type(None)))
                          for key in ("told", "tried"))}
        self.over = [line for line in over
                     if isinstance(line, str)] if isinstance(over, list) else []
        return json.dumps({"wrong": self.wrong, "over": self.over})

    def _write(self, before: str) -> None:
        text = json.dumps({"wrong": self.wrong, "over": self.over})
        if text != before:
            atomic_write(self.home.state("watch.json"), text.encode())

    def tell(self) -> None:
        """Run the home's `alert` when there is something to be told: trouble that has lasted long
        enough, once and then once a day, and once that all of what was told is over.  Says on
        standard error when that failed."""
        program = os.path.join(self.home.path, "alert")
        if not (os.path.isfile(program) and os.access(program, os.X_OK)):
            return
        try:
            with self.home.lock("alert.lock", wait=False):
                self._read()
                old = [facts for facts in self.wrong.values()
                       if self.now - facts["since"] >= self.after]
                due = [facts for facts in old
                       if (facts.get("told") is None
                           or not 0 <= self.now - facts["told"] < ALERT_AGAIN)
                       and (facts.get("tried") is None
                            or not 0 <= self.now - facts["tried"] < ALERT_RETRY)]
                if due:
                    self._tell_trouble(program, old)
                elif self.over and not any(facts.get("told") is not None
                                           for facts in self.wrong.values()):
                    if self._run(program, "well", ["well again: " + line for line in self.over]):
                        self._settle({}, [])
        except Busy:
            pass  # another pass is telling it just now
        except OSError as error:
            print("cbackup: alert: %s" % reason_of(error), file=sys.stderr)

    def _tell_trouble(self, program: str, old: "List[Dict[str, Any]]") -> None:
        done = self._run(program, "trouble", [facts["line"] for facts in old])
        times = {"told": self.now, "tried": None} if done else {"tried": self.now}
        self._settle({trouble_key(facts["line"]): times for facts in old}, self.over)

    def _settle(self, times: "Dict[str, Dict[str, Any]]", over: "List[str]") -> None:
        """Note what was told, in what is there by now."""
        with self.home.lock("watch.lock"):
            before = self._read()
            for key, changed in times.items():
                if key in self.wrong:
                    self.wrong[key].update(changed)
            self.over = over
            self._write(before)

    def _run(self, program: str, word: str, lines: "List[str]") -> bool:
        """Whether `alert` took the sentences; if not, that is said."""
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output:
            given.write("".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))
            given.seek(0)
            process = subprocess.Popen([program, word], stdin=given, stdout=output,
                                       stderr=subprocess.STDOUT,
                                       cwd=self.home.path, start_new_session=True)
            try:
                status: "Optional[int]" = process.wait(ALERT_SECONDS)
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            said = shown(output.read().strip().rpartition(b"\n")[2][:300])
        if status == 0:
            return True
        print("cbackup: %s %s %s%s"
              % (program, word, "took longer than %d s and was ended" % ALERT_SECONDS
                 if status is None else "failed with status %d" % status,
                 said and ": " + said), file=sys.stderr)
        return False


# ==== 18. The page ================================================================================

PAGE_STYLE = """\
:root{color-scheme:light dark;--bg:#f4f5f7;--card:#fff;--fg:#1b1f24;--dim:#5b6470;--line:#d9dde3;--well:#1a7f4b;
--wait:#8a5a00;--wrong:#b3261e;--a:#2f6fde;--b:#9a7fe0;--c:#e3e7ed;--d:#b9c0ca;--link:#1f5fc4}
@media(prefers-color-scheme:dark){:root{--bg:#12151a;--card:#1b2027;--fg:#e6e9ee;--dim:#9aa4b2;--line:#2e353f;
--well:#5fd39a;--wait:#f0bd58;--wrong:#ff8a80;--a:#6ea0ff;--b:#b9a3ff;--c:#313944;--d:#566170;--link:#8ab4ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main,footer{max-width:64rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.2rem}footer{color:var(--dim);font-size:.85rem;padding-bottom:2rem}
h1{font-size:1rem;font-weight:600;color:var(--dim);margin:0 0 .6rem}h2{font-size:1.1rem;margin:0 0 .7rem}
section,.verdict{background:var(--card);border:1px solid var(--line);border-radius:.7rem;padding:1rem 1.1rem;margin:0 0 1rem}
.verdict{border-left:.45rem solid var(--c)}.verdict.well{border-left-color:var(--well)}
.verdict.wait{border-left-color:var(--wait)}.verdict.wrong{border-left-color:var(--wrong)}
.verdict p{margin:0}.verdict .say{font-size:1.35rem;font-weight:650;line-height:1.3}
.verdict ul,section ul{margin:.5rem 0 0;padding-left:1.2rem}
.mark{font-weight:700}.well .mark,.mark.well{color:var(--well)}.wait .mark,.mark.wait{color:var(--wait)}
.wrong .mark,.mark.wrong{color:var(--wrong)}
.dim{color:var(--dim)}.small{font-size:.85rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.4rem .9rem .4rem 0;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--dim);font-weight:500;font-size:.85rem}
tbody th{font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.when{white-space:nowrap;font-variant-numeric:tabular-nums}
.bar{display:block;width:100%;height:.8rem;margin:.35rem 0;border-radius:.25rem;overflow:hidden}
.bar rect.a{fill:var(--a)}.bar rect.b{fill:var(--b)}.bar rect.c{fill:var(--c)}.bar rect.d{fill:var(--d)}
.bar rect.wrong{fill:var(--wrong)}.bar rect.wait{fill:var(--wait)}.bar rect.well{fill:var(--well)}
.key{display:inline-block;margin-right:1rem;white-space:nowrap}
.key svg.bar{display:inline-block;width:.7rem;height:.7rem;margin:0 .35rem 0 0;vertical-align:baseline}
.grid{display:grid;gap:1rem 2rem;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr))}
.item h3{font-size:1rem;margin:0}.item p{margin:0}
code,.path{overflow-wrap:anywhere}code{font-size:.9em}
a{color:var(--link)}a:focus-visible,.scroll:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
@media(max-width:34rem){body{font-size:15px}th,td{padding-right:.6rem}
.stack thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.stack,.stack tbody,.stack tr,.stack th,.stack td{display:block}.stack tr{border-top:1px solid var(--line);padding:.5rem 0}
.stack th,.stack td{border:0;padding:.05rem 0}.stack td.n{text-align:left}}
@media print{body{background:#fff}section,.verdict{break-inside:avoid}}
"""

MARKS = {"well": "\u2713", "wait": "\u2026", "wrong": "\u2717"}
"""The sign for each state; it stands before words that say the same."""

PAGE_PASSES = 20
"""Lines of the log of passes that the page shows."""


def collect_facts(home: Home, config: Config) -> "Dict[str, Any]":
    """All that the page shows, asked of the cluster at once: status, plan, what the verdict is,
    this host's passes."""
    status = collect_status(home, config)
    plan = collect_plan(home, config)
    return {"status": status, "plan": plan, "verdict": verdict(status), "time": clock.now(),
            "host": home.own_name(),
            "passes": list(itertools.islice(pass_lines(home.passes()), PAGE_PASSES)),
            "reserve": {name: spec.reserve or 0 for name, spec in config.backups.items()}}


def esc(text: Any) -> str:
    """Text as it stands in the page, whatever is in it."""
    import html
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode())


def mark(state: str, text: str) -> str:
    """A sign and words for `well`, `wait` or `wrong`."""
    return '<span class="mark %s"><span aria-hidden="true">%s</span> %s</span>' % (
        state, MARKS[state], esc(text))


def ago(seconds: "Optional[float]", never: str) -> str:
    """How long ago, for people."""
    return never if seconds is None else "just now" if seconds < 60 \
        else format_age(seconds) + " ago"


def draw_bar(parts: "List[Tuple[str, float]]", text: str) -> str:
    """A bar of parts (class, share of any whole), and what it says in words."""
    whole = sum(size for _, size in parts) or 1.0
    at, out = 0.0, []
    for kind, size in parts:
        if size > 0:
            width = 1000.0 * size / whole
            out.append('<rect class="%s" x="%.1f" y="0" width="%.1f" height="10"/>'
                       % (kind, at, width))
            at += width
    return '<svg class="bar" viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label="%s">%s</svg>' % (
        esc(text), "".join(out))


def make_table(caption: str, heads: "List[str]", rows: "List[List[str]]",
               stack: bool = True) -> str:
    """A table; cells are HTML, a row's first is its head.  A head that begins with "#" is one of
    figures.  `stack`: on a phone the cells of a row stand below each other; else it is moved
    sideways."""
    kinds = [' class="n"' if head.startswith("#") else "" for head in heads]
    out = ["<table%s><caption class=hidden>%s</caption><thead><tr>"
           % (' class="stack"' if stack else "", esc(caption))]
    out += ['<th scope="col"%s>%s</th>' % (kind, esc(head.lstrip("#")))
            for kind, head in zip(kinds, heads)]
    out.append("</tr></thead><tbody>")
    for row in rows:
        out.append('<tr><th scope="row">%s</th>%s</tr>' % (row[0], "".join(
            "<td%s>%s</td>" % (kind, cell) for kind, cell in zip(kinds[1:], row[1:]))))
    out.append("</tbody></table>")
    body = "".join(out)
    return body if stack \
        else '<div class="scroll" tabindex="0" role="region" aria-label="%s">%s</div>' % (
            esc(caption), body)


def make_section(name: str, title: str, body: str) -> str:
    return '<section aria-labelledby="%s"><h2 id="%s">%s</h2>%s</section>' % (name, name, esc(
        title), body)


def what_to_do(status: "Dict[str, Any]") -> "List[str]":
    """The ways out of what is wrong: a sentence each, from the facts; [] when waiting is all."""
    out, down = [], set(status["unreachable"])
    for host in sorted(down):
        out.append("%s does not answer: switch it on or wake it, or look there whether the cbackup "
                   "server runs." % host)
    for name, s in status["sources"].items():
        s = dict(s["then"] or s, host=s["host"], impossible=s["impossible"])
        if s["state"] == "held":
            out.append("%s is held: %s." % (name, held_advice(name, s)))
        if s["impossible"]:
            out.append("%s: offer a backup on one more host, or ask for fewer replicas." % name)
        if s["state"] == "unknown":
            out.append("%s: let a client run on %s, or copy the configuration there."
                       % (name, s["host"]))
        if (s.get("problems") or {}).get("count"):
            out.append("%s: let the server on %s read these paths, or exclude them."
                       % (name, s["host"]))
        if (s.get("stuck") or {}).get("count"):
            out.append("%s: see `plan`, whether there is room, and for which file." % name)
    for name, b in status["backups"].items():
        if b["state"] not in ("ok", "unreachable", "lost") and not b.get("new"):
            out.append("%s on %s: %s; is its disk mounted, and has it room?"
                       % (name, b["host"], b["state"]))
        elif b["host"] not in down and b["last_seen"] is not None \
                and b["last_seen"] > status["warn_after"]:
            out.append("%s: see on %s whether its client runs: cbackup.pyz log" % (name, b["host"]))
    return out


def page_verdict(facts: "Dict[str, Any]") -> str:
    """On top: is everything safe, and if not, what to do."""
    found, status = facts["verdict"], facts["status"]
    files = sum((s["then"] or s)["files"] or 0 for s in status["sources"].values())
    to_do = what_to_do(status)
    waiting = not found.safe and not to_do and not found.lasting()
    if not status["sources"]:
        state, say = "wait", "There is no source in the configuration yet: nothing is backed up."
    elif found.safe:
        state, say = "well", "Everything is safe: %s of %s %s all the copies wanted." % (
            count_of(files, "file"), count_of(len(status["sources"]), "source"), "has" if files == 1
            else "have")
    elif waiting:
        state, say = "wait", \
            "Not everything is safe yet. Nothing is to be done: the next passes go on with it."
    else:
        state, say = "wrong", "Not everything is safe."
    out = ['<div class="verdict %s" role="status"><p class="say">%s</p>'
           % (state, mark(state, say))]
    if found.trouble:
        out.append("<ul>%s</ul>" % "".join("<li>%s</li>" % esc(line) for line in found.trouble))
    if found.trouble and to_do:
        out.append("<p><strong>What to do</strong></p><ul>%s</ul>"
                   % "".join("<li>%s</li>" % esc(line) for line in to_do))
    if found.remarks:
        out.append('<ul class="dim small">%s</ul>'
                   % "".join("<li>%s</li>" % esc(line) for line in found.remarks))
    return "".join(out) + "</div>"


def page_hosts(facts: "Dict[str, Any]") -> str:
    """Which machine may die: what its loss would mean now."""
    plan, rows = facts["plan"], []
    for host, loss in plan["hosts"].items():
        silent = facts["status"]["hosts"].get(host, {}).get("silent")
        first, _, rest = plan_loss_text(loss).partition("; ")
        if host in plan["unreachable"]:
            says = mark("wrong", "not known") \
                + " &ndash; it does not answer, heard of %s" % esc(ago(silent, "never"))
        else:
            says = mark("wrong" if loss["lost_files"] else "well",
                        first) + "<br><span class=small>%s</span>" % esc(rest)
        rows.append([esc(host), says])
    return make_section("hosts", "If a machine dies now",
                        make_table("What the loss of each host means", ["host", "what is lost"],
                                   rows))


def page_sources(facts: "Dict[str, Any]") -> str:
    """Each source: its files by number of copies, what waits, when it was looked at."""
    items = []
    for name, now in facts["status"]["sources"].items():
        s = now["then"] or now
        head = '<div class="item"><h3>%s</h3><p class="dim small path">%s:%s</p>' % (
            esc(name), esc(now["host"]), esc(shown(os.fsencode(now["path"]))))
        if s["files"] is None:
            items.append(head + "<p>%s</p></div>"
                         % mark("wrong", "nothing is known of it: its server does not answer"))
            continue
        counts = sorted((int(k), n) for k, n in s["copies"].items() if n)
        text = ", ".join("%s with %d %s" % (count_of(n, "file"), k, "copy" if k == 1 else "copies")
                         for k, n in counts)
        parts = [("well" if k >= s["replicas"] else "wait" if k else "wrong", float(n))
                 for k, n in counts]
        waits = mark("well", "all have their copies") if not s["underserved_files"] else mark(
            "wait", "%s (%s) still %s copies"
            % (count_of(s["underserved_files"], "file"), format_size(s["underserved_bytes"]),
               "lacks" if s["underserved_files"] == 1 else "lack"))
        if s["state"] == "held":
            waits = mark("wrong", "held: nothing changes in the backups")
        if now["then"]:
            waits = mark("wait", "its server does not answer; this is what it said last")
        seen = "looked at " + ago(s["last_scan"], "never")
        items.append("%s%s<p>%s, %s; %s wanted</p><p class=small>%s</p><p>%s</p><p class=\"dim "
                     "small\">%s</p></div>" % (
            head, draw_bar(parts, text or "no files"), count_of(s["files"], "file"),
            format_size(s["bytes"]),
            "1 copy" if s["replicas"] == 1 else "%d copies" % s["replicas"], esc(text), waits,
            esc(seen)))
    return make_section("sources", "Sources", '<div class="grid">%s</div>' % "".join(items))


def page_backups(facts: "Dict[str, Any]") -> str:
    """Each backup as a bar: copies, old versions, free, reserve; when it was heard of."""
    items = []
    for name, b in facts["status"]["backups"].items():
        out = ['<div class="item"><h3>%s</h3><p class="dim small path">%s:%s</p>' % (
            esc(name), esc(b["host"]), esc(shown(os.fsencode(b["path"]))))]
        if b["used"] is not None and b["capacity"] is not None:
            held = b.get("held")
            old = 0 if held is None else max(0, b["used"] - held)
            sizes = [("a", "copies", b["used"] - old), ("b", "old versions", old),
                     ("c", "free", max(0, b["capacity"] - b["used"])),
                     ("d", "reserve", facts["reserve"].get(name, 0))]
            text = ", ".join("%s %s" % (word, format_size(size)) for _, word, size in sizes if size
                             or word == "free")
            out.append(draw_bar([(kind, float(size)) for kind, _, size in sizes], text))
            out.append('<p class="small">%s</p>' % "".join(
                '<span class="key"><svg class="bar" viewBox="0 0 10 10" aria-hidden="true"><rect '
                'class="%s" width="10" '
                'height="10"/></svg>%s %s</span>' % (kind, word, esc(format_size(size)))
                for kind, word, size in sizes if size or word == "free"))
        if b["state"] not in ("ok", "unreachable", "lost"):
            out.append("<p>%s</p>" % mark("wait" if b.get("new") else "wrong", b["state"]))
        elif b["state"] != "ok":
            out.append("<p>%s</p>"
                       % mark("wrong", "its host does not answer" if b["state"] == "unreachable"
                              else
                              "lost: its copies no longer count"))
        if b.get("leaving"):
            out.append("<p>%s</p>" % mark("wait", "leaving: %s" % (
                "it can be unplugged now" if b["duties"] == 0 else "copies are still needed here")))
        out.append('<p class="dim small">%s%s</p></div>' % (
            "" if b["files"] is None else count_of(b["files"], "file") + ", ",
            "heard of " + ago(b["last_seen"], "never")))
        items.append("".join(out))
    return make_section("backups", "Backups", '<div class="grid">%s</div>' % "".join(items))


def page_map(facts: "Dict[str, Any]") -> str:
    """How much of each source lies on which host."""
    status = facts["status"]
    hosts = sorted({b["host"] for b in status["backups"].values()}
                   | {s["host"] for s in status["sources"].values()})
    rows = []
    for name, now in status["sources"].items():
        files, cells = (now["then"] or now)["files"], []
        for host in hosts:
            here = [b for b in status["backups"].values() if b["host"] == host]
            count = sum(b.get("sources", {}).get(name, 0) for b in here)
            if host == now["host"]:
                cells.append('<span class="dim">its own</span>')
            elif not here:
                cells.append('<span class="dim">no backup</span>')
            elif any("sources" not in b for b in here) and not count:
                cells.append('<span class="dim">not known</span>')
            else:
                share = "" if not files else " (%d %%)" % min(100, 100 * count // files)
                cells.append("%s%s" % (format(count, ","), share))
        rows.append([esc(name)] + cells)
    return make_section("map", "What lies where", make_table(
        "Files of each source on each host", ["source"] + ["#" + host for host in hosts], rows,
        stack=False))


def page_passes(facts: "Dict[str, Any]") -> str:
    """The last passes of this host."""
    rows = []
    for begun, last, text, wrong in facts["passes"]:
        when = format_when(begun) if begun == last else "%s to %s" % (format_when(begun),
                                                                      format_when(last))
        said = mark("wrong", "something was wrong") if wrong else mark("well", "well")
        rows.append(['<span class="when">%s</span>' % esc(when), esc(text), said + (
            "<ul class=small>%s</ul>" % "".join("<li>%s</li>" % esc(line) for line in wrong)
            if wrong else "")])
    body = make_table("The last passes", ["when", "what it did", "how it went"],
                      rows) if rows else \
        '<p class="dim">No pass has been made on this host yet.</p>'
    return make_section("passes", "The last passes of %s" % facts["host"], body)


def page_policy() -> str:
    """What the page may do: show its own style, and nothing else."""
    style = base64.b64encode(hashlib.sha256(PAGE_STYLE.encode()).digest()).decode()
    return ("default-src 'none'; img-src data:; style-src 'sha256-%s'; base-uri 'none'; "
            "form-action 'none'"
            % style)


def make_page(facts: "Dict[str, Any]", link: str = "", refresh: int = 0) -> str:
    """The page: one HTML text that needs nothing else and runs nothing.  link: the address of the
    same as JSON; refresh: after so many seconds a browser asks for it again."""
    status = facts["status"]
    again = '<meta http-equiv="refresh" content="%d">' % refresh if refresh else ""
    title = "%s: %s" % (status["cluster"], "all safe" if facts["verdict"].safe else "NOT SAFE")
    return "".join((
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="%s">' % page_policy(), again,
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="referrer" '
        'content="no-referrer">',
        '<link rel="icon" href="data:,"><title>%s</title><style>%s</style></head>\n<body>'
        % (esc(title), PAGE_STYLE),
        '<a class="skip" href="#hosts">To the details</a><header><h1>cbackup: '
        '%s</h1></header>\n<main>' % esc(status["cluster"]),
        "\n".join(part(facts)
                  for part in (page_verdict, page_hosts, page_sources, page_backups, page_map,
                               page_passes)),
        "</main>\n<footer><p>As %s saw it on %s. cbackup %s%s</p></footer></body></html>\n" % (
            esc(facts["host"]),
            time.strftime("%Y-%m-%d at %H:%M:%S", time.localtime(facts["time"])), __version__,
            ', <a href="%s">the same as JSON</a>' % esc(link) if link else "")))


METRICS = (
    ("source_files", "sources", "files", "Files in a source."),
    ("source_bytes", "sources", "bytes", "Bytes in a source."),
    ("source_underserved_files", "sources", "underserved_files",
     "Files with fewer copies than wanted."),
    ("source_underserved_bytes", "sources", "underserved_bytes",
     "Bytes of files with fewer copies than wanted."),
    ("source_unproven_files", "sources", "unproven_files",
     "Files that are still being compared with their copies."),
    ("source_last_scan_age_seconds", "sources", "last_scan",
     "How long ago a source was looked at."),
    ("backup_capacity_bytes", "backups", "capacity", "Bytes that may lie in a backup."),
    ("backup_used_bytes", "backups", "used", "Bytes that lie in a backup, old versions included."),
    ("backup_files", "backups", "files", "Copies in a backup."),
    ("backup_last_seen_age_seconds", "backups", "last_seen", "How long ago a backup was heard of."))
"""(name after `cbackup_`, where in the status, which fact, what it is) of what `status --metrics`
prints."""


def make_metrics(status: "Dict[str, Any]") -> str:
    """The status in the text format of Prometheus; what is not known is left out."""
    def labels(**words: Any) -> str:
        quoted = [(key, str(word).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
                  for key, word in words.items()]
        return "{%s}" % ",".join('%s="%s"' % pair for pair in quoted)

    out = ["# HELP cbackup_safe Whether every file of every source is safe.",
           "# TYPE cbackup_safe gauge",
           "cbackup_safe %d" % verdict(status).safe]
    for name, where, key, text in METRICS:
        out += ["# HELP cbackup_%s %s" % (name, text), "# TYPE cbackup_%s gauge" % name]
        for item, facts in status[where].items():
            if facts.get(key) is not None:
                out.append("cbackup_%s%s %s"
                           % (name, labels(**{where[:-1]: item, "host": facts["host"]}),
                              facts[key]))
    out += ["# HELP cbackup_source_files_with_copies Files by the number of hosts that have a copy.",
            "# TYPE cbackup_source_files_with_copies gauge"]
    for item, facts in status["sources"].items():
        out += ["cbackup_source_files_with_copies%s %d"
                % (labels(source=item, host=facts["host"], copies=k), n)
                for k, n in facts["copies"].items()]
    out += ["# HELP cbackup_up Whether a source or a backup is in order: 1, or 0.",
            "# TYPE cbackup_up gauge"]
    for where in ("sources", "backups"):
        out += ["cbackup_up%s %d"
                % (labels(kind=where[:-1], name=item, host=facts["host"]), facts["state"] == "ok")
                for item, facts in status[where].items()]
    return "\n".join(out) + "\n"


# ==== 19. The command line ========================================================================


class Parser(argparse.ArgumentParser):
    """Errors in one line, with exit status 2."""

    def error(self, message: str) -> "Any":
        raise UsageError("%s; see `%s --help`" % (message, self.prog))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """The nearest guess for a word that is none of the choices."""
        if action.choices is not None and value not in action.choices:
            import difflib
            near = difflib.get_close_matches(str(value), [str(choice) for choice in action.choices],
                                             1)
            if near:
                raise argparse.ArgumentError(action,
                                             "invalid choice: %r; did you mean %s?"
                                             % (value, near[0]))
        super()._check_value(action, value)


class HelpFormatter(argparse.HelpFormatter):
    """Examples stand as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example:") else super()._fill_text(text, width, indent)


def add_init_parser(commands: Any) -> None:
    parser = commands.add_parser("init",
                                 help="first machine: make the home, the cluster's key and a "
                                      "configuration")
    parser.set_defaults(run=cmd_init)


def cmd_init(args: argparse.Namespace, home: Home) -> int:
    made = []
    os.makedirs(home.path, mode=0o700, exist_ok=True)
    if not os.path.lexists(home.key_path):
        make_cluster_key(home.key_path)
        made.append(home.key_path)
    if not os.path.lexists(home.config_path):
        atomic_write(home.config_path, CONFIG_TEMPLATE.encode(), 0o600)
        made.append(home.config_path)
    if args.host and not os.path.lexists(os.path.join(home.path, "host")):
        atomic_write(os.path.join(home.path, "host"), args.host.encode() + b"\n", 0o600)
        made.append(os.path.join(home.path, "host"))
    for path in made:
        print("made %s" % path)
    if not made:
        print("%s is complete already; nothing was changed" % home.path)
    elif home.config_path in made:
        command = as_typed(args, home)
        print("1. write the sources and backups of all your machines into %s" % home.config_path)
        print("2. start the server and the client here, now and at each boot: %s service --install"
              % command)
        print("3. for each other machine: %s invite" % command)
    return EXIT_DONE


def add_invite_parser(commands: Any) -> None:
    parser = commands.add_parser("invite",
                                 help="print the line to type on a new machine; good once, for an "
                                      "hour")
    parser.set_defaults(run=cmd_invite)


def cmd_invite(args: argparse.Namespace, home: Home) -> int:
    config = home.config()
    home.check_key()
    host = home.host(config)
    address, port = config.address(host)
    print("python3 cbackup.pyz join %s:%d %s"
          % ("[%s]" % address if ":" in address else address, port, make_invitation(home)))
    return EXIT_DONE


def add_join_parser(commands: Any) -> None:
    parser = commands.add_parser("join",
                                 help="new machine: fetch the cluster's key and configuration")
    parser.add_argument("address", metavar="HOST[:PORT]",
                        help="a machine of the cluster, as `invite` printed it")
    parser.add_argument("token", metavar="TOKEN", help="what `invite` printed")
    parser.add_argument("--install", action="store_true",
                        help="start server and client, now and at each boot")
    parser.set_defaults(run=cmd_join)


def cmd_join(args: argparse.Namespace, home: Home) -> int:
    name, host_path = home.own_name(), os.path.join(home.path, "host")
    check_home_to_join(args, home, host_path)
    if not _NAME.match(name):  # before the token is spent
        raise UsageError("this machine's name %r cannot be used; say --host NAME before join"
                         % name)
    try:
        address, port = split_address(args.address)
    except ValueError as error:
        raise UsageError(str(error))
    os.makedirs(home.path, mode=0o700, exist_ok=True)
    own = join_cluster(home, address, port or Config.port, args.token)
    if args.host:
        atomic_write(host_path, name.encode() + b"\n")
    print_joined(args, home, name, own)
    return Installer(home).install() if args.install else EXIT_DONE


def check_home_to_join(args: argparse.Namespace, home: Home, host_path: str) -> None:
    """Refuse a home with a key, or with files that are not from an earlier time in the cluster,
    before the token is spent."""
    mine = os.path.lexists(home.config_path) and not home.config_state()
    for path in [home.key_path] + ([home.config_path] if mine else []):
        if os.path.lexists(path):
            raise UsageError("%s is there already: this machine belongs to a cluster, or did; if "
                             "it is to join another one, or that key is no longer right, move it "
                             "away first" % path)
    if args.host and os.path.lexists(host_path) and Home(home.path).own_name() != args.host:
        raise UsageError("%s is there already: this machine is called %s in it"
                         % (host_path, Home(home.path).own_name()))


def print_joined(args: argparse.Namespace, home: Home, name: str, own: str) -> None:
    """What is left to do on a new machine; its lines may be appended to the configuration as they
    are."""
    config = home.config()
    lines = ["source " + s.name for s in config.sources_of(name)]
    lines += ["backup " + b.name for b in config.backups_of(name)]
    print("%s has joined%s: %s and %s are in place" % (
        name, " again, and what was in %s stays" % home.state_path
        if os.path.exists(home.state("books.db")) else "",
        home.config_path, home.key_path))
    if lines:
        print("1. the configuration knows it already: %s" % ", ".join(lines))
    else:
        print("1. append to %s what is true of these lines:" % home.config_path)
        print("     [hosts]\n     %s = %s    # if the others do not find it by its name"
              % (name, own))
        print("     [sources]\n     %s-home = %s:%s"
              % (name, name, shlex.quote(os.path.expanduser("~"))))
        print("     [backups]\n     %s = %s:/srv/cbackup size=100G" % (name, name))
    if not args.install:
        print("2. start the server and the client, now and at each boot:")
        print("     %s service --install" % as_typed(args, home))


def as_typed(args: argparse.Namespace, home: Home) -> str:
    """How this program is called here, up to the command; the home only when it is not the one that
    is taken anyway."""
    words = (["sudo"] if os.environ.get("SUDO_USER") and os.geteuid() == 0 else []) + own_command()
    if home.path != default_home():
        words += ["--home", home.path]
    return " ".join(map(shlex.quote, words))


SERVICE_UNITS = {
    "systemd": """\
# /etc/systemd/system/cbackup.service; then: systemctl enable --now cbackup
[Unit]
Description=cbackup server
After=network-online.target
Wants=network-online.target
[Service]
Environment={systemd_path}
ExecStart={systemd} server
Restart=always
RestartSec=10
User={user}
[Install]
WantedBy=multi-user.target
""",
    "cron": """\
# These lines belong into the crontab of {user} (crontab -e).
{crontab}
""",
    "launchd": """\
<?xml version="1.0" encoding="UTF-8"?>
<!-- /Library/LaunchDaemons/cbackup.server.plist; then: sudo launchctl load -w /Library/LaunchDaemons/cbackup.server.plist -->
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0"><dict>
<key>Label</key><string>cbackup.server</string>
<key>EnvironmentVariables</key><dict><key>PATH</key><string>{xml_path}</string></dict>
<key>ProgramArguments</key><array>{array}<string>server</string></array>
<key>UserName</key><string>{user}</string>
<key>KeepAlive</key><true/>
<key>RunAtLoad</key><true/>
</dict></plist>
""",
    "rc.d": """\
#!/bin/sh
# /usr/local/etc/rc.d/cbackup, mode 555; then: sysrc cbackup_enable=YES && service cbackup start
# PROVIDE: cbackup
# REQUIRE: NETWORKING FILESYSTEMS
. /etc/rc.subr
name=cbackup
rcvar=cbackup_enable
load_rc_config $name
: ${{cbackup_enable:=NO}}
export PATH={sh_path}
pidfile=/var/run/cbackup.pid
command=/usr/sbin/daemon
command_args={daemon_arguments}
run_rc_command "$1"
""",
    "openrc": """\
#!/sbin/openrc-run
# /etc/init.d/cbackup, mode 755; then: rc-update add cbackup && rc-service cbackup start
export PATH={sh_path}
command={openrc_program}
command_args={openrc_arguments}
command_user={user}
command_background=true
pidfile=/run/cbackup.pid
depend() {{ need net; }}
""",
    "smf": """\
<?xml version="1.0"?>
<!-- cbackup.xml; then: svccfg import cbackup.xml && svcadm enable cbackup -->
<!DOCTYPE service_bundle SYSTEM "/usr/share/lib/xml/dtd/service_bundle.dtd.1">
<service_bundle type="manifest" name="cbackup"><service name="site/cbackup" type="service" version="1">
<create_default_instance enabled="true"/><single_instance/>
<dependency name="network" grouping="require_all" restart_on="none" type="service">
<service_fmri value="svc:/milestone/network:default"/></dependency>
<exec_method type="method" name="start" exec={smf} timeout_seconds="60">
<method_context><method_credential user="{user}"/>
<method_environment><envvar name="PATH" value="{xml_path}"/></method_environment></method_context></exec_method>
<exec_method type="method" name="stop" exec=":kill" timeout_seconds="60"/>
</service></service_bundle>
"""}
"""How each system starts the server at boot.  Each field is quoted for what reads it: rc.subr and
OpenRC evaluate their variables once more, systemd and SMF replace words with %, XML has its own.
PATH is given because rsync is often where the short PATH of a boot does not lead."""


def systemd_word(word: str) -> str:
    word = word.replace("%", "%%").replace("$", "$$").replace("\\", "\\\\").replace('"', '\\"')
    return word if re.match(r"[\w@%+=:,./-]+\Z", word, re.A) else '"%s"' % word


CLIENT_UNITS = {
    "cbackup-client.service": """\
[Unit]
Description=a pass of the cbackup client
After=network-online.target
Wants=network-online.target
[Service]
Type=oneshot
Environment={systemd_path}
ExecStart={systemd} client
Nice=10
IOSchedulingClass=idle
User={user}
""",
    "cbackup-client.timer": """\
[Unit]
Description=cbackup client, every quarter of an hour
[Timer]
OnCalendar=*:0/15
RandomizedDelaySec=5min
Persistent=true
[Install]
WantedBy=timers.target
""",
    "cbackup.client.plist": """\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0"><dict>
<key>Label</key><string>cbackup.client</string>
<key>EnvironmentVariables</key><dict><key>PATH</key><string>{xml_path}</string></dict>
<key>ProgramArguments</key><array>{array}<string>client</string></array>
<key>UserName</key><string>{user}</string>
<key>StartInterval</key><integer>900</integer>
<key>RunAtLoad</key><true/>
<key>LowPriorityIO</key><true/>
<key>StandardErrorPath</key><string>/var/log/cbackup.log</string>
</dict></plist>
"""}
"""What starts the client on time where the system has something better than cron.  A pass that is
due while a machine sleeps is made when it wakes up."""

CRON_MARK = "# cbackup: "
"""Ends each line of ours in a crontab, with the home behind it: by it the line is found again."""


def system_kind() -> str:
    """What starts services on this kind of system."""
    return "launchd" if sys.platform == "darwin" else "rc.d" if "bsd" in sys.platform else \
        "smf" if sys.platform.startswith("sunos") else "openrc" \
        if os.path.exists("/sbin/openrc-run") else "systemd"


def unit_fields(words: "List[str]", user: str, home: str) -> "Dict[str, str]":
    """What stands for the fields of the units.  words: the program up to its command."""
    from xml.sax.saxutils import escape, quoteattr
    quote, command = shlex.quote, " ".join(map(shlex.quote, words))
    places = [os.path.dirname(shutil.which("rsync") or "/usr/bin/rsync")]
    path = ":".join(dict.fromkeys(places
                                  + ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]))
    fields = dict(
        user=user, sh_path=quote(path), xml_path=escape(path, {'"': "&quot;"}),
        systemd=" ".join(map(systemd_word, words)),
        systemd_path=systemd_word("PATH=" + path).replace("$$", "$"),
        smf=quoteattr(command.replace("%", "%%") + " server &"),
        array="".join("<string>%s</string>" % escape(word) for word in words),
        openrc_program=quote(quote(words[0])),
        openrc_arguments=quote(" ".join(map(quote, words[1:] + ["server"]))),
        daemon_arguments=quote("-r -P /var/run/cbackup.pid -u %s %s server" % (user, command)))
    return dict(fields, crontab="\n".join(cron_lines(words, path, home)))


def cron_lines(words: "List[str]", path: str, home: str, server: bool = True) -> "List[str]":
    """The lines of a crontab: the server at boot, where nothing else starts it, and a pass every
    quarter of an hour, at minutes that are not the same on each machine."""
    command = ("PATH=%s %s"
               % (shlex.quote(path), " ".join(map(shlex.quote, words)))).replace("%", "\\%")
    mark, first = CRON_MARK + shlex.quote(home).replace("%",
                                                        "\\%"), \
        zlib.crc32(socket.gethostname().encode()) % 15
    at_boot = ["@reboot %s server >/dev/null %s" % (command, mark)] if server else []
    return at_boot + ["%s * * * * %s client %s"
                      % (",".join(str(first + n) for n in (0, 15, 30, 45)), command, mark)]


def with_cron_lines(text: str, lines: "List[str]", home: str) -> str:
    """A crontab in which the lines of this home are these, and everything else is as it was."""
    mark = CRON_MARK + shlex.quote(home).replace("%", "\\%")
    kept = [line for line in text.splitlines() if not line.endswith(" " + mark)]
    return "".join(line + "\n" for line in kept + lines)


class Placing:
    """What puts server and client in place on one kind of system.  Nothing is done here.

    `files`: path -> (text, mode).  `start`: commands after the files were written, `stop`: before
    they are removed, and `end`: after that; one that begins with "-" may fail.  `cron`: lines of
    the crontab.
    """

    def __init__(self, files: "Optional[Dict[str, Tuple[str, int]]]" = None,
                 start: "Iterable[List[str]]" = (), stop: "Iterable[List[str]]" = (),
                 end: "Iterable[List[str]]" = (), cron: "Iterable[str]" = ()) -> None:
        self.files, self.cron = files or {}, list(cron)
        self.start, self.stop, self.end = list(start), list(stop), list(end)


def placing_for(kind: str, words: "List[str]", user: str, home: str) -> Placing:
    """How `kind` of system gets the server at boot and the client on time.  words: the program up
    to its command."""
    fields = unit_fields(words, user, home)
    unit = SERVICE_UNITS[kind].format(**fields)
    pass_on_time = fields["crontab"].splitlines()[1:]
    if kind == "systemd":
        names = ["cbackup.service", "cbackup-client.timer"]
        files = {"/etc/systemd/system/" + name: (text.format(**fields), 0o644)
                 for name, text in CLIENT_UNITS.items() if name.startswith("cbackup-client")}
        return Placing(dict({"/etc/systemd/system/cbackup.service": (unit, 0o644)}, **files),
                       [["systemctl", "daemon-reload"], ["systemctl", "enable"] + names,
                        ["systemctl", "restart"] + names],
                       [["-systemctl", "disable", "--now"] + names],
                       [["systemctl", "daemon-reload"]])
    if kind == "launchd":
        files = {"/Library/LaunchDaemons/cbackup.server.plist": (unit, 0o644),
                 "/Library/LaunchDaemons/cbackup.client.plist": (
                     CLIENT_UNITS["cbackup.client.plist"].format(**fields), 0o644)}
        unload = [["-launchctl", "unload", "-w", path] for path in files]
        return Placing(files, unload + [["launchctl", "load", "-w", path] for path in files],
                       unload)
    if kind == "rc.d":
        return Placing({"/usr/local/etc/rc.d/cbackup": (unit, 0o555)},
                       [["sysrc", "cbackup_enable=YES"], ["service", "cbackup", "restart"]],
                       [["-service", "cbackup", "onestop"], ["-sysrc", "-x", "cbackup_enable"]],
                       cron=pass_on_time)
    if kind == "openrc":
        return Placing({"/etc/init.d/cbackup": (unit, 0o755)},
                       [["rc-update", "add", "cbackup"], ["rc-service", "cbackup", "restart"]],
                       [["-rc-service", "cbackup", "stop"], ["-rc-update", "del", "cbackup"]],
                       cron=pass_on_time)
    if kind == "smf":
        path = "/var/svc/manifest/site/cbackup.xml"
        return Placing({path: (unit, 0o644)},
                       [["svccfg", "import", path], ["svcadm", "enable", "cbackup"],
                        ["svcadm", "restart", "cbackup"]],
                       [["-svcadm", "disable", "-s", "cbackup"], ["-svccfg", "delete", "cbackup"]],
                       cron=pass_on_time)
    return Placing(cron=fields["crontab"].splitlines())


PROGRAM_PATH = "/usr/local/bin/cbackup.pyz"

CONTROLS = {"systemd": "systemctl", "launchd": "launchctl", "rc.d": "sysrc", "openrc": "rc-update",
            "smf": "svccfg",
            "cron": "crontab"}


class Installer:
    """Puts server and client in place on this machine and starts them, or takes them away.

    `top` stands before every path, and `run` runs commands (words, text for standard input; returns
    (status, output)): a test gives others.
    """

    def __init__(self, home: Home, kind: "Optional[str]" = None, top: str = "",
                 run: "Optional[Callable[..., Tuple[int, str]]]" = None) -> None:
        import getpass
        self.home, self.top, self.run, self.root = home, top, run or run_command, \
            os.geteuid() == 0 or bool(top)
        self.user = getpass.getuser()
        self.kind = kind or self.own_kind()
        if not home.path.isprintable():
            raise UsageError("%s: a home with such a name cannot be written into a service"
                             % shown(os.fsencode(home.path)))

    def own_kind(self) -> str:
        """The system's own way for root, when it is at work here; else cron."""
        kind = system_kind()
        works = self.root and shutil.which(CONTROLS[kind]) \
            and (kind != "systemd" or os.path.isdir("/run/systemd/system"))
        return kind if works else "cron"

    def install(self) -> int:
        if self.kind not in ("systemd", "launchd") and not self.top and not shutil.which("crontab"):
            raise UsageError("neither %s nor cron is at work here: install cron; `service` prints "
                             "what it would be"
                             % system_kind())
        words = self.install_program() + ["--home", self.home.path]
        placing = placing_for(self.kind, words, self.user, self.home.path)
        for path, (text, mode) in placing.files.items():
            self.write(path, text.encode(), mode)
        self.set_crontab(placing.cron)
        if self.kind == "cron":
            self.stop_server()
            self.do(["sh", "-c",
                     "nohup %s server >/dev/null 2>&1 &" % " ".join(map(shlex.quote, words))])
        for command in placing.start:
            self.do(command)
        print("server and client are in place (%s) and start by themselves; `service --remove` "
              "undoes it" % self.kind)
        return EXIT_DONE

    def remove(self) -> int:
        placing = placing_for(self.kind, own_command() + ["--home", self.home.path], self.user,
                              self.home.path)
        for command in placing.stop:
            self.do(command)
        for path in placing.files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.top + path)
                print("removed %s" % path)
        self.set_crontab([])
        if self.kind == "cron":
            self.stop_server()
        for command in placing.end:
            self.do(command)
        print("server and client are stopped and start no more; home, program and backups are as "
              "they were")
        return EXIT_DONE

    def install_program(self) -> "List[str]":
        """The program as it will be called: for root from /usr/local/bin, where it is copied to
        when it is elsewhere."""
        interpreter, path = own_command()
        if not self.root or os.path.realpath(path) == os.path.realpath(self.top + PROGRAM_PATH):
            return [interpreter, path]
        with open(path, "rb") as stream:
            data = stream.read()
        self.write(PROGRAM_PATH, data, 0o755)
        return [interpreter, PROGRAM_PATH]

    def write(self, path: str, data: bytes, mode: int) -> None:
        os.makedirs(os.path.dirname(self.top + path), exist_ok=True)
        atomic_write(self.top + path, data, mode)
        os.chmod(self.top + path, mode)  # whatever the umask is
        print("wrote %s" % path)

    def set_crontab(self, lines: "List[str]") -> None:
        """Makes `lines` those of this home in the user's crontab; leaves one alone in which nothing
        is to be changed."""
        if not self.top and not shutil.which("crontab"):
            return
        status, before = self.run(["crontab", "-l"], None)
        before = before if status == 0 else ""
        after = with_cron_lines(before, lines, self.home.path)
        if after != before and (after or status == 0):
            self.do(["crontab", "-"], after)
            print("changed the crontab of %s" % self.user)

    def stop_server(self) -> None:
        """Ends the server of this home, when one is running, and waits for its end."""
        try:
            with self.home.lock("server.lock", wait=False):
                return
        except Busy:
            pid = read_json(self.home.state("server.json")).get("pid")
        if isinstance(pid, int) and pid > 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for _ in range(200):
            with contextlib.suppress(Busy), self.home.lock("server.lock", wait=False):
                return
            time.sleep(0.1)
        raise CBackupError("the server that runs here does not end; end it by hand, and do this "
                           "again")

    def do(self, command: "List[str]", text: "Optional[str]" = None) -> None:
        """Raises CBackupError when a command that must not fail fails; one that begins with "-"
        may."""
        words = [command[0].lstrip("-")] + command[1:]
        status, output = self.run(words, text)
        if status and not command[0].startswith("-"):
            said = output.strip().splitlines()
            raise CBackupError("%s failed: %s"
                               % (" ".join(words), said[-1] if said else "status %d" % status))


def run_command(words: "List[str]", text: "Optional[str]") -> "Tuple[int, str]":
    """(status, what it printed) of a command; `text` is its standard input."""
    # what it leaves running in the background may keep this open
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(words, input=(text or "").encode(), stdout=output,
                                  stderr=subprocess.STDOUT)
        except OSError as error:
            return 127, reason_of(error)
        output.seek(0)
        return done.returncode, output.read().decode(errors="replace")


def add_service_parser(commands: Any) -> None:
    parser = commands.add_parser("service", help="start the server at boot and the client on time")
    parser.add_argument("kind", nargs="?", metavar="KIND", choices=sorted(SERVICE_UNITS),
                        help="%s; default: this system's own" % ", ".join(sorted(SERVICE_UNITS)))
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--install", action="store_true", help="put it in place and start it")
    change.add_argument("--remove", action="store_true", help="stop it and take it away")
    parser.set_defaults(run=cmd_service)


def cmd_service(args: argparse.Namespace, home: Home) -> int:
    import getpass
    if args.install:
        home.check_key()
        home.host(home.config())
        return Installer(home, args.kind).install()
    if args.remove:
        return Installer(home, args.kind).remove()
    kind = args.kind or system_kind()
    fields = unit_fields(own_command() + ["--home", home.path], getpass.getuser(), home.path)
    print(SERVICE_UNITS[kind].format(**fields), end="")
    if kind in ("rc.d", "openrc"):
        print("# The client's line in the crontab of %s; `service --install` puts all of it in "
              "place:" % fields["user"])
        print("# " + fields["crontab"].splitlines()[1])
    elif kind == "systemd":
        for name in ("cbackup-client.service", "cbackup-client.timer"):
            print("#\n# /etc/systemd/system/%s; `service --install` puts all three in place:"
                  % name)
            print("".join("# %s\n" % line
                          for line in CLIENT_UNITS[name].format(**fields).splitlines()), end="")
    return EXIT_DONE


def add_server_parser(commands: Any) -> None:
    parser = commands.add_parser("server",
                                 help="serve this host's sources and backups, in the foreground")
    parser.set_defaults(run=cmd_server)


def cmd_server(args: argparse.Namespace, home: Home) -> int:
    config = home.config()
    host = home.host(config)
    find_rsync()
    with home.lock("server.lock", wait=False):
        server = Server(home, config, host)

        def stop(number: int, frame: Any) -> None:
            server.stop()

        def ready() -> None:
            signal.signal(signal.SIGTERM, stop)
            signal.signal(signal.SIGINT, stop)
            print("cbackup server %s: listening on %s" % (host, server.where), flush=True)

        note = home.state("server.json")  # for `service`, which may have to end it
        atomic_write(note, json.dumps({"pid": os.getpid()}).encode())
        server.run(ready)
        with contextlib.suppress(OSError):
            os.unlink(note)
    return EXIT_DONE


def add_client_parser(commands: Any) -> None:
    parser = commands.add_parser("client",
                                 help="one pass over every backup of this host (for cron)")
    parser.add_argument("--until-settled", action="store_true",
                        help="repeat until a pass had nothing to do")
    parser.add_argument("--json", action="store_true",
                        help="print the pass's figures as one JSON object")
    parser.add_argument("--adopt", metavar="NAME",
                        help="take the directory of backup NAME as it is now")
    parser.add_argument("--yes", action="store_true",
                        help="with --adopt: also one of another cluster; do not ask")
    parser.set_defaults(run=cmd_client, failed={"settled": False})


def may_take_foreign(args: argparse.Namespace, spec: Backup, cluster: str) -> bool:
    """Whether the user says that a backup to be adopted may be taken from the cluster whose it is:
    its key is lost."""
    identity = read_json(os.path.join(spec.path, META_DIR.decode(), "identity"))
    if args.yes or not identity.get("id") or identity.get("cluster") == cluster \
            or not sys.stdin.isatty():
        return bool(args.yes)
    return input("%s is the backup %s of a cluster with another key.  Is that key lost, and is it "
                 "yours to take?  Its copies stay, and its own cluster will no longer know it.  "
                 "Type yes: "
                 % (spec.path, identity.get("backup"))).strip() == "yes"


def known_host(home: Home, config: Config) -> "Tuple[Config, str]":
    """The configuration and this machine's name in it; when it does not mention it, after a look
    whether the other machines have a newer one that does.  Raises UsageError."""
    if home.own_name() not in config.all_hosts():
        Client(home, config, home.own_name(), Progress(True)).exchange_config()
        config = home.config()
    return config, home.host(config)


def cmd_client(args: argparse.Namespace, home: Home) -> int:
    config, host = known_host(home, home.config())
    if args.adopt and args.adopt not in {b.name for b in config.backups_of(host)}:
        raise UsageError("this host has no backup %s" % args.adopt)
    if not config.backups_of(host):
        log.info("this host has no backup: nothing to do")
    client = Client(home, config, host, Progress(args.quiet), args.adopt)
    if args.adopt:
        client.foreign = may_take_foreign(args, config.backups[args.adopt], client.cluster)
    total: "Optional[Figures]" = None
    while True:
        figures = client.run()
        status = collect_status(home, client.config, figures.unreachable, client.dialer)
        watch = Watch(home, client.config.alert_after)
        watch.note(verdict(status))
        check = check_line(status)
        without_named(status, figures.lines)
        for line in verdict(status).lasting():
            figures.complain(line)
        for line in figures.lines[:50]:
            if not (args.quiet and any(line.startswith(gone + ": cannot be reached")
                                       for gone in figures.unreachable)):
                print("cbackup: " + line, file=sys.stderr)
        if len(figures.lines) > 50:
            print("cbackup: and %d more" % (len(figures.lines) - 50), file=sys.stderr)
        if total is not None:
            for key, value in total.counts.items():
                figures.counts[key] += value
        progressed = figures.actions and (total is None or figures.counts != total.counts)
        total = figures
        if not args.until_settled or not progressed:
            break
    watch.tell()
    if args.json:
        print(json.dumps(total.as_json()))
    elif sys.stdout.isatty() and not args.quiet:
        print("%s: %s" % (host, pass_text(total.counts)))
        print(check)
    return EXIT_INCOMPLETE if total.trouble else EXIT_DONE


STATUS_KEYS = {
    "sources": ("host", "path", "replicas", "files", "bytes", "copies", "underserved_files",
                "underserved_bytes",
                "overserved_files", "state", "last_scan", "unproven_files", "unproven_since"),
    "backups": ("host", "path", "capacity", "used", "files", "last_seen", "state")}
"""What `status --json` says of a source and of a backup; the text for people says more."""


def add_status_parser(commands: Any) -> None:
    parser = commands.add_parser("status", help="what is safe and what is not")
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")
    parser.add_argument("--check", action="store_true",
                        help="one line; exit 0 only when every file has its copies")
    parser.add_argument("--metrics", action="store_true",
                        help="print it in the text format of Prometheus")
    parser.add_argument("--html", metavar="FILE", help="write it as a page for a browser")
    parser.set_defaults(run=cmd_status)


def cmd_status(args: argparse.Namespace, home: Home) -> int:
    config = home.config()
    if args.html:
        facts = collect_facts(home, config)
        atomic_write(args.html, make_page(facts).encode("utf-8", "backslashreplace"), 0o644)
        status = facts["status"]
    else:
        status = collect_status(home, config)
    if args.check:
        Watch(home, config.alert_after).note(verdict(status))
    if args.json:
        print(status_json(status))
    elif args.metrics:
        print(make_metrics(status), end="")
    elif args.check:
        print(check_line(status))
    elif not args.html:
        hosts = {s["host"] for s in status["sources"].values()
                 if s["state"] == "held"} if args.verbose else set()
        dialer = Dialer(home)
        print_status(status, {host: Link(host, config, dialer) for host in hosts})
        for line in home.news_of_lines("status", config, home.own_name()):
            print(shown(line))
    if args.check:
        return EXIT_DONE if verdict(status).safe else EXIT_INCOMPLETE
    return EXIT_INCOMPLETE if any(s["state"] == "unreachable"
                                  for s in status["sources"].values()) else EXIT_DONE


PLAN_SOURCE_KEYS = ("host", "path", "replicas", "files", "bytes", "needed_bytes", "largest_bytes",
                    "largest_path", "problems")
"""What `plan --json` says of a source."""


def status_json(status: "Dict[str, Any]") -> str:
    """The one line of `status --json`."""
    return json.dumps({key: {name: {k: facts[k] for k in facts if k in STATUS_KEYS[key]}
                             for name, facts in value.items()}
                       if key in STATUS_KEYS else value for key, value in status.items()
                       if key in ("cluster", "config_version", "sources", "backups")})


WEB_PORT, WEB_FRESH, WEB_REFRESH, WEB_VISITORS, WEB_TIMEOUT = 5080, 5.0, 60, 16, 10.0
"""The page's port; for so many seconds the same facts are shown to everybody, a browser asks again
after so many, and serves so many visitors at once, each of whom has so many seconds to ask."""


class Web:
    """The page over HTTP: read-only, GET and HEAD.  Beyond loopback only with a token in the
    address."""

    def __init__(self, home: Home, address: str, port: int) -> None:
        import ipaddress
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM,
                                   flags=socket.AI_PASSIVE)[0]
        self.home, self.family, self.where, self.port = home, found[0], found[4], port
        self.ip = ipaddress.ip_address(found[4][0].partition("%")[0])
        self.token = "" if self.ip.is_loopback else self._token()
        shown_ip = "[%s]" % self.ip if self.ip.version == 6 else str(self.ip)
        self.url = "http://%s:%d/%s" % (shown_ip, port, "?token=" + self.token if self.token
                                        else "")
        self.names = {"localhost", socket.gethostname().lower(), home.own_name().lower(),
                      address.lower()}
        if self.token:  # a name that leads to this machine's address in its network
            self.names |= {name + ".local" for name in self.names}
            self.names.add(home.config().address(home.own_name())[0].lower())
        self._lock, self._facts = threading.Lock(), (0.0, {})  # type: Any

    def _token(self) -> str:
        """The token of this home, made at the first time."""
        path = self.home.state("web-token")
        with self.home.lock("web-token.lock"):
            with contextlib.suppress(OSError):
                with open(path) as stream:
                    token = stream.read().strip()
                if re.match(r"[0-9a-f]{32,}\Z", token):
                    return token
            token = secrets.token_hex(20)
            atomic_write(path, token.encode() + b"\n", 0o600)
        return token

    def is_for_us(self, host: "Optional[str]") -> bool:
        """Whether a request's Host is one of this machine's names or an address: a name that
        somebody else has made to lead here shows nothing."""
        import ipaddress
        match = re.match(r"(\[[0-9A-Fa-f:.]+\]|[^:]+)(?::([0-9]+))?\Z", host or "")
        if not match or int(match.group(2) or 80) != self.port:
            return False
        name = match.group(1).strip("[]").rstrip(".").lower()
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(name).is_loopback or not self.ip.is_loopback
        return name in self.names

    def may(self, query: str) -> bool:
        """Whether the address has the token, where one is needed."""
        given = query[len("token="):] if query.startswith("token=") else ""
        return not self.token or secrets.compare_digest(given.encode("utf-8", "replace"),
                                                        self.token.encode())

    def facts(self) -> "Dict[str, Any]":
        """What the page shows, not older than WEB_FRESH: however many ask, the cluster is asked
        once."""
        with self._lock:
            if not self._facts[1] or not 0 <= clock.steady() - self._facts[0] < WEB_FRESH:
                facts = collect_facts(self.home, self.home.config())
                self._facts = clock.steady(), facts
            return self._facts[1]  # type: ignore[no-any-return]

    def answer(self, path: str, query: str) -> "Tuple[int, str, str]":
        """(status, content type, text) for what is asked."""
        if not self.may(query):
            return 403, "text/plain", \
                "The address lacks the token; `cbackup.pyz web` prints the whole address.\n"
        if path not in ("/", "/status.json"):
            return 404, "text/plain", "There is / and /status.json.\n"
        try:
            facts = self.facts()
        except (CBackupError, OSError, sqlite3.Error) as error:
            return 500, "text/plain", "%s\n" % error
        if path == "/status.json":
            return 200, "application/json", status_json(facts["status"]) + "\n"
        link = "status.json" + ("?token=" + self.token if self.token else "")
        return 200, "text/html", make_page(facts, link, WEB_REFRESH)

    def serve(self, ready: "Callable[[Any], None]") -> None:
        """Answer until the server that `ready` is called with is shut down."""
        server = web_server(self)
        try:
            ready(server)
            server.serve_forever(0.2)
        finally:
            server.server_close()


WEB_HEADERS = (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
               ("Referrer-Policy", "no-referrer"),
               ("Cross-Origin-Resource-Policy", "same-origin"), ("X-Frame-Options", "DENY"))


def web_handler(web: Web) -> Any:
    """The class that answers one visitor; in here, because its parts are imported only for
    `web`."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout, server_version, sys_version = WEB_TIMEOUT, "cbackup", ""

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if not web.is_for_us(self.headers.get("Host")):
                self.reply(421, "text/plain", "This is not the address of this page.\n")
            else:
                self.reply(*web.answer(path, query))

        do_HEAD = do_GET

        def reply(self, status: int, kind: str, text: str) -> None:
            data = text.encode("utf-8", "backslashreplace")
            self.send_response(status)
            self.send_header("Content-Type", kind + "; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Security-Policy", page_policy() + "; frame-ancestors 'none'")
            for name, value in WEB_HEADERS:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def send_error(self, code: int, message: "Optional[str]" = None,
                       explain: "Optional[str]" = None) -> None:
            """What http.server itself refuses, another method than GET and HEAD for example."""
            self.close_connection = True
            self.reply(405 if code == 501 else code, "text/plain", "This page can only be read.\n"
                       if code == 501 else "That is no request for this page.\n")

        def log_message(self, form: str, *words: Any) -> None:
            log.debug("web: %s", shown((form % words).encode("utf-8", "replace")))

    return Handler


def web_server(web: Web) -> Any:
    """The HTTP server of a page, bound to its address.  Raises CBackupError when that cannot be."""
    import http.server
    import socketserver

    class Listener(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads, block_on_close, request_queue_size = True, False, 16
        address_family, allow_reuse_address = web.family, True
        places = threading.BoundedSemaphore(WEB_VISITORS)

        def server_bind(self) -> None:
            socketserver.TCPServer.server_bind(self)  # HTTPServer's asks for names first
            self.server_name, self.server_port = str(web.ip), web.port

        def process_request(self, request: Any, client_address: Any) -> None:
            if self.places.acquire(blocking=False):
                super().process_request(request, client_address)
            else:
                self.shutdown_request(request)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                self.places.release()

        def handle_error(self, request: Any, client_address: Any) -> None:
            log.info("web: %s: %s", client_address[0], sys.exc_info()[1])  # a visitor that left

    try:
        return Listener(web.where, web_handler(web))
    except OSError as error:
        raise CBackupError("cannot listen on %s port %d: %s; `web --listen ADDR:PORT` says another"
                           % (web.ip, web.port, reason_of(error)))


def add_web_parser(commands: Any) -> None:
    parser = commands.add_parser("web", help="a read-only page with the state of the cluster")
    parser.add_argument("--listen", metavar="ADDR:PORT", default="127.0.0.1:%d" % WEB_PORT,
                        help="default: 127.0.0.1:%d; beyond this machine a token is part of the "
                             "page's address" % WEB_PORT)
    parser.set_defaults(run=cmd_web)


def cmd_web(args: argparse.Namespace, home: Home) -> int:
    home.config()
    home.check_key()
    try:
        address, port = split_address(args.listen)
    except ValueError as error:
        raise UsageError(str(error))
    try:
        web = Web(home, address, port or WEB_PORT)
    except socket.gaierror as error:
        raise UsageError("%s: %s" % (args.listen, reason_of(error)))

    def ready(server: Any) -> None:
        def stop(number: int, frame: Any) -> None:
            threading.Thread(target=server.shutdown, daemon=True).start()
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        print("cbackup web: %s" % web.url, flush=True)

    web.serve(ready)
    return EXIT_DONE


def add_plan_parser(commands: Any) -> None:
    parser = commands.add_parser("plan", help="does it fit, and what happens when a host is lost?")
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")
    parser.set_defaults(run=cmd_plan, failed={"fits": None})


def cmd_plan(args: argparse.Namespace, home: Home) -> int:
    plan = collect_plan(home, home.config())
    if args.json:
        sources = {name: {key: s[key] for key in PLAN_SOURCE_KEYS}
                   for name, s in plan["sources"].items()}
        print(json.dumps(dict(plan, sources=sources)))
    else:
        print_plan(plan)
    return EXIT_DONE if plan["fits"] else EXIT_INCOMPLETE


def add_restore_parser(commands: Any) -> None:
    parser = commands.add_parser("restore", help="bring back a source, or some paths of it")
    parser.add_argument("source", help="the source's name")
    parser.add_argument("paths", nargs="*", metavar="PATH",
                        help="only these paths or patterns, relative to the source")
    parser.add_argument("--to", metavar="DIR", help="where to; default: the source's own path")
    parser.add_argument("--at", metavar="TIME",
                        help="as it was then: 2026-11-01, \"2026-11-01 14:00\", yesterday, 3d")
    parser.add_argument("--from", metavar="DIR", dest="directories", action="append", default=[],
                        help="a backup's directory that is mounted here; works without any server")
    parser.add_argument("--force", action="store_true",
                        help="move files that differ aside instead of leaving them")
    parser.add_argument("--dry-run", action="store_true", help="say what would come from where")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=cmd_restore, failed={"complete": False})


def config_for_restore(args: argparse.Namespace, home: Home) -> Config:
    """The configuration; with --from one that is missing or wrong is no obstacle."""
    try:
        config = home.config()
    except CBackupError as error:
        if not args.directories:
            raise
        if os.path.exists(home.config_path):
            log.warning("%s; going on without it", str(error).splitlines()[0])
        config = parse_config("")
    if not _is_name(args.source):
        raise UsageError("%r is not a source's name; there are: %s"
                         % (args.source, ", ".join(config.sources) or "none"))
    return config


def restore_target(args: argparse.Namespace, home: Home, config: Config) -> str:
    """Where a restore goes to; empty for a dry run that need not know it.  Raises UsageError when
    nobody has said it: what is right on the source's own host would be a surprise on another."""
    spec = config.sources.get(args.source)
    if args.to:
        return os.path.abspath(args.to)
    if spec is None and not args.dry_run:
        raise UsageError("where to?  Say --to DIR: no configuration here says where %s was"
                         % args.source)
    if spec is not None and (args.directories or home.own_name() == spec.host):
        return spec.path
    if spec is None or args.dry_run:
        return ""
    raise UsageError("%s lives on %s, and this machine is %s: say --to DIR, or --host %s if it is "
                     "to be %s from now on"
                     % (args.source, spec.host, home.own_name(), spec.host, spec.host))


def check_known_source(restore: Restore, config: Config) -> None:
    """A source of which nobody has anything and that has no line either is a mistake in its
    name."""
    holders = restore.holders
    if restore.source not in config.sources and not any(h.catalogs for h in holders.each):
        raise UsageError("there is no source %s, and %s has something of one; there are: %s" % (
            restore.source, "no backup that can be reached (not reachable: %s)" % ", ".join(
                sorted(holders.down.values())) if holders.down else "no backup",
            ", ".join(config.sources) or "none"))


def cmd_restore(args: argparse.Namespace, home: Home) -> int:
    config = config_for_restore(args, home)
    target = restore_target(args, home, config)
    at = None if args.at is None else parse_time(args.at)
    restore = Restore(args.source, target, args.paths, at, args.force, Progress(args.quiet),
                      dict.fromkeys(args.directories))
    if not args.directories or config.backups and os.path.exists(home.key_path) \
            and shutil.which("rsync"):
        find_rsync()
        restore.holders.find(config, Dialer(home))
    if not args.directories:  # disks without any of it say so themselves
        check_known_source(restore, config)
    if args.dry_run:
        return print_dry_run(restore, args.json, args.verbose > 0)
    try:
        complete = restore.run(whole=not args.paths)
    except (sqlite3.Error, OSError) as error:
        info = os.statvfs(target) if os.path.isdir(target) else None
        # SQLite calls that an I/O error
        full = info is not None and info.f_bavail * info.f_frsize < 1 << 20
        raise CBackupError("%s: %s; what is there stays, run it again" % (
            target, "its disk is full" if full else reason_of(error)))
    restore.progress.clear()
    report_restore(restore, complete, args.json)
    return EXIT_DONE if complete else EXIT_INCOMPLETE


def print_dry_run(restore: Restore, as_json: bool, each: bool = False) -> int:
    """What would come from where, how much, and how long it would take; with `each` also what
    becomes of each file."""
    with tempfile.TemporaryDirectory(prefix="cbackup-") as scratch:
        plan = restore.dry_run(scratch)
        for path, size, word in restore.planned() if each and not as_json else ():
            print("%-8s %10s  %s" % (word, format_size(size), shown(path)))
    code = EXIT_INCOMPLETE if plan["missing_files"] else EXIT_DONE
    if as_json:
        print(json.dumps(dict(restore.counts, **origin_of(restore), **plan)))
        return code
    print("%s, %s%s, as of %s (the catalog of %s)" % (
        count_of(restore.counts["files"], "file"), format_size(restore.counts["bytes"]),
        " into %s" % restore.target.path if restore.target.path else "",
        format_time(restore.catalog_time), restore.catalog_from))
    if plan["free_bytes"] is not None and plan["needed_bytes"] > plan["free_bytes"]:
        print("    NO ROOM: %s are needed, %s are free" % (
            format_size(plan["needed_bytes"]), format_size(plan["free_bytes"])))
    if plan["kept_files"]:
        print("    %s there already, by size and time" % count_of(plan["kept_files"], "file"))
    if plan["refused_files"]:
        print("    %s in the place of which there is something else; --force moves it aside"
              % count_of(plan["refused_files"], "file"))
    for name, share in plan["holders"].items():
        if share["files"]:
            print("    %s from %s: %s, at %s/s"
                  % (count_of(share["files"], "file"), name, format_size(share["bytes"]),
                    format_size(share["rate"])))
    if plan["missing_files"]:
        print("    %s that nobody has who can be reached" % count_of(plan["missing_files"], "file"))
    if restore.holders.down:
        print("    not reachable: %s" % ", ".join(sorted(restore.holders.down.values())))
    print("it would take about %s" % format_seconds(max(1.0, plan["seconds"])))
    return code


def origin_of(restore: Restore) -> "Dict[str, Any]":
    """From when and whom the list of files is, and where they go: for --json."""
    return {"catalog_time": restore.catalog_time, "catalog_from": restore.catalog_from,
            "target": restore.target.path or None}


SHOWN_MISSING = 1000
"""Missing files that are named one by one without --json, which names all of them."""


def report_restore(restore: Restore, complete: bool, as_json: bool) -> None:
    missing, in_the_way = restore.missing_count(), restore.in_the_way()
    if as_json:
        print(json.dumps(dict(
            restore.counts, complete=complete, missing_files=missing, refused_files=in_the_way,
            **origin_of(restore),
            missing=[{"path": as_text(path), "reason": why} for path, why in restore.missing()],
            unproven=[as_text(path) for path in restore.unproven()],
            unreadable=[as_text(path) for path in restore.unreadable()])))
        return
    for path in restore.unproven():
        log.info("%s: what the backups have; its own host had not read the file again when the "
                 "catalog was made", shown(path))
    unreadable = 0
    for path in restore.unreadable():
        unreadable += 1
        log.info("%s: its own host could not read it when the catalog was made; what there is of "
                 "it is older", shown(path))
    for path, why in itertools.islice(restore.missing(), SHOWN_MISSING):
        print("cbackup: %s: %s" % (shown(path), shown(why)), file=sys.stderr)
    if missing + in_the_way > SHOWN_MISSING:
        print("cbackup: and %d more; --json names them all"
              % (missing + in_the_way - SHOWN_MISSING), file=sys.stderr)
    for text, count in restore.target.metadata.notes.items():
        print("cbackup: %s, %d times" % (text, count), file=sys.stderr)
    back = "everything is back" if complete else "NOT everything is back: %s" % ", ".join(
        part for part in (missing and "%s missing" % count_of(missing, "file"),
                          in_the_way and "%s in the way" % count_of(in_the_way, "other path"),
                          restore.unmatched
                          and "%s matched nothing" % count_of(len(restore.unmatched), "argument"))
        if part)
    unproven = restore.unproven_count()
    print("%s: %s (%s restored, %s; %s were there already) in %s, as of %s, by the catalog of %s%s"
          % (
        restore.source, back, count_of(restore.counts["restored_files"], "file"),
        format_size(restore.counts["restored_bytes"]),
        format(restore.counts["kept_files"], ","), restore.target.path,
        format_time(restore.catalog_time), restore.catalog_from,
        "".join("; %s %s (-v names them)" % (format(count, ","), words) for count, words in (
            (unproven, "of them not proven yet at that time"),
            (unreadable, "could not be read by their own host at that time")) if count)))


def add_find_parser(commands: Any) -> None:
    parser = commands.add_parser("find",
                                 help="where copies and older versions of matching files are")
    parser.add_argument("pattern", metavar="PATTERN",
                        help="a path, or a pattern such as '*.jpg' or '2024/*'")
    parser.add_argument("--json", action="store_true", help="print the hits as one JSON object")
    parser.set_defaults(run=cmd_find, failed={"files": []})


def found_versions(answers: "Dict[str, Dict[str, Any]]", config: Config,
                   ) -> "Dict[Tuple[str, str], List[Dict[str, Any]]]":
    """(source, path) -> what there is of it, copies first, then old versions, the newest first.
    answers: host -> of `find`."""
    files: "Dict[Tuple[str, str], List[Dict[str, Any]]]" = {}
    for host, answer in sorted(answers.items()):
        times = itertools.chain(answer["at"], itertools.repeat(None))  # older servers say none
        for (backup, source, path, size, mtime, since), at in zip(answer["rows"], times):
            if backup not in config.backups or config.backups[backup].host != host:
                continue  # a server speaks for its own backups
            files.setdefault((source, path), []).append({
                "backup": backup, "host": host, "size": size, "mtime": mtime / 1e9, "until": since,
                "at": at})
    for versions in files.values():
        versions.sort(key=lambda found: (
            found["until"] is not None, -(found["until"] or 0), found["backup"]))
    return files


def version_text(found: "Dict[str, Any]") -> str:
    """A copy or an old version in words, with what brings it back."""
    text = "%s, %s, of %s" % ("a copy" if found["until"] is None else "old version",
                              format_size(found["size"]), format_time(found["mtime"]))
    if found["until"] is not None:
        text += ", until %s" % format_time(found["until"])
    return text if found["at"] is None else text + "; --at '%s'" % format_time(found["at"])


def cmd_find(args: argparse.Namespace, home: Home) -> int:
    config = home.config()
    hosts = sorted({b.host for b in config.backups.values()})
    answers, down = ask_all(Dialer(home), config, hosts, "find",
                            pattern=as_text(os.fsencode(args.pattern)))
    files = found_versions(answers, config)
    if args.json:
        print(json.dumps({"unreachable": sorted(down), "files": [
            {"source": source, "path": path, "versions": versions}
            for (source, path), versions in sorted(files.items())]}))
    else:
        for (source, path), versions in sorted(files.items()):
            print("%s/%s%s" % (source, shown(as_raw(path)), "" if source in config.sources else
                               "    (%s has no line in the configuration any more)" % source))
            for found in versions:
                print("    %(backup)s on %(host)s: " % found + version_text(found))
        if any(answer["more"] for answer in answers.values()):
            print("there are more; give a narrower pattern", file=sys.stderr)
    for host, why in sorted(down.items()):
        print("cbackup: %s" % why, file=sys.stderr)
    return EXIT_INCOMPLETE if down or not files else EXIT_DONE


def add_ls_parser(commands: Any) -> None:
    parser = commands.add_parser("ls", help="what a directory of a source had, now or then")
    parser.add_argument("source", help="the source's name")
    parser.add_argument("path", nargs="?", metavar="PATH", default="",
                        help="a directory or a file in it; default: its root")
    parser.add_argument("--at", metavar="TIME",
                        help="as it was then: 2026-11-01, \"2026-11-01 14:00\", yesterday, 3d")
    parser.add_argument("--times", action="store_true",
                        help="the times at which something changed, for --at")
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")
    parser.set_defaults(run=cmd_ls)


def cmd_ls(args: argparse.Namespace, home: Home) -> int:
    config = home.config()
    check_source(args.source, config)
    if args.times:
        return list_times(args, home, config)
    path = os.path.normpath("/" + args.path).lstrip("/")
    at = None if args.at is None else parse_time(args.at)
    listing = collect_listing(home, config, args.source, os.fsencode(path), at)
    if args.json:
        print(json.dumps({key: value for key, value in listing.items() if key != "reasons"}))
    else:
        print_listing(listing)
    for line in listing["reasons"]:
        print("cbackup: %s; what it has is not in this list" % line, file=sys.stderr)
    return EXIT_INCOMPLETE if listing["unreachable"] else EXIT_DONE


def check_source(name: str, config: Config) -> None:
    if name not in config.sources:
        raise UsageError("there is no source %s; there are: %s"
                         % (name, ", ".join(config.sources) or "none"))


def list_times(args: argparse.Namespace, home: Home, config: Config) -> int:
    """The times at which something of a source changed, of those of which a catalog can be had, the
    newest first.  Where the source's server does not answer, also those with news of copies
    only."""
    holders = Holders(args.source)
    holders.find(config, Dialer(home))
    times, before = [], 0
    for upto, when in sorted({f.upto: f.time for holder in holders.each
                              for f in holder.catalogs}.items()):
        known = [differs for gen, differs in holders.differs.items() if before < gen <= upto]
        if any(known) or not known:
            times.insert(0, when)
            before = upto
    if args.json:
        print(json.dumps({"source": args.source, "times": times}))
    else:
        for when in times:
            print(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)))
    for name in sorted(holders.down.values()):
        print("cbackup: %s cannot be asked" % name, file=sys.stderr)
    return EXIT_INCOMPLETE if holders.down or not times else EXIT_DONE


def add_log_parser(commands: Any) -> None:
    parser = commands.add_parser("log", help="what the passes of this host did, the newest first")
    parser.add_argument("--json", action="store_true", help="print them as one JSON object")
    parser.set_defaults(run=cmd_log)


def cmd_log(args: argparse.Namespace, home: Home) -> int:
    home.config()  # a home that is none is no empty log
    if args.json:
        print(json.dumps({"passes": list(home.passes())}))
        return EXIT_DONE
    for begun, last, text, wrong in pass_lines(home.passes()):
        print("%s  %s" % (format_when(begun)
                          + ("" if last == begun else " to " + format_when(last)), text))
        for line in wrong:
            print("    " + line)
    return EXIT_DONE


def add_forget_parser(commands: Any) -> None:
    parser = commands.add_parser("forget",
                                 help="delete the copies of a source that is no longer in the "
                                      "configuration")
    parser.add_argument("source", help="the source's name")
    parser.add_argument("--everywhere", action="store_true",
                        help="tell the other hosts' clients to do it too")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(run=cmd_forget)


def cmd_forget(args: argparse.Namespace, home: Home) -> int:
    config = home.config()
    host = home.host(config)
    if args.source in config.sources:
        raise UsageError("source %s is in the configuration; remove its line first" % args.source)
    if not _is_name(args.source):
        raise UsageError("%r is not a source's name" % args.source)
    if not args.yes:
        if not sys.stdin.isatty():
            raise UsageError("forget deletes all copies and old versions of %s; say --yes"
                             % args.source)
        if input("Delete all copies and old versions of %s%s?  Type yes: " % (
                args.source, " on all hosts" if args.everywhere
                else " on this host")).strip() != "yes":
            return EXIT_INCOMPLETE
    client, figures = Client(home, config, host, Progress(args.quiet)), Figures()
    home.note_forget(args.source, [spec.name for spec in config.backups_of(host)])
    for spec in config.backups_of(host):
        # one that is at work is not waited for: its next pass does it
        client.run_one(spec, figures, lambda one: None)
    others = sorted({b.host for b in config.backups.values()} - {host}) if args.everywhere else []
    down = ask_all(Dialer(home), config, others, "forget_source", source=args.source)[1]
    for line in figures.lines + sorted(down.values()):
        print("cbackup: " + line, file=sys.stderr)
    return EXIT_INCOMPLETE if figures.trouble or down else EXIT_DONE


def add_verify_parser(commands: Any) -> None:
    parser = commands.add_parser("verify", help="read this host's copies and check them now")
    parser.set_defaults(run=cmd_verify)


def cmd_verify(args: argparse.Namespace, home: Home) -> int:
    config = home.config()
    host = home.host(config)
    client = Client(home, config, host, Progress(args.quiet))
    figures, counts = Figures(), []

    def work(one: Pass) -> None:
        one.prepare()
        counts.append(one.verify(float("inf"), clock.now()))
        one.look_around()

    for spec in config.backups_of(host):
        client.run_one(spec, figures, work)
    client.progress.clear()
    for line in figures.lines:
        print("cbackup: " + line, file=sys.stderr)
    if sys.stdout.isatty() or args.verbose:
        print("%s read" % count_of(sum(counts), "copy" if sum(counts) == 1 else "copie"))
    return EXIT_INCOMPLETE if figures.trouble else EXIT_DONE


def add_accept_parser(commands: Any) -> None:
    parser = commands.add_parser("accept",
                                 help="let a held-back mass change of a source, or of the "
                                      "configuration, through")
    parser.add_argument("source",
                        help="the source's name; `config` for a configuration that is held back")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(run=cmd_accept)


def cmd_accept(args: argparse.Namespace, home: Home) -> int:
    config = home.config()
    if args.source == "config" and (home.held_config() or "config" not in config.sources):
        return accept_config(args, home, config)
    if args.source not in config.sources:
        raise UsageError("there is no source %s; there are: %s"
                         % (args.source, ", ".join(config.sources) or "none"))
    link = Link(config.sources[args.source].host, config, Dialer(home))
    count = print_held_files(held_files_of(link, args.source), None if args.verbose else 10)
    if count and not agreed(args,
                            "Let %s of %s through"
                            % ("this change" if count == 1 else "these changes", args.source)):
        return EXIT_INCOMPLETE
    print(link.call("accept", source=args.source)["text"])
    return EXIT_DONE


def agreed(args: argparse.Namespace, question: str) -> bool:
    """Whether somebody at a terminal says yes; without a terminal, or with --yes, nobody is
    asked."""
    return args.yes or not sys.stdin.isatty() or input(question + "?  Type yes: ").strip() == "yes"


def accept_config(args: argparse.Namespace, home: Home, config: Config) -> int:
    """Let go what a changed configuration removes, and have the hosts that can be reached know of
    it at once."""
    removes = home.held_config().get("removes")
    if removes:
        print("The configuration that is held back here removes %s." % removes)
        if not agreed(args, "Put it in force"):
            return EXIT_INCOMPLETE
    home.accept_config()
    figures, host = Figures(), home.own_name()
    Client(home, home.config(), host, Progress(args.quiet)).exchange_config(figures)
    print("configuration: accepted%s"
          % ("; not yet known to %s" % ", ".join(sorted(figures.unreachable))
             if figures.unreachable else ""))
    return EXIT_DONE


def add_demo_parser(commands: Any) -> None:
    parser = commands.add_parser("demo",
                                 help="a cluster of four hosts on loopback: back up, lose two "
                                      "hosts, restore, compare")
    parser.add_argument("directory", nargs="?", metavar="DIR",
                        help="what to back up; default: made-up files")
    parser.set_defaults(run=cmd_demo)


def cmd_demo(args: argparse.Namespace, home: Home) -> int:
    find_rsync()
    if args.directory and not os.path.isdir(args.directory):
        raise UsageError("%s is not a directory" % args.directory)
    with tempfile.TemporaryDirectory(prefix="cbackup-demo-") as base:
        demo = Demo(args.directory, base)
        try:
            return demo.run()
        finally:
            demo.stop()


def add_common_options(parser: argparse.ArgumentParser, **default: Any) -> None:
    """What every command takes, before its name and behind it.  default: nothing, or how absence is
    left alone."""
    parser.add_argument("--home", metavar="DIR",
                        help="configuration, key and state; default $CBACKUP_HOME, for root "
                        "%s, else ~/.cbackup" % ROOT_HOME, **default)
    parser.add_argument("--host", metavar="NAME", help="this machine's name in the configuration",
                        **default)
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="count", help="say more; twice: everything",
                        **(default or {"default": 0}))
    volume.add_argument("-q", "--quiet", action="store_true",
                        help="say nothing of hosts that are down; no progress",
                        **default)


HELP: "Dict[str, Tuple[str, ...]]" = {
    "init": ("Makes the home of the first machine: the cluster's key and a commented "
             "configuration.  What is there already stays as it "
             "is.", "sudo python3 cbackup.pyz init"),
    "invite": ("Prints the one line to type on a new machine.  Its token is good once, and for one "
               "hour.",
               "sudo cbackup.pyz invite"),
    "join": ("Fetches key and configuration from a machine of the cluster, after it has made sure "
             "by the token that it is "
             "one.", "sudo python3 cbackup.pyz join 192.168.1.10:5005 TOKEN --install"),
    "service": ("Prints what starts the server at boot and the client on time; with --install puts "
                "that in place and starts both.  Root's program is then "
                "/usr/local/bin/cbackup.pyz.",
                "sudo python3 cbackup.pyz service --install"),
    "server": ("Serves this host's sources and backups to the other hosts, in the foreground, "
               "until it is told to end.",
               "cbackup.pyz server"),
    "client": ("Makes one pass: brings every backup of this host up to date, as far as the other "
               "hosts can be reached.  Without a terminal it prints nothing unless something is "
               "wrong.",
               "sudo cbackup.pyz client --until-settled"),
    "status": ("Says what is safe and what is not, across the cluster.", "cbackup.pyz status",
               "cbackup.pyz status --check || echo 'not safe'",
               "cbackup.pyz status --html page.html"),
    "web": ("Serves a read-only page with the state of the cluster, until it is told to end.",
            "cbackup.pyz web --listen 127.0.0.1:5080"),
    "plan": ("Says whether everything fits, and what the loss of each host would mean now.",
             "cbackup.pyz plan"),
    "restore": ("Brings back a source, or some paths of it, from whichever hosts are up.  What is "
                "there already and is right stays; what differs is moved aside with --force.",
                "cbackup.pyz restore documents --to /tmp/documents",
                "cbackup.pyz restore photos '2024/*' --at 2026-11-01 --to /tmp/photos"),
    "find": ("Says where copies and older versions of matching files are.",
             "cbackup.pyz find '*.jpg'"),
    "ls": ("Shows what a directory of a source had, now or at another time: time, size, copies, "
           "how many older versions.",
           "cbackup.pyz ls photos 2026/11 --at 3d"),
    "log": ("Shows what the passes of this host did, the newest first.", "cbackup.pyz log"),
    "verify": ("Reads all copies on this host now, and sets bad ones aside, instead of a few in "
               "each pass.",
               "sudo cbackup.pyz verify"),
    "accept": ("Lets a mass change of a source through that was held back.",
               "cbackup.pyz accept photos"),
    "forget": ("Deletes the copies and old versions of a source that is no longer in the "
               "configuration.",
               "sudo cbackup.pyz forget photos --everywhere"),
    "demo": ("Makes a cluster of four hosts on this machine in a temporary directory, backs up, "
             "kills two hosts, restores, compares, and cleans "
             "up.", "python3 cbackup.pyz demo ~/Documents"),
    "completion": ("Prints what lets a shell complete cbackup's commands and options.",
                   "cbackup.pyz completion bash > /etc/bash_completion.d/cbackup"),
    "help": ("Shows the help of a command, or what commands there are.",
             "cbackup.pyz help restore"),
    "version": ("Prints the version.", "cbackup.pyz version")}
"""What --help says of each command, and examples."""


def add_help_parser(commands: Any) -> None:
    parser = commands.add_parser("help", help="the help of a command")
    parser.add_argument("about", nargs="?", metavar="COMMAND", choices=sorted(HELP), help="which")
    parser.set_defaults(run=cmd_help)


def cmd_help(args: argparse.Namespace, home: Home) -> int:
    parser = build_parser()
    (commands_of(parser)[args.about] if args.about else parser).print_help()
    return EXIT_DONE


def add_version_parser(commands: Any) -> None:
    parser = commands.add_parser("version", help="the version")
    parser.set_defaults(run=cmd_version)


def cmd_version(args: argparse.Namespace, home: Home) -> int:
    print("cbackup " + __version__)
    return EXIT_DONE


def commands_of(parser: argparse.ArgumentParser) -> "Dict[str, argparse.ArgumentParser]":
    """The parsers of all commands by their names."""
    return next(action.choices for action in parser._actions  # type: ignore[return-value]
                if isinstance(action, argparse._SubParsersAction))


def options_of(parser: argparse.ArgumentParser) -> "List[Tuple[List[str], str, bool]]":
    """(names, what it does, whether a value follows) of each option."""
    return [(list(action.option_strings), (action.help or "").replace("%%", "%"), action.nargs != 0)
            for action in parser._actions if action.option_strings]


def bash_completion(parser: argparse.ArgumentParser) -> "Iterator[str]":
    def words(one: argparse.ArgumentParser) -> str:
        return " ".join(name for names, _, _ in options_of(one) for name in names)
    commands = commands_of(parser)
    yield "# bash completion for cbackup, made by `cbackup.pyz completion bash`"
    yield "_cbackup() {"
    yield "    local word command= current=${COMP_WORDS[COMP_CWORD]}"
    yield '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do'
    yield "        case $word in %s) command=$word; break;; esac" % "|".join(commands)
    yield "    done"
    yield "    case $command in"
    yield "        '') word='%s %s';;" % (" ".join(commands), words(parser))
    for name, one in commands.items():
        yield "        %s) word='%s';;" % (name, words(one))
    yield "    esac"
    yield '    COMPREPLY=($(compgen -W "$word" -- "$current"))'
    yield "}"
    yield "complete -o default -F _cbackup cbackup.pyz cbackup"


def zsh_completion(parser: argparse.ArgumentParser) -> "Iterator[str]":
    def described(pairs: "Iterable[Tuple[str, str]]") -> str:
        return " ".join(shlex.quote("%s:%s" % (name.replace(":", "\\:"), text))
                        for name, text in pairs)
    commands = commands_of(parser)
    yield "#compdef cbackup.pyz cbackup"
    yield "# made by `cbackup.pyz completion zsh`"
    yield "local -a choices"
    yield "local command=${words[(r)%s]}" % "|".join(commands)
    yield "case $command in"
    yield "    '') choices=(%s); _describe command choices; return;;" % described(
        (name, HELP[name][0].partition(".")[0]) for name in commands)
    for name, one in commands.items():
        yield "    %s) choices=(%s);;" % (name,
                                          described((n, text) for names, text, _ in options_of(one)
                                                    for n in names))
    yield "esac"
    yield "_describe -o option choices"
    yield "_files"


def fish_completion(parser: argparse.ArgumentParser) -> "Iterator[str]":
    commands = commands_of(parser)
    yield "# made by `cbackup.pyz completion fish`"
    for name, one in commands.items():
        yield "complete -c cbackup.pyz -n __fish_use_subcommand -a %s -d %s" % (
            name, shlex.quote(HELP[name][0].partition(".")[0]))
        for names, text, value in options_of(one):
            words = " ".join(("-l %s" if n.startswith("--") else "-s %s") % n.lstrip("-")
                             for n in names)
            yield "complete -c cbackup.pyz -n '__fish_seen_subcommand_from %s' %s%s -d %s" % (
                name, words, " -r" if value else "", shlex.quote(text))


def add_completion_parser(commands: Any) -> None:
    parser = commands.add_parser("completion",
                                 help="what lets a shell complete commands and options")
    parser.add_argument("shell", metavar="SHELL", choices=["bash", "fish", "zsh"],
                        help="bash, fish or zsh")
    parser.set_defaults(run=cmd_completion)


def cmd_completion(args: argparse.Namespace, home: Home) -> int:
    make = {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}[args.shell]
    print("\n".join(make(build_parser())))
    return EXIT_DONE


COMMANDS: "Dict[str, Callable[[Any], None]]" = {
    "init": add_init_parser, "invite": add_invite_parser, "join": add_join_parser,
    "service": add_service_parser, "server": add_server_parser, "client": add_client_parser,
    "status": add_status_parser, "web": add_web_parser, "plan": add_plan_parser,
    "restore": add_restore_parser, "find": add_find_parser, "ls": add_ls_parser,
    "log": add_log_parser, "verify": add_verify_parser, "accept": add_accept_parser,
    "forget": add_forget_parser, "demo": add_demo_parser, "completion": add_completion_parser,
    "help": add_help_parser, "version": add_version_parser}
"""What makes the parser of each command, in the order of `--help`."""


def build_parser(names: "Iterable[str]" = COMMANDS) -> Parser:
    """A parser for these commands; those of all together take longer than a pass with nothing to
    do."""
    parser = Parser(prog="cbackup.pyz",
                    description="A backup that lives on the free space of the UNIX machines you "
                                "have.")
    add_common_options(parser)
    parser.add_argument("--version", action="version", version="cbackup " + __version__)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", parser_class=Parser)
    for name in names:
        COMMANDS[name](commands)
    for name, command in commands.choices.items():
        add_common_options(command, default=argparse.SUPPRESS)
        command.formatter_class = HelpFormatter
        command.description, command.epilog = HELP[name][0], \
            "example:\n  " + "\n  ".join(HELP[name][1:])
    return parser


def parse_arguments(arguments: "List[str]") -> argparse.Namespace:
    """Raises UsageError, and SystemExit for --help and --version."""
    first = next((word for word in arguments if word in COMMANDS or word in ("-h", "--help")), "")
    if first in COMMANDS:
        # whose words would be those of one that knows one command
        with contextlib.suppress(UsageError):
            return build_parser([first]).parse_args(arguments)
    return build_parser().parse_args(arguments)


class Outlet:
    """A standard stream that cannot stop the work: what it does not take is lost, and `failed` says
    why."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.encoding = getattr(stream, "encoding", "utf-8")
        self.failed: "Optional[OSError]" = None

    def write(self, text: str) -> int:
        if self.failed is None:
            try:
                self.stream.write(text)
            except OSError as error:
                self.failed = error
        return len(text)

    def flush(self) -> None:
        if self.failed is None:
            try:
                self.stream.flush()
            except OSError as error:
                self.failed = error

    def isatty(self) -> bool:
        return bool(self.stream.isatty())

    def fileno(self) -> int:
        return int(self.stream.fileno())

    def abandon(self) -> None:
        """What is still kept for it must not make the interpreter's end fail."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def open_closed_streams() -> None:
    """Standard streams that are closed lead nowhere from now on: a file that is opened would get
    the number of one, and what is printed would land in it.  Writing to them fails, as it does on a
    full disk."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            found = os.open(os.devnull, os.O_RDONLY)
            if found != number:
                os.dup2(found, number)
                os.close(found)
    sys.stdin = sys.stdin or open(0, "r", closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


COLLECT_EVERY = 10000
"""Objects that come into being between two looks for cycles.  A batch is some thousand rows without
any; to go through them every 700 objects, as Python does by itself, was 5 % of a pass."""


def main(argv: "Optional[List[str]]" = None) -> int:
    """Run one command; returns the exit status.  Everything that goes wrong becomes one line.  That
    something could not be printed does not end the work before its time, and is in the exit
    status."""
    open_closed_streams()
    gc.set_threshold(COLLECT_EVERY)
    streams = sys.stdout, sys.stderr
    out, err = Outlet(sys.stdout), Outlet(sys.stderr)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        code = run_arguments(sys.argv[1:] if argv is None else argv)
        out.flush()
        if out.failed is not None and out.failed.errno != errno.EPIPE:  # `| head` has seen enough
            print("cbackup: not all could be printed: %s" % reason_of(out.failed), file=sys.stderr)
        err.flush()
    finally:
        for outlet in (out, err):
            if outlet.failed is not None:
                outlet.abandon()
        sys.stdout, sys.stderr = streams
    return code or (EXIT_DONE if out.failed is None and err.failed is None else EXIT_INCOMPLETE)


def run_arguments(arguments: "List[str]") -> int:
    """Parse and run one command; what it raises is told, with --json also as one object, {"error"}
    and `failed` of its parser."""
    args = argparse.Namespace()
    try:
        require_python_parts()
        args = parse_arguments(arguments)
        if not args.command:
            raise UsageError("which command?  See `cbackup.pyz --help`")
        logging.basicConfig(handlers=[LogHandler(sys.stderr)],
                            level=[logging.WARNING, logging.INFO,
                                   logging.DEBUG][min(args.verbose, 2)])
        logging.getLogger().handlers[0].setFormatter(PlainFormatter("cbackup: %(message)s"))
        Progress.quiet = args.quiet
        return int(args.run(args, Home(args.home, args.host)))
    except SystemExit as end:  # --help, --version
        return end.code if isinstance(end.code, int) else EXIT_DONE
    except BaseException as error:
        if not isinstance(error, (CBackupError, KeyboardInterrupt, sqlite3.Error, OSError)) \
                and (os.environ.get("CBACKUP_TEST") == "1"
                     or any(re.match(r"-v+\Z", word) for word in arguments)):
            raise
        text, code = words_for(error, args)
    clear_line()
    for line in text.split("\n"):
        print("cbackup: " + shown(line), file=sys.stderr)
    if vars(args).get("json", "--json" in arguments):
        print(json.dumps(dict(vars(args).get("failed", {}), error=text)))
    return code


def words_for(error: BaseException, args: argparse.Namespace) -> "Tuple[str, int]":
    """(what is said of something that ended a command, its exit status)."""
    if isinstance(error, CBackupError):
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, sqlite3.Error):
        return "a database in %s cannot be used: %s" % (Home(args.home).state_path,
                                                        error), EXIT_INCOMPLETE
    if isinstance(error, OSError):
        named = isinstance(error.filename, (str, bytes))
        where = shown(os.fsencode(error.filename)) + ": " if named else ""
        return where + reason_of(error), EXIT_INCOMPLETE
    return "a mistake in cbackup itself (%s: %s); -v shows where" % (error.__class__.__name__,
                                                                     error), EXIT_INCOMPLETE


if __name__ == "__main__":
    sys.exit(main())
