"""build_zipapp.sh: one file that is the program, the same bytes whoever builds it and whenever."""

import functools
import glob
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
import zipfile

from tests.harness import PROGRAM, TOP, Case, Process, plain_environment, program, quick_program, read_file, write_file


def build(folder, umask=0o022, **more):
    """Builds the zipapp from a copy of the project's files in `folder`; returns its path."""
    os.makedirs(folder, exist_ok=True)
    for path in (PROGRAM, os.path.join(TOP, "build_zipapp.sh")):
        shutil.copy(path, folder)
    # The python3 of the tests is the one that the script finds.
    tools = os.path.join(folder, "tools")
    os.makedirs(tools)
    write_file(os.path.join(tools, "python3"), '#!/bin/sh\nexec %s -S "$@"\n' % shlex.quote(sys.executable))
    os.chmod(os.path.join(tools, "python3"), 0o755)
    env = plain_environment(folder, **more)
    env["PATH"] = tools + os.pathsep + env["PATH"]
    result = Process(["sh", os.path.join(folder, "build_zipapp.sh")], env, folder, umask=umask).wait(60)
    if result.rc != 0:
        raise AssertionError("build_zipapp.sh failed: %s" % result)
    return os.path.join(folder, "cbackup.pyz")


_built = None


def built():
    """The path of a zipapp that is built once for each test process."""
    global _built
    if _built is None:
        folder = tempfile.TemporaryDirectory(prefix="cbackup-test-zipapp-")
        _built = build(folder.name), folder
    return _built[0]


class BuildTest(Case):
    """Two builds are the same, byte for byte."""

    def test_two_builds_are_byte_identical(self):
        second = build(os.path.join(self.directory(), "another place with blanks"), umask=0o077, TZ="Asia/Tokyo")
        self.assertEqual(read_file(built()), read_file(second))

    def test_building_again_in_the_same_place_gives_the_same(self):
        folder = os.path.join(self.directory(), "one")
        first = read_file(build(folder))
        write_file(os.path.join(folder, "cbackup.conf"), "mine\n")      # what lies around does not get in
        os.utime(os.path.join(folder, "cbackup.py"), (1, 1))
        shutil.rmtree(os.path.join(folder, "tools"))
        self.assertEqual(first, read_file(build(folder)))

    def test_it_holds_the_module_and_its_start_and_nothing_else(self):
        path = built()
        with zipfile.ZipFile(path) as archive:
            self.assertEqual(["__main__.py", "cbackup.py"], sorted(archive.namelist()))
            self.assertEqual(read_file(PROGRAM), archive.read("cbackup.py"))
        self.assertTrue(os.stat(path).st_mode & stat.S_IXUSR)


class RunTest(Case):
    """cbackup.pyz is the same program as cbackup.py."""

    kept = None     # the state of a home in which it was started before: to compile it takes a second; and what it said

    def setUp(self):
        self.base, self.pyz = self.directory(), built()
        self.home = os.path.join(self.base, "home")
        if not self.kept:
            kept = tempfile.TemporaryDirectory(prefix="cbackup-test-zipapp-")
            self.addClassCleanup(kept.cleanup)
            os.mkdir(os.path.join(kept.name, "state"))
            type(self).help = self.run_pyz("--home", kept.name, "--help")
            self.assertRc(0, self.help)
            type(self).kept = os.path.join(kept.name, "state")
            self.assertEqual(1, len(os.listdir(self.kept)))
        self.begin(self.home)

    def begin(self, home):
        shutil.copytree(self.kept, os.path.join(home, "state"))

    def run_pyz(self, *arguments):
        return Process(program(*arguments, file=self.pyz), plain_environment(self.base), self.base).wait(30)

    def test_help_is_the_same(self):
        plain = Process(quick_program("--help"), plain_environment(self.base), self.base).wait(30)
        self.assertEqual(plain.stdout.replace("cbackup.pyz", "cbackup").replace("cbackup.py", "cbackup").split(),
                         self.help.stdout.replace("cbackup.pyz", "cbackup").replace("cbackup.py", "cbackup").split())

    def test_it_can_be_started_by_its_name(self):
        env = plain_environment(self.base)
        env["PATH"] = os.path.join(os.path.dirname(self.pyz), "tools") + os.pathsep + env["PATH"]     # see build()
        result = Process([self.pyz, "--home", self.home, "--help"], env, self.base).wait(30)
        self.assertRc(0, result)

    def test_exit_codes_come_through(self):
        self.assertRc(2, self.run_pyz("--home", self.home, "frobnicate"))
        self.assertRc(2, self.run_pyz("--home", self.home, "status"))
        self.assertRc(0, self.run_pyz("--home", self.home, "init"))

    def test_a_cluster_of_zipapps_backs_up_and_restores(self):
        cluster = self.cluster("s", "a", file=self.pyz, replicas=1)
        source = cluster.source("docs", "s", {"f%d" % number: 1000 for number in range(10)})
        cluster.backup("b1", "a", "1M")
        for host in "sa":
            self.begin(cluster.home(host))
        cluster.start()
        cluster.settle()
        self.assertCopies(cluster, "docs", 1)
        cluster.kill("s")
        result = cluster.client("a")
        self.assertRc(1, result)
        to = cluster.path("restored")
        self.assertRc(0, cluster.restore("a", "docs", to=to))
        self.assertSameTree(source, to)


class KeptCodeTest(Case):
    """The compiled module is kept in the home's state, so that the next start need not compile; nobody else's is used."""

    def setUp(self):
        self.base, self.pyz = self.directory(), os.path.join(self.directory(), "small.pyz")
        with zipfile.ZipFile(built()) as archive:
            main = archive.read("__main__.py").decode()
        with zipfile.ZipFile(self.pyz, "w") as archive:
            archive.writestr("__main__.py", main.replace("code = compile(", "print('compiled'); code = compile("))
            archive.writestr("cbackup.py", "import sys\n\n\ndef main():\n    print('started')\n    return 7\n")
        self.state = os.path.join(self.base, "home", "state")
        os.makedirs(self.state)

    def kept(self):
        return [name for name in os.listdir(self.state) if name.startswith("code-")]

    def start(self, *arguments):
        """Starts a small module in the program's place, and returns whether it was compiled."""
        arguments = arguments or ["--home", os.path.join(self.base, "home")]
        result = Process(program(*arguments, "plan", file=self.pyz), plain_environment(self.base), self.base).wait(60)
        self.assertEqual((7, ""), (result.rc, result.stderr))
        self.assertIn("started", result.stdout)
        return "compiled" in result.stdout

    def test_it_is_compiled_once(self):
        self.assertTrue(self.start())
        self.assertEqual(1, len(self.kept()))
        self.assertFalse(self.start())
        self.assertFalse(self.start("--home=" + os.path.join(self.base, "home")))

    def test_a_home_without_state_is_left_alone(self):
        self.assertTrue(self.start("--home", os.path.join(self.base, "other")))
        self.assertFalse(os.path.exists(os.path.join(self.base, "other")))

    def test_what_an_older_version_has_left_goes(self):
        older = os.path.join(self.state, "code-%s.0-00-00" % sys.implementation.cache_tag)
        write_file(older, "x")
        write_file(os.path.join(self.state, "books.db.something"), "x")
        self.start()
        self.assertFalse(os.path.exists(older))
        self.assertTrue(os.path.exists(os.path.join(self.state, "books.db.something")))

    def test_what_is_damaged_or_can_be_written_by_others_or_leads_elsewhere_is_not_used(self):
        self.start()
        path = os.path.join(self.state, self.kept()[0])
        good = read_file(path)
        for damaged in (b"", good[:50], good[:-1], good[:50] + b"?" + good[51:]):
            write_file(path, damaged)
            self.assertTrue(self.start())
            self.assertEqual(good, read_file(path))
        for place, mode in ((path, 0o620), (path, 0o602), (self.state, 0o770), (self.state, 0o702)):
            os.chmod(place, mode)
            self.assertTrue(self.start(), (place, oct(mode)))
            os.chmod(place, 0o700)
        os.rename(path, path + ".elsewhere")
        os.symlink(path + ".elsewhere", path)
        self.assertTrue(self.start())

    @unittest.skipUnless(os.geteuid() == 0, "only root can give files away")
    def test_what_belongs_to_another_user_is_not_used(self):
        self.start()
        for place in (os.path.join(self.state, self.kept()[0]), self.state):
            os.chown(place, 65534, -1)
            self.assertTrue(self.start(), place)
            os.chown(os.path.join(self.state, self.kept()[0]), 0, -1)


class DepsTest(Case):
    """build_zipapp.sh --deps installs what is missing with the system's package manager, or says why it does not."""

    def setUp(self):
        self.base = self.directory()
        self.tools, self.log = os.path.join(self.base, "only these"), os.path.join(self.base, "log")
        os.mkdir(self.tools)
        shutil.copy(os.path.join(TOP, "build_zipapp.sh"), self.base)
        write_file(os.path.join(self.base, "cbackup.py"), "# in its place\n")
        for name in ("sh", "dirname", "env", "cat"):
            os.symlink(shutil.which(name), os.path.join(self.tools, name))
        self.tool("python3", 'exec %s -S "$@"' % shlex.quote(sys.executable))
        self.user(0)
        self.tool("openssl")

    def tool(self, name, script="exit 0"):
        write_file(os.path.join(self.tools, name), "#!/bin/sh\n%s\n" % script)
        os.chmod(os.path.join(self.tools, name), 0o755)

    def user(self, number):
        self.tool("id", "echo %d" % number)

    def manager(self, name, brings=("rsync", "openssl")):
        """A package manager that writes down how it was called; `install`, or what means that, brings these programs."""
        self.tool(name, """echo "%s $*" >>%s
case "$*" in *update*) exit 0 ;; esac
for program in %s; do case " $* " in *" $program "*)
    echo "#!/bin/sh" >"$0.tmp"; cat "$0.tmp" >"${0%%/*}/$program"; chmod 755 "${0%%/*}/$program" ;; esac; done""" % (
            name, shlex.quote(self.log), " ".join(brings)))
        if not os.path.exists(os.path.join(self.tools, "chmod")):
            os.symlink(shutil.which("chmod"), os.path.join(self.tools, "chmod"))

    def called(self):
        return read_file(self.log).decode().splitlines() if os.path.exists(self.log) else []

    def build(self, *arguments):
        env = dict(plain_environment(self.base), PATH=self.tools)
        return Process(["/bin/sh", os.path.join(self.base, "build_zipapp.sh"), *arguments], env, self.base).wait(60)

    def is_built(self):
        return os.path.exists(os.path.join(self.base, "cbackup.pyz"))

    def test_where_nothing_is_missing_nothing_is_done_or_said(self):
        self.manager("apt-get")
        self.tool("rsync")
        result = self.build("--deps")
        self.assertRc(0, result)
        self.assertEqual(("built cbackup.pyz\n", ""), (result.stdout, result.stderr))
        self.assertEqual([], self.called())

    def test_without_deps_nothing_is_installed(self):
        self.manager("apt-get")
        self.assertRc(0, self.build())
        self.assertEqual([], self.called())

    def test_each_package_manager_is_asked_in_its_own_way_and_it_is_said(self):
        managers = (("apt-get", "apt-get install -y -q --no-install-recommends"), ("dnf", "dnf install -y -q"),
                    ("apk", "apk add --no-progress"), ("pacman", "pacman -Sy --noconfirm --needed"),
                    ("zypper", "zypper --non-interactive install"), ("pkg", "pkg install -y"), ("brew", "brew install"),
                    ("pkgin", "pkgin -y install"))
        for manager, expected in managers[:1] + tuple(self.todays(managers[1:], 2)):
            with self.subTest(manager):
                os.unlink(os.path.join(self.tools, "openssl"))
                self.manager(manager)
                result = self.build("--deps")
                self.assertRc(0, result)
                self.assertIn("installing rsync openssl: %s rsync openssl\n" % expected, result.stdout)
                self.assertEqual(["apt-get update -q"] * (manager == "apt-get") + [expected + " rsync openssl"], self.called())
                self.assertTrue(result.stdout.endswith("built cbackup.pyz\n"))
                for name in (manager, "rsync"):
                    os.unlink(os.path.join(self.tools, name))
                os.unlink(self.log)

    def test_only_what_is_missing_is_installed(self):
        self.manager("dnf")
        self.assertRc(0, self.build("--deps"))
        self.assertEqual(["dnf install -y -q rsync"], self.called())

    def test_an_ordinary_user_needs_sudo_and_is_told_the_command(self):
        self.user(1000)
        self.manager("apk")
        for sudo in (None, "exit 1"):
            if sudo:
                self.tool("sudo", sudo)
            result = self.build("--deps")
            self.assertRc(1, result)
            self.assertOneError(result, "rsync", "root", "apk add --no-progress rsync")
            self.assertEqual(([], False), (self.called(), self.is_built()))
        self.tool("sudo", 'test "$1" = -n || exit 1; shift; exec "$@"')
        os.symlink(shutil.which("true"), os.path.join(self.tools, "true"))
        result = self.build("--deps")
        self.assertRc(0, result)
        self.assertIn("installing rsync: sudo -n apk add --no-progress rsync\n", result.stdout)
        self.assertEqual(["apk add --no-progress rsync"], self.called())

    def test_homebrew_is_not_asked_as_another_user(self):
        self.user(501)
        self.manager("brew")
        self.assertRc(0, self.build("--deps"))
        self.assertEqual(["brew install rsync"], self.called())

    def test_where_no_package_manager_is_known_the_programs_are_named(self):
        os.unlink(os.path.join(self.tools, "openssl"))
        result = self.build("--deps")
        self.assertRc(1, result)
        self.assertOneError(result, "rsync openssl", "by hand")
        self.assertFalse(self.is_built())

    def test_an_installation_that_fails_or_brings_nothing_is_said(self):
        self.tool("dnf", "exit 3")
        self.assertOneError(self.build("--deps"), "failed", "dnf install -y -q rsync")
        self.manager("dnf", brings=())
        result = self.build("--deps")
        self.assertRc(1, result)
        self.assertOneError(result, "rsync", "still missing")
        self.assertFalse(self.is_built())

    def test_pythons_sqlite_is_a_package_of_its_own_on_freebsd(self):
        self.tool("rsync")
        self.manager("pkg")
        self.tool("python3", 'case "$*" in *"import sqlite3"*) exec test -e %s ;; esac\nexec %s "$@"' % (
            shlex.quote(self.log), shlex.quote(sys.executable)))
        os.symlink(shutil.which("test"), os.path.join(self.tools, "test"))
        self.assertRc(0, self.build("--deps"))
        self.assertEqual(["pkg install -y py%d%d-sqlite3" % sys.version_info[:2]], self.called())

    def test_an_argument_that_it_does_not_know_is_named(self):
        result = self.build("--depz")
        self.assertRc(2, result)
        self.assertOneError(result, "--depz")


@functools.lru_cache(None)
def other_pythons():
    """{(major, minor): path} of the Pythons below 3.8 that are found here."""
    found = {}
    for folder in glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin")) + os.environ.get("PATH", os.defpath).split(os.pathsep):
        for version in ((2, 7), (3, 6), (3, 7)):
            path = os.path.join(folder, "python%d.%d" % version)
            if version not in found and os.access(path, os.X_OK) and subprocess.call(
                    [path, "-S", "-c", ""], stderr=subprocess.DEVNULL) == 0:
                found[version] = path
    return found


class OldPythonTest(Case):
    """A Python that is too old is told so in one line."""

    def assertTold(self, version, path, file):
        result = Process([path, "-S", "-B", file, "status"], plain_environment(self.base), self.base).wait(30)
        self.assertRc(2, result)
        self.assertOneError(result, "needs Python 3.8 or newer", "this is %d.%d" % version)

    def setUp(self):
        self.base, self.pythons = self.directory(), other_pythons()
        if not self.pythons:
            self.skipTest("no Python older than 3.8 here")

    def test_by_the_zipapp(self):
        for version, path in self.pythons.items():
            with self.subTest(version):
                self.assertTold(version, path, built())

    def test_by_the_module_from_3_6_on(self):
        for version, path in self.todays([one for one in self.pythons.items() if one[0] >= (3, 6)], 1):    # it compiles it all
            with self.subTest(version):
                self.assertTold(version, path, PROGRAM)


if __name__ == "__main__":
    unittest.main()
