#!/bin/sh
# Writes cbackup.pyz, the whole program in one file that runs by itself, beside this script.
#
#   sh build_zipapp.sh [--deps]
#
# --deps first installs those of the programs that cbackup runs (rsync, openssl) that are missing, with
# the system's own package manager; where nothing is missing it does nothing.
#
# The same cbackup.py gives the same bytes every time: the names are sorted, and times and permissions
# are fixed. The file is complete before it gets its name, so that a running cron job never meets half
# of it. $PYTHON chooses the interpreter that builds (default: python3).
set -eu

directory=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}

fail() {
    echo "build_zipapp.sh: $1" >&2
    exit "${2:-1}"
}

has() { command -v "$1" >/dev/null 2>&1; }

# ---- what is missing ---------------------------------------------------------------------------

# The packages of what is missing. FreeBSD and pkgsrc have a part of Python's library in a package of its own.
missing_packages() {
    missing=
    for program in rsync openssl; do
        has "$program" || missing="$missing $program"
    done
    case $manager in
        pkg | pkgin)
            "$python" -c 'import sqlite3' 2>/dev/null ||
                missing="$missing $("$python" -c 'import sys; print("py%d%d-sqlite3" % sys.version_info[:2])')" ;;
    esac
    echo "${missing# }"
}

find_manager() {
    for manager in apt-get dnf apk pacman zypper pkg brew pkgin; do
        if has "$manager"; then return; fi
    done
    manager=
}

install_command() {
    case $manager in
        apt-get) echo "apt-get install -y -q --no-install-recommends" ;;
        dnf)     echo "dnf install -y -q" ;;
        apk)     echo "apk add --no-progress" ;;
        pacman)  echo "pacman -Sy --noconfirm --needed" ;;
        zypper)  echo "zypper --non-interactive install" ;;
        pkg)     echo "pkg install -y" ;;
        brew)    echo "brew install" ;;
        pkgin)   echo "pkgin -y install" ;;
    esac
}

install_missing() {
    find_manager
    packages=$(missing_packages)
    [ -n "$packages" ] || return 0
    [ -n "$manager" ] ||
        fail "$packages: missing, and no package manager known here (apt-get, dnf, apk, pacman, zypper, pkg, brew, pkgin); install it by hand"
    how="$(install_command) $packages"
    as_root=
    if [ "$manager" != brew ] && [ "$(id -u)" -ne 0 ]; then     # Homebrew refuses root
        has sudo && sudo -n true </dev/null >/dev/null 2>&1 ||
            fail "$packages: missing, and only root may install it: $how"
        as_root="sudo -n"
    fi
    echo "installing $packages: ${as_root:+$as_root }$how"
    if [ "$manager" = apt-get ]; then       # a fresh machine has no lists of packages; without a network the old ones have to do
        $as_root apt-get update -q </dev/null || true
        $as_root env DEBIAN_FRONTEND=noninteractive $how </dev/null || fail "that failed: $how"
    else
        $as_root $how </dev/null || fail "that failed: $how"
    fi
    hash -r
    packages=$(missing_packages)
    [ -z "$packages" ] || fail "$packages: still missing after: $how"
}

# ---- the run -----------------------------------------------------------------------------------

deps=
for argument in "$@"; do
    case $argument in
        --deps) deps=yes ;;
        *) fail "unknown argument $argument; usage: sh build_zipapp.sh [--deps]" 2 ;;
    esac
done
has "$python" || fail "$python is not installed; install Python 3.8 or newer, or name one: PYTHON=... sh build_zipapp.sh"
[ -z "$deps" ] || install_missing

# A time-zone or a umask has no say: zip members carry the fixed date as it is, and modes are set outright.
"$python" -I - "$directory" <<'EOF_PYTHON'
import hashlib
import os
import sys
import tempfile
import zipfile

TARGET = "cbackup.pyz"
SHEBANG = b"#!/usr/bin/env python3\n"
TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can say
MAIN = r'''
"""Starts cbackup. From a zip archive Python would compile the module, a third of a second, twice at each start: here it is
compiled once, and the result is kept in the `state/` of the home for the starts that follow."""
import sys

if sys.version_info < (3, 8):   # up to here, every Python has to understand what is written
    sys.stderr.write("cbackup: needs Python 3.8 or newer, and this is %d.%d; start it with another one, as in: python3.8 %s\n"
                     % (sys.version_info[0], sys.version_info[1], " ".join(sys.argv)))
    sys.exit(2)

import importlib.util
import marshal
import os
import stat
import types
import zlib

SOURCE = "@SOURCE@"     # the digest of cbackup.py


def state_directory():
    """Of the home that this start is about, as far as one can tell before the arguments are read; if it is another one, or
    not there yet, the only harm is that the module is compiled."""
    for number, word in enumerate(sys.argv):
        if word == "--home":
            home = "".join(sys.argv[number + 1:number + 2])
            break
        if word.startswith("--home="):
            home = word[len("--home="):]
            break
    else:
        home = os.environ.get("CBACKUP_HOME", "")
        if not home and os.geteuid() == 0 and os.path.isdir("/var/lib/cbackup"):
            home = "/var/lib/cbackup"
    return os.path.join(home or os.path.expanduser("~/.cbackup"), "state")


def only_ours(info):
    """Nobody else can have written it."""
    return info.st_uid == os.geteuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def kept_code(path):
    """What keep_code() has left there; None when it is not there, damaged, or perhaps somebody else's."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            info = os.fstat(file.fileno())
            if not (stat.S_ISREG(info.st_mode) and only_ours(info) and only_ours(os.stat(os.path.dirname(path)))):
                return None
            check, data = file.read(4), file.read()
        return marshal.loads(data) if zlib.crc32(data) == int.from_bytes(check, "big") else None
    except (OSError, ValueError, EOFError, TypeError):
        return None


def keep_code(path, code):
    """For later starts, in place of what an older version has left. What goes wrong here does not matter."""
    directory, name = os.path.split(path)
    data = marshal.dumps(code)
    temporary = "%s.%d" % (path, os.getpid())
    try:
        if only_ours(os.stat(directory)):
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(zlib.crc32(data).to_bytes(4, "big") + data)
            os.rename(temporary, path)
            for other in os.listdir(directory):
                if other.startswith(name[:name.rindex("-") + 1]) and other != name:
                    os.unlink(os.path.join(directory, other))
    except OSError:
        try:
            os.unlink(temporary)
        except OSError:
            pass


def load():
    """The module `cbackup` of this archive."""
    module = types.ModuleType("cbackup")
    module.__file__ = os.path.join(os.path.dirname(__file__), "cbackup.py")
    module.__loader__ = __loader__
    path = os.path.join(state_directory(), "code-%s.%d-%s.%s" % (
        sys.implementation.cache_tag, sys.flags.optimize, importlib.util.MAGIC_NUMBER.hex(), SOURCE))
    code = kept_code(path)
    if code is None:
        code = compile(__loader__.get_data(module.__file__), module.__file__, "exec", dont_inherit=True)
        keep_code(path, code)
    sys.modules["cbackup"] = module
    exec(code, module.__dict__)
    return module


if __name__ == "__main__":
    sys.exit(load().main())
'''


def write_archive(out, members):
    out.write(SHEBANG)
    with zipfile.ZipFile(out, "w") as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, TIME)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # UNIX, whatever builds it
            info.external_attr = 0o100644 << 16
            archive.writestr(info, members[name])


def build(directory):
    with open(os.path.join(directory, "cbackup.py"), "rb") as module:
        source = module.read()
    main = MAIN.lstrip().replace("@SOURCE@", hashlib.sha256(source).hexdigest())
    members = {"cbackup.py": source, "__main__.py": main.encode("ascii")}
    descriptor, temporary = tempfile.mkstemp(prefix="." + TARGET + ".", dir=directory)
    try:
        with os.fdopen(descriptor, "w+b") as out:
            write_archive(out, members)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o755)
        os.replace(temporary, os.path.join(directory, TARGET))
    except BaseException:
        os.unlink(temporary)
        raise


try:
    build(sys.argv[1])
except OSError as error:
    sys.exit("build_zipapp.sh: cannot write %s: %s" % (TARGET, error))
EOF_PYTHON

echo "built cbackup.pyz"
