"""The program `alert` in a home: told once when something has been wrong for long enough, daily while it lasts, and once
when it is well again."""

import http.server
import os
import re
import threading
import unittest

import cbackup
from tests.harness import TOP, Case, make_tree, read_file, write_file

TELLS = "#!/bin/sh\n{ echo \"== $1\"; cat; } >>told\n"


class WatchTest(Case):
    """The watch alone: verdicts are given to it, with times."""

    def setUp(self):
        self.home = cbackup.Home(self.directory())
        write_file(self.alert, TELLS)
        os.chmod(self.alert, 0o700)

    @property
    def alert(self):
        return os.path.join(self.home.path, "alert")

    def at(self, now, *lines, after=100.0, at_most=None):
        """What `alert` is told by a pass at a time, which finds these wrong: a list of lines."""
        told = os.path.join(self.home.path, "told")
        write_file(told, "")
        watch = cbackup.Watch(self.home, after)
        watch.now = now
        found = cbackup.Verdict(trouble=list(lines), at_most=at_most or {})
        watch.note(found)
        watch.tell()
        return read_file(told).decode().splitlines()

    def test_trouble_is_told_once_when_it_lasted_then_daily_and_once_that_it_is_over(self):
        bad = "photos is held: why"
        self.assertEqual([], self.at(1000, bad))
        self.assertEqual([], self.at(1099, bad))
        self.assertEqual(["== trouble", bad], self.at(1100, bad))
        self.assertEqual([], self.at(1200, bad))
        self.assertEqual([], self.at(1100 + 86399, bad))
        self.assertEqual(["== trouble", bad], self.at(1100 + 86400, bad))
        self.assertEqual(["== well", "well again: " + bad], self.at(90000))
        self.assertEqual([], self.at(90001))

    def test_what_is_over_before_it_is_old_is_never_told(self):
        for now in range(1000, 3000, 50):
            self.assertEqual([], self.at(now, *["photos is held: why"] * (now // 50 % 2)))

    def test_with_no_patience_it_is_told_at_once(self):
        self.assertEqual(["== trouble", "x is wrong"], self.at(1000, "x is wrong", after=0.0))

    def test_figures_and_examples_that_change_are_the_same_trouble(self):
        self.at(1000, "318 of 61,220 files in photos have fewer than 2 copies")
        self.assertEqual(["== trouble", "1 of 61,221 files in photos have fewer than 2 copies"],
                         self.at(1200, "1 of 61,221 files in photos have fewer than 2 copies"))
        self.assertEqual([], self.at(1300, "2 of 1 file in photos have fewer than 2 copies"))
        same = [("pi1: 2 paths: could not be read: a, b", "pi1: 1 path: could not be read: b"),
                ("h asleep since 5 minutes; then: x is held: y", "h asleep since 1 day; then: x is held: y"),
                ("x was last looked at 90 minutes ago, which is too long", "x was last looked at 1 day ago, which is too long")]
        for one, other in same:
            self.assertEqual(cbackup.trouble_key(one), cbackup.trouble_key(other))
        for one, other in (("pi1 is held: a", "pi2 is held: a"), ("a on b: full", "a on b: gone")):
            self.assertNotEqual(cbackup.trouble_key(one), cbackup.trouble_key(other))

    def test_a_source_in_use_that_always_lacks_copies_of_new_files_is_no_trouble(self):
        line = "1 of 2 files in home have fewer than 2 copies"
        for now in range(1000, 3000, 50):
            self.assertEqual([], self.at(now, line, at_most={line: 60.0}))
        self.assertEqual(["== trouble", line], self.at(3200, line, at_most={line: 5000.0}))

    def test_another_trouble_is_another_event_and_well_is_only_when_all_is_over(self):
        self.at(1000, "a is held: x")
        self.assertEqual(["== trouble", "a is held: x"], self.at(1100, "a is held: x"))
        self.assertEqual([], self.at(1150, "a is held: x", "b is held: x"))
        self.assertEqual(["== trouble", "a is held: x", "b is held: x"], self.at(1250, "a is held: x", "b is held: x"))
        self.assertEqual([], self.at(1300, "b is held: x"))
        self.assertEqual(["== well", "well again: a is held: x", "well again: b is held: x"], self.at(1400))

    def test_an_alert_that_fails_is_named_and_tried_again_after_an_hour(self):
        import contextlib
        import io
        write_file(self.alert, TELLS + "echo the mail server is down\nexit 3\n")
        self.at(1000, "a is held: x")
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            self.assertEqual(["== trouble", "a is held: x"], self.at(1100, "a is held: x"))
            self.assertEqual([], self.at(1200, "a is held: x"))
            self.assertEqual(["== trouble", "a is held: x"], self.at(1100 + 3600, "a is held: x"))
            self.assertEqual([], self.at(5000))                 # it was never told, so nobody hears that it is over
        self.assertEqual(2, said.getvalue().count("alert trouble failed with status 3: the mail server is down"))

    def test_an_alert_that_hangs_is_ended(self):
        import contextlib
        import io
        write_file(self.alert, "#!/bin/sh\nsleep 1000 & wait\n")
        said, limit = io.StringIO(), cbackup.ALERT_SECONDS
        cbackup.ALERT_SECONDS = 0.2
        try:
            with contextlib.redirect_stderr(said):
                self.at(1000, "a is held: x", after=0.0)
        finally:
            cbackup.ALERT_SECONDS = limit
        self.assertIn("took longer than", said.getvalue())

    def test_without_the_program_or_with_a_damaged_memory_nothing_breaks(self):
        os.chmod(self.alert, 0o600)
        self.assertEqual([], self.at(1000, "a is held: x", after=0.0))
        os.chmod(self.alert, 0o700)
        for text in ("", "[]", '{"wrong": {"k": 1, "l": {"line": "x", "since": "y"}}, "over": {}}', '{"wrong": [], "over": [1]}'):
            write_file(self.home.state("watch.json"), text)
            self.assertEqual(["== trouble", "a is held: x"], self.at(2000, "a is held: x", after=0.0))
        self.assertEqual([], self.at(1000, "a is held: x"))     # a clock that was set back


class PassTest(Case):

    def test_passes_and_checks_come_to_a_verdict_and_passes_tell_it(self):
        c = self.cluster("s", "a", "b", alert_after="1h")
        c.source("docs", "s", {"f": 10})
        for host in "ab":
            c.backup("b" + host, host, "7M")
        alert, told = os.path.join(c.home("a"), "alert"), os.path.join(c.home("a"), "told")
        write_file(alert, TELLS)
        os.chmod(alert, 0o700)
        c.start()
        c.client("a")                                           # b has no copy yet
        self.assertRc(1, c.run("b", "status", "--check"))       # where nothing is told
        c.advance(3700)
        self.assertFalse(os.path.exists(told))
        c.client("a")
        self.assertEqual("== trouble\n1 of 1 file in docs have fewer than 2 copies\n", read_file(told).decode())
        c.passes("aba")
        self.assertRegex(read_file(told).decode(), r"\A(== trouble\n.*\n)== well\nwell again: 1 of 1 file in docs .*\n\Z")
        self.assertIn('"since"', read_file(os.path.join(c.home("b"), "state", "watch.json")).decode() + '"since"')


class ReadmeTest(Case):
    """The examples in the README, each against a stand-in."""

    def example(self, word):
        """The first script in the README with this word in it."""
        with open(os.path.join(TOP, "README.md")) as file:
            found = [block for block in re.findall(r"```sh\n(#!.*?)```", file.read(), re.S) if word in block]
        self.assertEqual(1, len(found), word)
        return found[0]

    def setUp(self):
        self.base = self.directory()
        self.asked = asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked.append((self.path, dict(self.headers), body.decode()))
                self.send_response(200)
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *words):
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]

    def tell(self, script, word, text):
        import subprocess
        path = os.path.join(self.base, "alert")
        write_file(path, script)
        os.chmod(path, 0o700)
        done = subprocess.run([path, word], input=text.encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30,
                              env=dict(os.environ, PATH=self.base + ":" + os.environ["PATH"]))
        self.assertEqual((0, b""), (done.returncode, done.stdout))

    def test_mail(self):
        fake = os.path.join(self.base, "sendmail")
        write_file(fake, "#!/bin/sh\n{ echo \"$@\"; cat; } >'%s/mail'\n" % self.base)
        os.chmod(fake, 0o700)
        self.tell(self.example("sendmail").replace("/usr/sbin/", ""), "trouble", "photos is held\n")
        mail = read_file(self.base + "/mail").decode()
        self.assertRegex(mail, r"(?s)\A-t\nTo: .+\nSubject: cbackup: trouble.*\n\nphotos is held\n\Z")

    @unittest.skipUnless(cbackup.shutil.which("curl"), "no curl here")
    def test_ntfy(self):
        self.tell(self.example("ntfy").replace("https://ntfy.sh", self.url), "well", "well again: photos is held\n")
        path, headers, body = self.asked[0]
        self.assertEqual("well again: photos is held\n", body)
        self.assertIn("cbackup: well", headers["Title"])

    @unittest.skipUnless(cbackup.shutil.which("curl"), "no curl here")
    def test_healthchecks(self):
        script = self.example("hc-ping").replace("https://hc-ping.com", self.url)
        self.tell(script, "trouble", "photos is held\n")
        self.tell(script, "well", "over\n")
        self.assertEqual([True, False], [path.endswith("/fail") for path, _, _ in self.asked])
        self.assertEqual(["photos is held\n", "over\n"], [body for _, _, body in self.asked])


if __name__ == "__main__":
    unittest.main()
