"""One line puts server and client in place on a machine, and one takes them away; nothing of this machine is touched here."""

import contextlib
import io
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import cbackup
from tests.harness import Case, read_file, tree, wait_for, write_file


class FakeSystem:
    """Stands for the machine: a directory for its files, a crontab, and what was run."""

    def __init__(self, top):
        self.top, self.ran, self.crontab, self.fails = top, [], None, ()

    def run(self, words, text):
        self.ran.append(words)
        if words[0] in self.fails:
            return 1, "no such service\n"
        if words == ["crontab", "-l"]:
            return (1, "no crontab for you\n") if self.crontab is None else (0, self.crontab)
        if words == ["crontab", "-"]:
            self.crontab = text
        return 0, ""


class InstallerTest(Case):

    def setUp(self):
        self.base = os.path.join(self.directory(), "it's 100%")
        os.makedirs(os.path.join(self.base, "home"))
        self.home = cbackup.Home(os.path.join(self.base, "home"))
        self.system = FakeSystem(os.path.join(self.base, "top"))
        self.program = self.system.top + cbackup.PROGRAM_PATH

    def at_work(self, kind, method="install"):
        said = io.StringIO()
        installer = cbackup.Installer(self.home, kind, self.system.top, self.system.run)
        with contextlib.redirect_stdout(said):
            self.assertEqual(0, getattr(installer, method)())
        return said.getvalue()

    def files(self):
        return {"/" + name: entry.mode for name, entry in tree(self.system.top).items() if entry.kind == "file"}

    def text(self, path):
        return read_file(self.system.top + path).decode()

    def test_systemd_gets_a_service_and_a_timer_and_both_are_started(self):
        self.at_work("systemd")
        folder = "/etc/systemd/system/"
        self.assertEqual({cbackup.PROGRAM_PATH: 0o755, folder + "cbackup.service": 0o644,
                          folder + "cbackup-client.service": 0o644, folder + "cbackup-client.timer": 0o644}, self.files())
        for name, command in (("cbackup.service", "server"), ("cbackup-client.service", "client")):
            start = re.search("(?m)^ExecStart=(.*)$", self.text(folder + name)).group(1).replace("%%", "%")
            self.assertEqual([sys.executable, cbackup.PROGRAM_PATH, "--home", self.home.path, command], shlex.split(start))
        self.assertIn("\nPersistent=true\n", self.text(folder + "cbackup-client.timer"))    # what was missed in sleep
        self.assertEqual([["crontab", "-l"], ["systemctl", "daemon-reload"],
                          ["systemctl", "enable", "cbackup.service", "cbackup-client.timer"],
                          ["systemctl", "restart", "cbackup.service", "cbackup-client.timer"]], self.system.ran)
        if shutil.which("systemd-analyze"):
            units = [self.system.top + folder + name for name in ("cbackup.service", "cbackup-client.timer")]
            for name in os.listdir(self.system.top + folder):       # the program is not where the unit says, here
                path = self.system.top + folder + name
                write_file(path, read_file(path).replace(cbackup.PROGRAM_PATH.encode(), b"/bin/true"))
            done = subprocess.run(["systemd-analyze", "verify", "--man=no"] + units, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, timeout=60)
            ours = [line for line in done.stdout.decode().splitlines() if "cbackup" in line]
            self.assertEqual([], ours)

    def test_launchd_gets_two_property_lists(self):
        self.at_work("launchd")
        server = plistlib.loads(self.text("/Library/LaunchDaemons/cbackup.server.plist").encode())
        client = plistlib.loads(self.text("/Library/LaunchDaemons/cbackup.client.plist").encode())
        words = [sys.executable, cbackup.PROGRAM_PATH, "--home", self.home.path]
        self.assertEqual((words + ["server"], words + ["client"]), (server["ProgramArguments"], client["ProgramArguments"]))
        self.assertEqual(900, client["StartInterval"])
        loaded = [words[-1] for words in self.system.ran if words[:2] == ["launchctl", "load"]]
        self.assertEqual(["/Library/LaunchDaemons/cbackup.%s.plist" % name for name in ("server", "client")], loaded)

    def test_where_there_is_only_cron_two_lines_do_it_and_the_others_stay(self):
        self.system.crontab = "MAILTO=me\n5 * * * * something else\n"
        self.at_work("cron")
        self.at_work("cron")                                    # again changes nothing
        kept, lines = self.system.crontab.splitlines()[:2], self.system.crontab.splitlines()[2:]
        self.assertEqual(["MAILTO=me", "5 * * * * something else"], kept)
        self.assertEqual(2, len(lines), lines)
        for line, start, command in zip(lines, (r"@reboot ", r"\d+,\d+,\d+,\d+ \* \* \* \* "), ("server", "client")):
            self.assertNotRegex(line, r"(?<!\\)%")     # it would end the command
            script = re.sub("^" + start, "", line).replace("\\%", "%")      # what cron gives to a shell
            script = script.replace(shlex.quote(sys.executable), "printf '%s\\n'")
            printed = subprocess.run(["sh", "-c", script.replace(" >/dev/null", "")], stdout=subprocess.PIPE, timeout=20)
            self.assertEqual([cbackup.PROGRAM_PATH, "--home", self.home.path, command],
                             printed.stdout.decode().splitlines())
        self.assertIn(["sh", "-c"], [words[:2] for words in self.system.ran])
        self.at_work("cron", "remove")
        self.assertEqual("MAILTO=me\n5 * * * * something else\n", self.system.crontab)

    @unittest.skipUnless(shutil.which("crontab"), "no crontab here")
    def test_the_lines_are_of_the_form_that_crontab_takes(self):
        self.at_work("cron")
        for option in ("-T", "-n"):     # cronie, and Debian's cron; what knows neither does nothing
            good, bad = self.judged(option, self.system.crontab), self.judged(option, "x * * * * y\n")
            if bad.returncode and not re.search(b"invalid option|unrecognized option|illegal option", bad.stdout):
                self.assertEqual(0, good.returncode, good)
                return
        self.skipTest("this crontab only takes, and does not judge")

    def judged(self, option, text):
        with tempfile.NamedTemporaryFile() as file:
            file.write(text.encode())
            file.flush()
            return subprocess.run(["crontab", option, file.name], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, timeout=20)

    def test_removing_takes_away_what_installing_put_there_and_nothing_else(self):
        write_file(os.path.join(self.home.path, "cluster.pem"), "key")
        for kind in cbackup.SERVICE_UNITS:
            self.system.crontab = "# mine\n"
            self.at_work(kind)
            self.assertTrue(kind == "cron" or len(self.files()) > 1, kind)
            self.assertEqual(kind in ("systemd", "launchd"), self.system.crontab == "# mine\n", kind)
            self.system.fails = ("systemctl",) if kind == "launchd" else ("launchctl", "svcadm")
            self.at_work(kind, "remove")
            self.system.fails = ()
            self.assertEqual([cbackup.PROGRAM_PATH], list(self.files()), kind)
            self.assertEqual("# mine\n", self.system.crontab)
        self.assertEqual(b"key", read_file(os.path.join(self.home.path, "cluster.pem")))

    def test_a_command_that_fails_is_named(self):
        self.system.fails = ("systemctl",)
        with self.assertRaisesRegex(cbackup.CBackupError, "systemctl daemon-reload failed: no such service"):
            self.at_work("systemd")

    def test_the_program_is_copied_once_whatever_the_umask(self):
        before = os.umask(0o077)
        try:
            self.at_work("systemd")
        finally:
            os.umask(before)
        self.assertEqual(read_file(cbackup.own_command()[1]), read_file(self.program))
        self.assertEqual(0o755, self.files()[cbackup.PROGRAM_PATH])
        with mock.patch.object(cbackup, "own_command", lambda: [sys.executable, self.program]):
            self.assertNotIn(cbackup.PROGRAM_PATH, self.at_work("systemd"))

    def test_a_home_whose_name_fits_into_no_unit_is_refused(self):
        with self.assertRaisesRegex(cbackup.UsageError, "cannot be written"):
            cbackup.Installer(cbackup.Home(self.base + "\n[Service]"), "systemd", self.system.top)


class HomeTest(Case):
    """Where the home is when nobody says."""

    def test_root_has_it_below_var_lib_unless_only_the_other_is_there(self):
        base = self.directory()
        with mock.patch.dict(os.environ, {"HOME": base}), mock.patch.object(cbackup, "ROOT_HOME", base + "/var"):
            os.environ.pop("CBACKUP_HOME", None)
            with mock.patch.object(os, "geteuid", lambda: 1000):
                self.assertEqual(base + "/.cbackup", cbackup.Home().path)
            with mock.patch.object(os, "geteuid", lambda: 0):
                self.assertEqual(base + "/var", cbackup.Home().path)
                os.mkdir(base + "/.cbackup")
                self.assertEqual(base + "/.cbackup", cbackup.Home().path)
                os.mkdir(base + "/var")
                self.assertEqual(base + "/var", cbackup.Home().path)
                self.assertEqual(base + "/x", cbackup.Home(base + "/x").path)
                os.environ["CBACKUP_HOME"] = base + "/y"
                self.assertEqual(base + "/y", cbackup.Home().path)


class OptionsTest(Case):

    def test_options_are_good_behind_the_command_too(self):
        parse = cbackup.build_parser().parse_args
        before, behind = parse(["--home", "/h", "--host", "a", "-vv", "client"]), parse(
            ["client", "--home", "/h", "--host", "a", "-vv"])
        self.assertEqual(vars(before), vars(behind))
        self.assertEqual(("/h", None, 0, False), tuple(
            getattr(parse(["--home", "/h", "status", "--check"]), name) for name in ("home", "host", "verbose", "quiet")))
        self.assertTrue(parse(["client", "-q"]).quiet)

    def test_a_new_machine_whose_lines_were_written_on_another_one_finds_them(self):
        c = self.cluster("s", "a")
        c.source("docs", "s", {"f": 1})
        c.backup("ba", "a", "7M")
        c.start()
        c.add_host("new")
        old = c.config().replace("new = ", "other = ")          # what the new machine got when it joined
        c.backup("bnew", "new", "7M")
        c.write_config("s")
        write_file(os.path.join(c.home("new"), "cbackup.conf"), old)
        wait_for(lambda: c.client("new").rc == 0, 20, "s has not taken over its edit")
        self.assertEqual(["f"], os.listdir(os.path.join(c.backups["bnew"].path, "docs")))
        result = c.run("new", "client", "--host", "nobody")
        self.assertRc(2, result)
        self.assertOneError(result, "nobody")

    def test_installing_is_refused_where_this_machine_has_no_part(self):
        cluster = self.cluster("s")
        result = cluster.run("s", "service", "--install", "--host", "elsewhere")
        self.assertRc(2, result)
        self.assertOneError(result, "elsewhere")


if __name__ == "__main__":
    unittest.main()
