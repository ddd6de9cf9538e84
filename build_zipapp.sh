#!/bin/sh
# Writes cbackup.pyz, the whole program in one file that runs by itself, beside this script.
#
# The same cbackup.py gives the same bytes every time: the names are sorted, and times and permissions
# are fixed. The file is complete before it gets its name, so that a running cron job never meets half
# of it. $PYTHON chooses the interpreter that builds (default: python3).
set -eu

directory=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}

command -v "$python" >/dev/null 2>&1 || {
    echo "build_zipapp.sh: $python is not installed; install Python 3.8 or newer, or name one: PYTHON=... sh build_zipapp.sh" >&2
    exit 1
}

# A time-zone or a umask has no say: zip members carry the fixed date as it is, and modes are set outright.
"$python" -I - "$directory" <<'EOF_PYTHON'
import os
import sys
import tempfile
import zipfile

TARGET = "cbackup.pyz"
SHEBANG = b"#!/usr/bin/env python3\n"
TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can say
MAIN = b"""\
import sys

from cbackup import main

if __name__ == "__main__":
    sys.exit(main())
"""


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
        members = {"cbackup.py": module.read(), "__main__.py": MAIN}
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
