"""What .ci/run does. Stage 1: the README's two commands, with the newest Python that is here as their python3, and nothing
installed before them but by themselves. Stage 2: what single tests need besides is installed where that is possible (that it is
not is no failure), what was skipped runs again, in full (of some lists stage 1 has another part each day), as an ordinary user where
it was run as root and the reverse; a good part of the tests with Python 3.8; some thousand mutated messages; a short soak.

The last line is "N passed, N failed, N skipped": tests over all runs, a test skipped when it has run nowhere. A step that
is not a test adds one failure when it fails. All of it is to stay below 20 minutes on two quiet cores; a slow machine has
twice that, and what there is no time for then is left out, and named.
"""

import glob
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

LIMIT = 2400            # seconds for everything
OLDEST_RUNS = ["test_cli", "test_client_pass", "test_transfer", "test_exact", "test_zipapp", "test_proof"]
BESIDES = {             # program -> {package manager: packages}: what single tests need
    "git": {"*": ["git"]},
    "mkfs.vfat": {"*": ["dosfstools"]},
    "mkfs.ext4": {"*": ["e2fsprogs"]},
    "setpriv": {"*": ["util-linux"], "apk": ["setpriv"]},
    "cc": {"apt-get": ["gcc", "libc6-dev"], "apk": ["gcc", "musl-dev"], "*": ["gcc"]},
    "curl": {"*": ["curl"]},
    "bash": {"*": ["bash"]},
    "zsh": {"*": ["zsh"]},
    "fish": {"*": ["fish"]},
    "chromium": {"apt-get": ["chromium"]},
    "crontab": {"apt-get": ["cron"], "dnf": ["cronie"], "zypper": ["cronie"]},
    "promtool": {"apt-get": ["prometheus"], "apk": ["prometheus"]},
}
MANAGERS = {"apt-get": ["apt-get", "install", "-y", "-q", "--no-install-recommends"], "dnf": ["dnf", "install", "-y", "-q"],
            "apk": ["apk", "add", "--no-progress"], "zypper": ["zypper", "--non-interactive", "install"]}

AGAIN = """\
import json, sys, unittest
from tests.parallel import ParallelSuite
found = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[2:])
result = unittest.TextTestRunner(verbosity=2).run(ParallelSuite([found]))
with open(sys.argv[1], "w") as file:
    json.dump([[str(test), test.id(), why] for test, why in result.skipped], file)
sys.exit(not result.wasSuccessful())
"""


class Ended(Exception):
    """A signal asked for the end, or the time is over."""


class Stages:
    def __init__(self, scratch):
        self.scratch = scratch
        self.began = time.monotonic()
        self.passed = self.failed = 0
        self.skipped = {}       # id of a test that has run nowhere -> why
        self.done = set()       # those that were skipped, and have run elsewhere since
        self.process = None
        self.left_out = []

    @property
    def left(self):
        return LIMIT - (time.monotonic() - self.began)

    def fail(self, what):
        print("\n== FAILED: %s" % what, flush=True)
        self.failed += 1

    def run(self, command, title, most, env=None, cwd=None, user=None):
        """(exit status, output) of a command, that is shown when it has ended. None when there is no time for it."""
        seconds = min(most, self.left - 10)
        if seconds < 20:
            self.left_out.append(title)
            return None
        print("\n== %s   (at most %d s)" % (title, seconds), flush=True)
        begun = time.monotonic()
        with tempfile.TemporaryFile(dir=self.scratch) as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                            env=env, cwd=cwd, start_new_session=True, preexec_fn=user and user.become)
            try:
                status = self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = "none after %d s" % seconds
            finally:
                self.kill()
                output.seek(0)
                text = output.read().decode("utf-8", "replace")
                print(text, end="", flush=True)
        print("== took %.0f s" % (time.monotonic() - begun), flush=True)
        return status, text

    def kill(self):
        """Ends what is left of a step's process, first in a way that lets it tidy up."""
        process, self.process = self.process, None
        for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, number)
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    pass

    # ---- counting ------------------------------------------------------------------------------

    def count(self, ended, title, skips):
        """Adds what unittest said in its closing lines; without them, or with another exit status, it is one failure."""
        if ended is None:
            return
        status, text = ended
        ran = re.findall(r"^Ran (\d+) tests? in ", text, re.M)
        closing = re.findall(r"^(?:OK|FAILED)(?: \((.*)\))?$", text, re.M)
        if not ran or not closing or ran[-1] == "0":
            self.fail("%s: the tests did not come to an end, or there are none: exit status %s" % (title, status))
            return
        numbers = dict(re.findall(r"([a-z ]+)=(\d+)", closing[-1]))
        bad = sum(int(number) for what, number in numbers.items()
                  if what.strip() in ("failures", "errors", "unexpected successes"))
        left_out = int(numbers.get("skipped", 0))
        self.passed += max(0, int(ran[-1]) - bad - left_out)
        self.failed += bad
        if status != 0 and not bad:
            self.fail("%s: exit status %s" % (title, status))
        now = self.read_skips(skips)
        if left_out and now is None:
            now = {"%d tests (%s)" % (left_out, title): "not said"}
        for name, why in (now or {}).items():
            if name not in self.done:
                self.skipped.setdefault(name, why)
        return now or {}

    @staticmethod
    def read_skips(path):
        """{name of a test or class for unittest: why it was skipped}; None when nothing was written."""
        try:
            with open(path) as file:
                rows = json.load(file)
        except (OSError, ValueError):
            return None
        found = {}
        for text, name, why in rows:
            whole_class = re.match(r"setUpClass \((.*)\)", text)
            found[whole_class.group(1) if whole_class else name] = why
        return found

    def again(self, python, title, user=None, before=(), top="."):
        """Runs what has been skipped until now once more; what the plain suite has only a part of each day, whole."""
        names = sorted(name for name in self.skipped if name.startswith("tests."))
        if not names:
            return
        path = os.path.join(user.home if user else self.scratch, "again.json")
        if os.path.exists(path):
            os.unlink(path)
        env = dict(environment(python, None, user.home if user else self.scratch), CBACKUP_TEST_WHOLE="1")
        ended = self.run([*before, python, "-B", "-c", AGAIN, path, *names], title, 480, env, top, user)
        now = self.count(ended, title, path)
        if now is not None and self.read_skips(path) is not None:
            for name in names:
                if name not in now:
                    self.done.add(name)
                    del self.skipped[name]


# ---- Pythons, users, packages ------------------------------------------------------------------

def home():
    return os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir


def probe(path, user=None):
    """(minor, micro, path) of a released Python 3.8 or newer with all its parts; None when it is none, or does not run."""
    code = ("import sqlite3, ssl, sys\nv = sys.version_info\n"
            "if v >= (3, 8) and v.releaselevel == 'final': print(v.minor, v.micro, sys.executable)")
    try:
        ended = subprocess.run([path, "-I", "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, cwd="/", timeout=30, preexec_fn=user and user.become)
    except (OSError, subprocess.SubprocessError):
        return None
    words = ended.stdout.decode().split(None, 2)
    return (int(words[0]), int(words[1]), words[2].strip()) if len(words) == 3 else None


def pythons(user=None):
    """The Pythons of this machine, the newest last."""
    candidates = [path for folder in os.environ["PATH"].split(os.pathsep) for path in glob.glob(os.path.join(folder, "python3*"))
                  if re.search(r"/python3(\.\d+)?\Z", path)]
    candidates += glob.glob(os.path.join(home(), ".pyenv/versions/*/bin/python3"))
    found = {}
    for path in sorted(set(map(os.path.abspath, candidates))):
        if os.access(path, os.X_OK):
            one = probe(path, user)
            if one:
                found.setdefault(os.path.realpath(one[2]), one)
    return sorted(found.values())


def environment(python, skips, scratch):
    """With `python` as python3."""
    tools = os.path.join(tempfile.mkdtemp(dir=scratch), "bin")
    os.mkdir(tools)
    with open(os.path.join(tools, "python3"), "w") as file:
        file.write('#!/bin/sh\nexec "%s" "$@"\n' % python)
    for path in (os.path.dirname(tools), tools, os.path.join(tools, "python3")):
        os.chmod(path, 0o755)
    env = dict(os.environ, PATH=tools + os.pathsep + os.environ["PATH"], CI="true", PYTHONDONTWRITEBYTECODE="1")
    env.setdefault("CBACKUP_TEST_PATIENCE", "2")        # the machine may have other things to do
    if skips:
        env["CBACKUP_TEST_SKIPS"] = skips
    return env


class Nobody:
    """The ordinary user `nobody`, with a copy of the project and a directory for temporary files."""

    def __init__(self, scratch):
        entry = pwd.getpwnam("nobody")
        self.uid, self.gid = entry.pw_uid, entry.pw_gid
        self.home = os.path.join(scratch, "nobody")
        os.chmod(scratch, 0o711)
        os.mkdir(self.home)
        self.top = os.path.join(self.home, "cbackup")
        shutil.copytree(".", self.top, ignore=shutil.ignore_patterns(".git", "__pycache__"))
        for folder, _, names in os.walk(self.home):
            for path in [folder] + [os.path.join(folder, name) for name in names]:
                os.chown(path, self.uid, self.gid)

    def become(self):
        os.setgroups([])
        os.setgid(self.gid)
        os.setuid(self.uid)
        os.environ.update(HOME=self.home, TMPDIR=self.home)


def as_root(command):
    """The command, so that it runs as root; None when that is not possible."""
    if os.geteuid() == 0:
        return command
    if shutil.which("sudo") and subprocess.call(["sudo", "-n", "true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                                stderr=subprocess.DEVNULL) == 0:
        return ["sudo", "-n"] + command
    return None


def install_besides(stages):
    """What single tests need and is missing; what cannot be installed stays missing."""
    manager = next((name for name in MANAGERS if shutil.which(name)), None)
    missing = [program for program in BESIDES if not shutil.which(program)]
    if not missing or not manager or as_root(["true"]) is None:
        print("\n== not here, and nothing to install it with: %s" % (" ".join(missing) or "nothing"))
        return
    enough = stages.left - 270
    if manager == "apt-get":
        stages.run(as_root(["apt-get", "-q", "update"]), "apt-get update", 90)
    for program in missing:     # one by one: what this system does not have stops nothing else
        packages = BESIDES[program].get(manager) or BESIDES[program].get("*")
        if packages and stages.left > enough:
            command = as_root(["env", "DEBIAN_FRONTEND=noninteractive", *MANAGERS[manager], *packages])
            stages.run(command, "installing %s, for single tests" % " ".join(packages), 150)


# ---- the stages --------------------------------------------------------------------------------

def readme_commands():
    """The lines of the README's first block of commands."""
    with open("README.md", encoding="utf-8") as file:
        block = re.search(r"^```\w*\n(.*?)^```", file.read(), re.M | re.S)
    return [line for line in (block.group(1) if block else "").splitlines() if line.strip()]


def as_readme_says(stages, python):
    """Stage 1."""
    commands = readme_commands()
    if len(commands) != 2:
        stages.fail("README.md's first block of commands is not two lines")
        raise Ended()
    skips = os.path.join(stages.scratch, "skips.json")
    env = environment(python, skips, stages.scratch)
    ended = stages.run(["sh", "-c", commands[0]], commands[0], 300, env)
    if ended is None or ended[0] != 0:
        stages.fail("the README's first command: exit status %s" % (ended[0] if ended else "none"))
    stages.count(stages.run(["sh", "-c", commands[1]], commands[1], 1200, env), commands[1], skips)


def what_was_skipped(stages, python):
    """Stage 2, its first part."""
    list_skips(stages, "skipped until now")
    if not stages.skipped:
        return
    install_besides(stages)
    stages.again(python, "what was skipped, once more")
    if not stages.skipped:
        return
    if os.geteuid() != 0:
        before = as_root(["env", "PATH=" + os.environ["PATH"], "CBACKUP_TEST_WHOLE=1"])
        if before:
            stages.again(python, "what was skipped, as root", before=before)
        return
    try:
        nobody = Nobody(stages.scratch)
    except (KeyError, OSError, shutil.Error) as error:
        print("\n== no ordinary user to run tests as: %s" % error)
        return
    theirs = pythons(nobody)
    if theirs:
        stages.again(theirs[-1][2], "what was skipped, as an ordinary user", nobody, top=nobody.top)
    else:
        print("\n== no Python here that an ordinary user may run")


def the_oldest(stages, oldest):
    """A good part of the tests with Python 3.8."""
    skips = os.path.join(stages.scratch, "skips-oldest.json")
    words = ["python3", "-m", "unittest"] + [word for name in OLDEST_RUNS for word in ("-k", name)]
    title = " ".join(words) + "   with Python 3.8"
    stages.count(stages.run(words, title, 600, environment(oldest, skips, stages.scratch)), title, skips)


def the_rest(stages, python):
    """Steps that are no unit tests; each adds one failure when it fails. Each day has a seed."""
    env = environment(python, None, stages.scratch)
    today = str(int(time.time()) // 86400 % 1000)
    for module, most, options in (("fuzz", 120, {"--messages": "5000", "--seed": today}),
                                  ("soak", 180, {"--minutes": "1", "--seed": today}),
                                  ("mutants", 200, {"--minutes": "2.5", "--seed": today})):
        if os.path.exists("tests/%s.py" % module):
            command = ["python3", "-m", "tests." + module]
            known = subprocess.run(command + ["--help"], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL).stdout.decode()
            for option, value in options.items():
                if re.search(re.escape(option) + r"\b", known):
                    command += [option, value]
            ended = stages.run(command, " ".join(command), most, env)
            if ended is not None and ended[0] != 0:
                stages.fail("%s: exit status %s" % (" ".join(command), ended[0]))


def list_skips(stages, what):
    print("\n== %s: %d" % (what, len(stages.skipped)))
    for name, why in sorted(stages.skipped.items()):
        print("   %s: %s" % (name, why))
    sys.stdout.flush()


def run_stages(stages):
    os.environ.pop("CBACKUP_HOME", None)
    found = pythons()
    if not found:
        stages.fail("no Python 3.8 or newer with sqlite3 and ssl here")
        return
    newest = found[-1][2]
    print("== Python: %s" % ", ".join("3.%d.%d (%s)" % one for one in reversed(found)), flush=True)
    as_readme_says(stages, newest)
    what_was_skipped(stages, newest)
    oldest = [path for minor, _, path in found if minor == 8]
    if oldest and oldest[-1] != newest:
        the_oldest(stages, oldest[-1])
    else:
        print("\n== no other Python here that is a 3.8", flush=True)
    the_rest(stages, newest)
    for title in stages.left_out:
        print("\n== left out, no time: %s" % title)


def end_by_signal(number, _):
    raise Ended("ended by signal %d" % number)


def main():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_by_signal)
    scratch = tempfile.mkdtemp(prefix="cbackup-ci-")
    stages = Stages(scratch)
    try:
        run_stages(stages)
    except Ended as end:
        if str(end):
            stages.fail(str(end))
    except Exception as error:
        stages.fail("%s: %s" % (type(error).__name__, error))
    finally:
        stages.kill()
        shutil.rmtree(scratch, ignore_errors=True)
    list_skips(stages, "skipped everywhere")
    print("\n%d passed, %d failed, %d skipped" % (stages.passed, stages.failed, len(stages.skipped)), flush=True)
    return 0 if stages.passed and not stages.failed else 1


if __name__ == "__main__":
    sys.exit(main())
