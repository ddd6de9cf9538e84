"""The page: what it says, to whom, and that nothing that it shows can do anything in a browser."""

import html
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import unittest
from html.parser import HTMLParser

import cbackup
from tests.harness import Case, free_port, make_tree, read_file, wait_for, write_file

HOSTILE = b"<img src=x onerror=alert(1)>\"'&\xe9\x01.txt"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reader(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.style = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.style = tag == "style"

    def handle_data(self, data):
        if not self.style:
            self.words.append(data)
        self.style = False

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


class PageCase(Case):

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", name="casa")
        cls.source = c.source("docs", "s", {"f": 1000, HOSTILE: 2000})
        for host in "ab":
            c.backup("b" + host, host, "7M")
        c.start()
        c.round()

    def web(self, host="a", *words):
        """(process, address, port) of a page that is ready."""
        port, holder = free_port()
        self.addCleanup(holder.close)
        process = self.c.spawn(host, "web", "--listen", (words or ("127.0.0.1",))[0] + ":%d" % port)
        self.addCleanup(process.kill)
        wait_for(lambda: process.stdout.endswith("\n") or not process.running, 20, lambda: process.stderr)
        return process, process.stdout, port

    def ask(self, port, path="/", method="GET", host="127.0.0.1", **headers):
        """(status, headers, text)."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, path, headers=dict({"Host": "%s:%d" % (host, port)}, **headers))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally:
            connection.close()


class WebTest(PageCase):

    def test_the_page_and_the_json_are_those_of_status(self):
        process, line, port = self.web()
        self.assertEqual("cbackup web: http://127.0.0.1:%d/\n" % port, line)
        status, headers, text = self.ask(port)
        self.assertEqual((200, "text/html; charset=utf-8"), (status, headers["Content-Type"]))
        self.assertIn("Everything is safe: 2 files of 1 source have all the copies wanted.", Reader(text).text)
        status, headers, text = self.ask(port, "/status.json")
        self.assertEqual((200, "application/json; charset=utf-8"), (status, headers["Content-Type"]))
        self.assertEqual(set(self.c.status("a")), set(json.loads(text)))
        self.assertEqual(2, json.loads(text)["sources"]["docs"]["files"])
        self.assertEqual((404, 200, ""), (self.ask(port, "/etc/passwd")[0], self.ask(port, "/", "HEAD")[0],
                                          self.ask(port, "/", "HEAD")[2]))
        process.signal(signal.SIGTERM)
        self.assertRc(0, process.wait(10))

    def test_it_can_only_be_read_and_only_by_its_own_name(self):
        process, _, port = self.web()
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "BREW"):
            self.assertEqual(405, self.ask(port, method=method)[0], method)
        for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "[", "a:b:c"):
            self.assertEqual(421, self.ask(port, host=host)[0], host)
        self.assertEqual(421, self.ask(port, Host="127.0.0.1:1")[0])
        for host in ("localhost", "[::1]", socket.gethostname()):
            self.assertEqual(200, self.ask(port, host=host)[0], host)
        policy = self.ask(port)[1]["Content-Security-Policy"]
        self.assertIn("default-src 'none'; img-src data:; style-src 'sha256-", policy)
        self.assertNotIn("unsafe", policy)

    def test_visitors_that_say_nothing_or_nonsense_hold_up_nobody(self):
        process, _, port = self.web()
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
        for nonsense in (b"\0\xff\n\n", b"GET / HTTP/9.9\r\n\r\n", b"GET " + b"x" * 70000 + b"\r\n\r\n", b"GET\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as one:
                one.sendall(nonsense)
                one.settimeout(30)
                with self.subTest(nonsense[:20]):
                    try:
                        self.assertNotIn(b"200 OK", one.recv(1000))
                    except ConnectionError:
                        pass
        self.assertEqual(200, self.ask(port)[0])
        for one in silent:
            one.close()
        self.assertEqual("", process.stderr)

    def test_beyond_this_machine_the_address_has_a_token(self):
        process, line, port = self.web("a", "0.0.0.0")
        token = re.match(r"cbackup web: http://0\.0\.0\.0:\d+/\?token=([0-9a-f]{40})\n\Z", line).group(1)
        path = os.path.join(self.c.home("a"), "state", "web-token")
        self.assertEqual((token, 0o600), (read_file(path).decode().strip(), os.stat(path).st_mode & 0o777))
        for wrong in ("/", "/?token=", "/?token=%s0" % token, "/status.json", "/?token=%C3%A9", "/?" + "&".join("abcdefghijkl")):
            self.assertEqual(403, self.ask(port, wrong)[0], wrong)
        status, _, text = self.ask(port, "/?token=" + token)
        self.assertEqual(200, status)
        for host, expected in (("a.local", 200), ("10.0.0.9", 200), ("evil.example", 421)):
            self.assertEqual(expected, self.ask(port, "/?token=" + token, host=host)[0], host)
        link = [attributes["href"] for tag, attributes in Reader(text).tags if tag == "a" and "json" in attributes["href"]]
        self.assertEqual(200, self.ask(port, "/" + link[0])[0])
        process.kill()
        self.assertIn(token, self.web("a", "0.0.0.0")[1])       # the same one the next time

    def test_an_address_in_use_and_words_that_are_none_are_errors_of_one_line(self):
        _, _, port = self.web()
        result = self.c.run("a", "web", "--listen", "127.0.0.1:%d" % port)
        self.assertRc(1, result)
        self.assertOneError(result, "cannot listen", "--listen")
        for word in ("127.0.0.1:x", "no such host.example:1"):
            result = self.c.run("a", "web", "--listen", word)
            self.assertRc(2, result)
            self.assertEqual(1, len(result.error_lines), result)

    # -- in a real browser: what it makes of the page, and what it complains of

    def browse(self, address, *words):
        profile = os.path.join(self.directory(), "profile")
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
             "--user-data-dir=" + profile] + list(words) + [address],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
        self.assertEqual(0, done.returncode, done.stderr)
        complaints = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
        self.assertEqual([], complaints)
        return done.stdout.decode()

    @unittest.skipUnless(CHROMIUM, "no Chromium here")
    def test_the_verdict_is_there_a_hostile_name_is_text_and_nothing_is_complained_of(self):
        c = self.c
        path = os.path.join(c.home("a"), "state", "passes.jsonl")
        for undo in ((c.round,), (write_file, path, read_file(path)), (shutil.rmtree, os.path.join(self.source, "new"))):
            self.addCleanup(*undo)
        make_tree(self.source, {b"new/" + HOSTILE: 10})
        c.client("a")
        record = json.loads(read_file(path).splitlines()[-1].decode())
        with open(path, "ab") as file:
            file.write(json.dumps(dict(record, wrong=[cbackup.shown(HOSTILE), "\udce9"])).encode() + b"\n")
        _, line, port = self.web()
        seen = self.browse("http://127.0.0.1:%d/" % port, "--dump-dom")
        words = Reader(seen).text
        self.assertIn("the next passes go on with it", words)
        self.assertIn("<img src=x onerror=alert(1)>", words)
        self.assertNotIn("<img", seen)
        self.assertIn(html.escape("<img src=x onerror=alert(1)>", quote=False), seen)

    @unittest.skipUnless(CHROMIUM, "no Chromium here")
    def test_a_phone_and_a_desk(self):
        page = os.path.join(self.directory(), "page.html")
        self.c.run("a", "status", "--html", page)
        for width in self.todays((500, 1200), 1):               # no narrower window is to be had
            picture = page + ".%d.png" % width
            self.browse("file://" + page, "--screenshot=" + picture, "--window-size=%d,2000" % width)
            data = read_file(picture)
            self.assertEqual((b"\x89PNG", width), (data[:4], int.from_bytes(data[16:20], "big")))


class HtmlTest(PageCase):

    def page(self, host="a"):
        path = os.path.join(self.directory(), "page.html")
        self.c.run(host, "status", "--html", path)
        return path, read_file(path).decode()

    def test_it_needs_nothing_else_and_runs_nothing(self):
        _, text = self.page()
        reader = Reader(text)
        self.assertEqual([], [tag for tag, _ in reader.tags if tag in ("script", "img", "iframe", "object", "embed", "form")])
        for tag, attributes in reader.tags:
            self.assertFalse([name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes))
            for name in ("src", "href", "srcset", "data"):
                self.assertIn(attributes.get(name, "#hosts"), ("data:,", "#hosts"))
        self.assertNotRegex(re.sub(r"http-equiv", "", text), r"https?:|@import|url\(")

    def test_landmarks_headings_and_words_for_every_bar(self):
        reader = Reader(self.page()[1])
        tags = [tag for tag, _ in reader.tags]
        for tag in ("header", "main", "footer", "h1", "title"):
            self.assertEqual(1, tags.count(tag), tag)
        ids = {attributes.get("id") for _, attributes in reader.tags}
        for tag, attributes in reader.tags:
            if tag == "section":
                self.assertIn(attributes["aria-labelledby"], ids)
            if tag == "svg":
                self.assertTrue(attributes.get("aria-label") or attributes.get("aria-hidden"), attributes)
            if tag == "th":
                self.assertIn(attributes["scope"], ("row", "col"))

    def test_what_is_wrong_is_said_with_the_way_out_and_names_are_only_text(self):
        facts = {"status": self.status(sources={"docs": dict(
            self.source_facts(), state="held", reason="<script>alert(1)</script> \udce9", underserved_files=1)}),
            "passes": [(1.0, 1.0, "<b>", ["</li><script>x \udcff"])]}
        text = self.made(**facts)
        self.assertNotIn("<script", text)
        self.assertNotIn("<b>", text)
        words = Reader(text).text
        self.assertIn("Not everything is safe.", words)
        self.assertIn("<script>alert(1)</script>", words)
        self.assertIn("accept docs", words)
        text.encode("utf-8")

    @staticmethod
    def source_facts():
        return {"host": "s", "path": "/x", "replicas": 2, "files": 2, "bytes": 10, "copies": {"2": 2}, "then": None,
                "underserved_files": 0, "underserved_bytes": 0, "overserved_files": 0, "state": "ok", "last_scan": 1.0,
                "reason": None, "cause": None, "impossible": "", "problems": {}, "stuck": {}, "late": False, "failed": None,
                "short": [], "unknown": False, "held_files": [], "unproven_files": 0, "unproven_since": None, "short_since": None}

    @staticmethod
    def status(**more):
        return dict({"cluster": "casa", "config_version": 1, "sources": {}, "backups": {}, "unreachable": [], "hosts": {},
                     "warn_after": 1e5, "scan": 900.0, "conflicts": [], "warnings": [], "config_age": 1.0, "config_held": {}},
                    **more)

    def made(self, status, passes=(), hosts=()):
        plan = {"hosts": dict(hosts), "unreachable": status["unreachable"]}
        return cbackup.make_page({"status": status, "plan": plan, "verdict": cbackup.verdict(status), "time": 0.0, "host": "a",
                                  "passes": list(passes), "reserve": {}})

    def test_waiting_is_told_from_being_wrong(self):
        short = dict(self.source_facts(), underserved_files=1, underserved_bytes=5, copies={"1": 1, "2": 1})
        self.assertIn("the next passes go on with it", Reader(self.made(self.status(sources={"docs": short}))).text)
        self.assertIn("no source in the configuration", Reader(self.made(self.status())).text)
        gone = dict(self.source_facts(), files=None, state="unreachable", last_scan=None)
        words = Reader(self.made(self.status(sources={"docs": gone}, unreachable=["s"]))).text
        self.assertIn("s does not answer: switch it on", words)
        self.assertNotIn("Everything is safe", words)

    def test_a_file_that_is_short_of_copies_and_a_host_that_is_down(self):
        c = self.cluster("s", "a")
        c.source("docs", "s", {HOSTILE: 100})
        c.backup("ba", "a", "7M")
        c.start()
        c.client("a")
        path = os.path.join(self.directory(), "page.html")
        self.assertRc(0, c.run("a", "status", "--html", path))
        words = Reader(read_file(path).decode()).text
        self.assertIn("docs: offer a backup on one more host, or ask for fewer replicas.", words)
        c.kill("s")
        self.assertRc(1, c.run("a", "status", "--html", path))
        self.assertIn("not known", Reader(read_file(path).decode()).text)

    # -- the same facts for a program that watches: --metrics

    def test_every_line_is_of_the_text_format(self):
        result = self.c.run("a", "status", "--metrics")
        self.assertRc(0, result)
        line = re.compile(r'# (HELP|TYPE) cbackup_\w+ .+|cbackup_\w+(\{\w+="[^"\n]*"(,\w+="[^"\n]*")*\})? [0-9.e+-]+')
        for text in result.stdout.splitlines():
            self.assertTrue(line.fullmatch(text), text)
        self.assertIn("cbackup_safe 1\n", result.stdout)
        self.assertIn('cbackup_source_files{source="docs",host="s"} 2\n', result.stdout)
        self.assertIn('cbackup_source_files_with_copies{source="docs",host="s",copies="2"} 2\n', result.stdout)

    @unittest.skipUnless(shutil.which("promtool"), "no promtool here")
    def test_promtool_has_nothing_to_say(self):
        made = self.c.run("a", "status", "--metrics").stdout.encode()
        done = subprocess.run(["promtool", "check", "metrics"], input=made, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=60)
        self.assertEqual((0, b""), (done.returncode, done.stdout))


if __name__ == "__main__":
    unittest.main()
