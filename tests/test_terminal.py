"""At a terminal: what a pass did, progress and errors apart, colours, help, guesses and completion."""

import contextlib
import io
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import unittest
from unittest import mock

import cbackup
from tests.harness import Case, Process, plain_environment, quick_program, wait_for, write_file


MONOTONIC = cbackup.time.monotonic


class Screen(io.StringIO):
    """A terminal that keeps what stands on it: `\\r` goes back to the start of the line."""

    def isatty(self):
        return True

    def lines(self):
        out = [[]]
        column = 0
        for character in self.getvalue():
            if character == "\n":
                out.append([])
            if character in "\r\n":
                column = 0
                continue
            out[-1][column:column + 1] = [character]
            column += 1
        return ["".join(line).rstrip() for line in out if "".join(line).strip()]


class ProgressTest(Case):

    def setUp(self):
        self.screen, self.now = Screen(), 100.0
        for patch in (mock.patch.object(sys, "stderr", self.screen),
                      mock.patch.object(cbackup.time, "monotonic", lambda: self.now),
                      mock.patch.object(cbackup.shutil, "get_terminal_size", lambda: os.terminal_size((200, 20)))):
            patch.start()
            self.addCleanup(patch.stop)
        self.progress = cbackup.Progress()
        self.addCleanup(setattr, cbackup.Progress, "_standing", None)

    def last(self):
        return self.screen.getvalue().rpartition("\r")[2].rstrip()

    def test_rate_and_time_left_are_those_of_the_last_half_minute(self):
        done = 0
        for _ in range(600):                                    # ten minutes of 1 MB/s
            self.now, done = self.now + 1, done + (1 << 20)
            self.progress.update("x", done, 10 << 30)
        self.assertIn(", 1 MB/s, ", self.last())
        for _ in range(35):                                     # then half a minute of 10 MB/s
            self.now, done = self.now + 1, done + (10 << 20)
            self.progress.update("x", done, 10 << 30)
        self.assertIn(", 10 MB/s, 15 min left", self.last())
        for _ in range(35):                                     # and nothing any more
            self.now += 1
            self.progress.update("x", done, 10 << 30)
        self.assertNotIn("/s", self.last())

    def test_an_error_never_stands_on_the_progress_line(self):
        logger = cbackup.logging.Logger("test")
        logger.addHandler(cbackup.LogHandler(self.screen))
        self.progress.say("asking a what it holds of a source with a long name")
        logger.warning("a: cannot be reached")
        self.progress.say("copying")
        cbackup.clear_line()
        print("cbackup: the end", file=sys.stderr)
        self.assertEqual(["a: cannot be reached", "cbackup: the end"], self.screen.lines())

    def test_after_five_seconds_it_is_said_who_is_waited_for(self):
        def slow(host):
            wait_for(lambda: host != "slow" or "waiting for slow" in self.screen.getvalue(), 10, "nothing is said")
        with mock.patch.object(cbackup, "WAITING_AFTER", 0.1), mock.patch.object(cbackup.time, "monotonic", MONOTONIC):
            cbackup.in_parallel(slow, ["quick", "slow"], self.progress)
        self.assertEqual([], self.screen.lines())

    def test_q_is_for_the_progress_of_the_whole_process(self):
        with mock.patch.object(cbackup, "logging"), contextlib.redirect_stdout(io.StringIO()), \
                mock.patch.object(cbackup.Progress, "quiet", False):
            cbackup.run_arguments(["-q", "version"])
            self.assertTrue(cbackup.Progress.quiet)

    def test_quiet_is_quiet(self):
        self.addCleanup(setattr, cbackup.Progress, "quiet", False)
        cbackup.Progress.quiet = True
        cbackup.Progress().say("x")
        self.assertEqual("", self.screen.getvalue())


class AtATerminalTest(Case):
    """Real processes whose output is a terminal."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        c.source("docs", "s", {"f": 1000})
        c.backup("ba", "a", "7M")
        c.start()
        cls.not_yet, cls.first = cls.at_terminal("status"), cls.at_terminal("client")

    @classmethod
    def at_terminal(cls, *words, **more):
        """(status, what stands on the terminal, without what was overwritten)."""
        ours, theirs = pty.openpty()
        with open(theirs, "rb", 0) as terminal:
            process = Process(quick_program("--home", cls.c.home("a"), *words), cls.c.environment("a", TERM="xterm", **more),
                              terminal=terminal)
        text = b""
        try:
            while True:
                data = os.read(ours, 65536)
                if not data:
                    break
                text += data
        except OSError:                                         # Linux: the other side is closed
            pass
        os.close(ours)
        screen = Screen()
        screen.write(text.decode().replace("\r\n", "\n"))
        return process.wait().rc, screen.lines()

    def test_a_pass_ends_with_what_it_did_and_whether_all_is_safe(self):
        status, lines = self.first
        self.assertEqual(0, status)
        self.assertEqual(["a: 1 copied (%s)" % cbackup.format_size(1000),
                          "\033[32msafe\033[0m: 1 file of 1 source have all their copies"], lines)
        self.assertEqual("a: nothing to do", self.at_terminal("client", "--until-settled")[1][0])
        self.assertEqual([], self.at_terminal("client", "-q")[1])
        self.assertSilent(self.c.run("a", "client"))            # not at a terminal: nothing

    def test_what_a_pass_has_named_itself_is_still_not_safe_at_its_end(self):
        path = os.path.join(self.c.sources["docs"].path, "locked")
        self.addCleanup(self.c.client, "a")
        self.addCleanup(os.unlink, path)
        write_file(path, "x")
        os.chmod(path, 0)
        if os.access(path, os.R_OK):        # by root: then it is too large
            write_file(path, b"x" * (8 << 20))
        status, lines = self.at_terminal("client")
        self.assertTrue(lines[-1].startswith("\033[3"), lines)
        self.assertIn("NOT SAFE\033[0m: ", lines[-1])

    def test_colours_say_well_and_waiting_unless_they_are_not_wanted(self):
        self.assertIn("\033[33m    NOT SAFE YET", "\n".join(self.not_yet[1]))
        self.assertIn("\033[32m    all safe\033[0m", "\n".join(self.at_terminal("status")[1]))
        self.assertNotIn("\033", "\n".join(self.at_terminal("status", NO_COLOR="1")[1]))
        self.assertNotIn("\033", self.c.run("a", "status").stdout)

    def test_a_dry_run_lists_each_file_when_asked(self):
        result = self.c.run("a", "restore", "docs", "--dry-run", "-v", "--to", self.directory())
        self.assertRc(0, result)
        self.assertRegex(result.stdout, r"(?m)^fetch +%s  f$" % re.escape(cbackup.format_size(1000)))
        self.assertNotIn("fetch ", self.c.run("a", "restore", "docs", "--dry-run", "--to", self.directory()).stdout)


class HelpTest(Case):

    def run_program(self, *words):
        base = self.directory()
        return Process(quick_program(*words), plain_environment(base), base).wait(30)

    def test_every_command_says_what_it_does_and_its_examples_are_right(self):
        whole = cbackup.build_parser()
        commands = cbackup.commands_of(whole)
        self.assertEqual(set(cbackup.HELP), set(commands))
        for name, parser in commands.items():
            text = parser.format_help()
            self.assertIn("example:", text)
            self.assertIn(cbackup.HELP[name][0][:20], " ".join(text.split()))
            for example in cbackup.HELP[name][1:]:
                words = shlex.split(example.partition("cbackup.pyz ")[2].partition(" || ")[0].partition(" > ")[0])
                self.assertEqual(name, whole.parse_args(words).command, example)

    def test_help_and_version_are_commands_too(self):
        self.assertEqual(self.run_program("ls", "--help").stdout, self.run_program("help", "ls").stdout)
        self.assertEqual(self.run_program("--help").stdout, self.run_program("help").stdout)
        self.assertEqual("cbackup %s\n" % cbackup.__version__, self.run_program("version").stdout)

    def test_a_word_that_is_nearly_right_gets_a_guess(self):
        for words, guess in ((["statsu"], "status"), (["restroe", "x"], "restore"), (["help", "clinet"], "client"),
                             (["completion", "bsh"], "bash")):
            result = self.run_program(*words)
            self.assertRc(2, result)
            self.assertOneError(result, "did you mean %s?" % guess)
        self.assertNotIn("did you mean", self.run_program("frobnicate").stderr)


class CompletionTest(Case):
    """What completes, in the shells that are here."""

    def script(self, shell):
        base = self.directory()
        result = Process(quick_program("completion", shell), plain_environment(base), base).wait(30)
        self.assertRc(0, result)
        path = os.path.join(base, "completion")
        write_file(path, result.stdout)
        return path

    def shell(self, name, script):
        done = subprocess.run([name, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
        return done.stdout.decode().split()

    @unittest.skipUnless(shutil.which("bash"), "no bash here")
    def test_bash(self):
        path = self.script("bash")

        def completed(*words):
            return self.shell("bash", "source %s; COMP_WORDS=(%s); COMP_CWORD=%d; _cbackup; echo ${COMPREPLY[@]}" % (
                shlex.quote(path), " ".join(map(shlex.quote, ("cbackup.pyz",) + words)), len(words)))
        self.assertEqual(["restore"], completed("res"))
        self.assertEqual(["--until-settled"], completed("client", "--unt"))
        self.assertEqual(["--dry-run"], completed("--home", "/x", "restore", "photos", "--dr"))
        self.assertIn("--home", completed("--"))

    @unittest.skipUnless(shutil.which("fish"), "no fish here")
    def test_fish(self):
        found = self.shell("fish", "source %s; complete -C 'cbackup.pyz client --unt'" % shlex.quote(self.script("fish")))
        self.assertEqual("--until-settled", found[0])

    @unittest.skipUnless(shutil.which("zsh"), "no zsh here")
    def test_zsh(self):
        self.assertEqual([], self.shell("zsh", "zsh -n %s" % shlex.quote(self.script("zsh"))))

    def test_all_commands_and_options_are_in_all_of_them(self):
        for shell in ("bash", "zsh", "fish"):
            with open(self.script(shell)) as file:
                text = file.read()
            for word in list(cbackup.HELP) + ["until-settled", "dry-run", "listen"]:
                self.assertIn(word, text)


if __name__ == "__main__":
    unittest.main()
