"""The command line, the home and the configuration: what is refused, how, and that nothing is changed by it."""

import functools
import os
import re
import shutil
import signal
import socket
import textwrap
import unittest
from unittest import mock

import cbackup

from tests import COMPILED, PROGRAM
from tests.harness import (Case, Process, cluster_pem, inodes, listening, make_tree, plain_environment, program,
                           quick_program, read_file, tree, wait_for, write_file)


class Home:
    """A home directory on a machine without anything else; runs commands there."""

    def __init__(self, base, config=None, pem=True, host="here"):
        self.base = base
        self.home = os.path.join(base, "home")
        os.makedirs(self.home)
        if config is not None:
            write_file(self.path("cbackup.conf"), config)
        if pem:
            write_file(self.path("cluster.pem"), cluster_pem())
            os.chmod(self.path("cluster.pem"), 0o600)
        if host:
            write_file(self.path("host"), host + "\n")

    def path(self, name):
        return os.path.join(self.home, name)

    def run(self, *arguments, umask=None, timeout=30, **more):
        return Process(quick_program("--home", self.home, *arguments), plain_environment(self.base, **more), self.base,
                       umask=umask).wait(timeout)


class UsageTest(Case):
    """Wrong usage: exit code 2 and one line that names what was wrong. Help: exit code 0, on standard output."""

    def run_program(self, *arguments, start=quick_program):
        base = self.directory()
        return Process(start(*arguments), plain_environment(base), base).wait(30)

    def test_help_goes_to_standard_output_and_names_every_command(self):
        result = self.run_program("--help", start=functools.partial(program, file=COMPILED))      # no fork of ours
        self.assertRc(0, result)
        self.assertEqual("", result.stderr)
        for command in ("init", "server", "client", "status", "restore", "demo"):
            self.assertRegex(result.stdout, r"\b%s\b" % command)

    def test_wrong_usage_is_one_line_and_exit_code_2(self):
        cases = [(["frobnicate"], "frobnicate"), (["client", "--frobnicate"], "--frobnicate"), (["--home"], "--home"),
                 (["restore"], "SOURCE"), (["client", "surplus"], "surplus"), ([], "COMMAND")]
        for arguments, word in cases:
            with self.subTest(arguments=arguments):
                result = self.run_program(*arguments)
                self.assertRc(2, result)
                self.assertEqual("", result.stdout)
                self.assertOneError(result)
                self.assertIn(word.lower(), result.stderr.lower())

    def test_a_home_that_is_not_there_is_named_with_the_way_out(self):
        for command in ("server", "client", "status"):
            with self.subTest(command=command):
                base = self.directory()
                result = self.run_program("--home", base + "/nowhere", command)
                self.assertRc(2, result)
                self.assertOneError(result, base + "/nowhere", "init")
                self.assertFalse(os.path.exists(base + "/nowhere"))

    def test_a_source_that_is_not_in_the_configuration_is_named(self):
        home = Home(self.directory(), "[cluster]\nname = t\n[hosts]\nhere = 127.0.0.1:1\n[sources]\nphotos = here:/p\n")
        result = home.run("restore", "fotos", "--to", home.base + "/to")
        self.assertRc(2, result)
        self.assertOneError(result, "fotos")
        self.assertFalse(os.path.exists(home.base + "/to"))


class InitTest(Case):
    """`init` makes a home that works, with a private key that only its owner can read, and overwrites nothing."""

    def home(self, **options):
        return Home(self.directory(), pem=False, host=None, **options)

    def test_the_key_is_private_whatever_the_umask(self):
        for umask in (0, 0o022, 0o077):
            with self.subTest(umask=umask):
                home = self.home()
                self.assertRc(0, home.run("init", umask=umask))
                self.assertEqual(0o600, tree(home.home)["cluster.pem"].mode)
                self.assertIn(b"PRIVATE KEY", read_file(home.path("cluster.pem")))
                self.assertIn(b"CERTIFICATE", read_file(home.path("cluster.pem")))

    def test_no_private_key_is_left_in_any_other_file(self):
        home = self.home()
        self.assertRc(0, home.run("init", TMPDIR=home.base))
        self.assertEqual([], [name for name, entry in tree(home.base).items() if entry.kind == "file" and
                              name != "home/cluster.pem" and b"PRIVATE" in read_file(os.path.join(home.base, name))])

    def test_the_configuration_that_it_writes_is_right_and_commented(self):
        home = self.home()
        self.assertRc(0, home.run("init"))
        text = read_file(home.path("cbackup.conf")).decode()
        for section in ("[cluster]", "[hosts]", "[sources]", "[backups]"):
            self.assertIn(section, text)
        self.assertRegex(text, r"(?m)^\s*#")
        result = home.run("status", "--json")
        self.assertNotEqual(2, result.rc, str(result))
        self.assertEqual(({}, {}), (result.json["sources"], result.json["backups"]))

    def test_nothing_that_is_there_is_overwritten(self):
        for present in (["cluster.pem"], ["cbackup.conf"], ["host"], ["cluster.pem", "cbackup.conf", "host"]):
            with self.subTest(present=present):
                home = self.home()
                for name in present:
                    write_file(home.path(name), "precious %s\n" % name)
                    os.chmod(home.path(name), 0o600)
                before = inodes(home.home)
                result = home.run("init")
                self.assertLessEqual(len(result.error_lines), 1, str(result))
                after = inodes(home.home)
                self.assertEqual(before, {name: after[name] for name in before})

    def test_a_second_init_changes_nothing(self):
        home = self.home()
        self.assertRc(0, home.run("init"))
        before = inodes(home.home)
        home.run("init")
        self.assertEqual(before, inodes(home.home))

    def test_two_clusters_have_different_keys(self):
        keys = []
        for _ in range(2):
            home = self.home()
            self.assertRc(0, home.run("init"))
            keys.append(read_file(home.path("cluster.pem")))
        self.assertNotEqual(keys[0], keys[1])

    def test_the_home_is_the_option_else_the_variable(self):
        base = self.directory()
        for name in ("option", "variable", "user"):
            os.mkdir(os.path.join(base, name))
        env = plain_environment(base + "/user", CBACKUP_HOME=base + "/variable/home")
        made = {base + "/option/home/cluster.pem": ["--home", base + "/option/home"],
                base + "/variable/home/cluster.pem": []}
        expected = set()
        for path, arguments in made.items():
            self.assertRc(0, Process(quick_program(*arguments, "init"), env, base).wait(30))
            expected.add(path)
            self.assertEqual(expected, {os.path.join(base, name) for name in tree(base) if "cluster.pem" in name})

    def test_without_both_it_is_the_users_and_for_root_the_systems_unless_only_the_users_is_there(self):
        base = self.directory()
        own, system = os.path.join(base, "user", ".cbackup"), os.path.join(base, "system")
        os.mkdir(os.path.join(base, "user"))
        with mock.patch.dict(os.environ, HOME=base + "/user"), mock.patch.object(cbackup, "ROOT_HOME", system):
            with mock.patch("os.geteuid", return_value=1000):
                self.assertEqual(cbackup.default_home(), own)
            with mock.patch("os.geteuid", return_value=0):
                self.assertEqual(cbackup.default_home(), system)
                os.mkdir(own)
                self.assertEqual(cbackup.default_home(), own)
                os.mkdir(system)
                self.assertEqual(cbackup.default_home(), system)


class KeyFileTest(Case):
    """A private key that others can read is refused by everything that would use it."""

    def test_a_key_that_others_can_read_is_refused_with_the_way_out(self):
        for mode, commands in ((0o644, ("server", "client", "status")), (0o640, ("server",)), (0o604, ("server",))):
            for command in commands:
                with self.subTest(mode=oct(mode), command=command):
                    home = Home(self.directory(), "[cluster]\nname = t\n[hosts]\nhere = 127.0.0.1:1\n")
                    os.chmod(home.path("cluster.pem"), mode)
                    result = home.run(command)
                    self.assertRc(2, result)
                    self.assertOneError(result, "cluster.pem", "chmod")
                    self.assertEqual(mode, tree(home.home)["cluster.pem"].mode)

    def test_a_key_file_that_holds_no_key_is_named(self):
        for content in (b"", b"rubbish\n", cluster_pem()[:200]):
            with self.subTest(content=content[:20]):
                home = Home(self.directory(), "[cluster]\nname = t\n[hosts]\nhere = 127.0.0.1:1\n")
                write_file(home.path("cluster.pem"), content)
                result = home.run("server")
                self.assertRc(2, result)
                self.assertOneError(result, "cluster.pem")


class ConfigurationErrorsTest(Case):
    """All errors of a configuration are reported together, each with its line, exit code 2, and nothing is changed.

    In the texts below `#!` marks the lines that must be named; two lines marked `#!1` (or any other digit) are one
    error, which may be named at either of them. No other line may be named.
    """

    COMMANDS = (["status"], ["client"], ["server"])

    def errors_of(self, text, commands=COMMANDS):
        """Checks the whole promise for `text`; returns what was said."""
        lines = textwrap.dedent(text).strip("\n").split("\n")
        must, either = set(), {}
        for number, line in enumerate(lines, 1):
            mark = re.search(r"#!(\d?)", line)
            if mark and mark.group(1):
                either.setdefault(mark.group(1), set()).add(number)
            elif mark:
                must.add(number)
        home = Home(self.directory(), "\n".join(line.split("#!")[0].rstrip() for line in lines) + "\n")
        before = inodes(home.base)
        for command in commands:
            result = home.run(*command)
            self.assertRc(2, result)
            self.assertEqual("", result.stdout, str(result))
            named = {int(number) for number in re.findall(r"(?:\bline |:)(\d{1,3})\b", result.stderr)}
            self.assertEqual(set(), must - named, "lines that are not named in: %s" % result)
            for numbers in either.values():
                self.assertTrue(numbers & named, "none of the lines %s is named in: %s" % (numbers, result))
            good = set(range(1, len(lines) + 1)) - must - set().union(*either.values())
            self.assertEqual(set(), good & named, "lines that are right but named in: %s" % result)
            self.assertEqual(len(must) + len(either), len(result.error_lines),
                             "one line for each error expected: %s" % result)
            after = inodes(home.base)
            self.assertEqual(before, {name: after.get(name) for name in before})
        return result.stderr

    def test_all_errors_of_a_file_are_reported_together(self):
        said = self.errors_of("""
            [cluster]
            name     = home
            replicass = 2                       #!
            keep     = 30bananas                #!
            port     = 99999                    #!
            [hosts]
            here = 127.0.0.1:7001
            mini = 127.0.0.1:7002
            [sources]
            photos = mini:/tank/photos
            music  = mini:/tank/music colour=red  #!
            [backups]
            b1 = here:/srv/one size=12Q         #!
            b2 = here:/srv/two                  #!
            b3 = here:/srv/three size=1G
            """)
        for word in ("replicass", "bananas", "99999", "colour", "12Q", "b2"):
            self.assertIn(word, said)

    def test_each_single_error_is_found(self):
        head = "[cluster]\nname = t\n[hosts]\nhere = 127.0.0.1:7001\nmini = 127.0.0.1:7002\n"
        cases = {
            "a wrong key of the cluster": "[cluster]\nname = t\nfrobnicate = 1  #!",
            "a wrong section": "[cluster]\nname = t\n[sauces]  #!",
            "a line before any section": "name = t  #!\n[cluster]",
            "a line without '='": head + "[sources]\nphotos mini:/tank  #!",
            "a source without a host": head + "[sources]\nphotos = /tank  #!",
            "a source without a path": head + "[sources]\nphotos = mini:  #!",
            "a path that is not absolute": head + "[sources]\nphotos = mini:tank/photos  #!",
            "a source twice": head + "[sources]\nphotos = mini:/a  #!1\nphotos = mini:/b  #!1",
            "a backup twice": head + "[backups]\nb = mini:/a size=1G  #!1\nb = mini:/b size=1G  #!1",
            "a host twice": "[hosts]\nhere = 127.0.0.1:7001  #!1\nhere = 127.0.0.1:7002  #!1",
            "a host without an address": "[hosts]\nhere = 127.0.0.1:7001\nmini =  #!",
            "a port that is none": "[hosts]\nhere = 127.0.0.1:7001\nmini = 127.0.0.1:many  #!",
            "a backup inside a source": head + "[sources]\ns = here:/data  #!1\n"
                                        "[backups]\nb = here:/data/cb size=1G  #!1",
            "a backup that is a source": head + "[sources]\ns = here:/data  #!1\n"
                                         "[backups]\nb = here:/data size=1G  #!1",
            "a backup inside a source, untidily": head + "[sources]\ns = here:/data/  #!1\n"
                                                  "[backups]\nb = here:/x/..//data/./cb size=1G  #!1",
            "nested backups": head + "[backups]\nb1 = here:/srv  size=1G  #!1\nb2 = here:/srv/inner  size=1G  #!1",
            "the same backup twice": head + "[backups]\nb1 = here:/srv  size=1G  #!1\nb2 = here:/srv/  size=1G  #!1",
            "a size that does not parse": head + "[backups]\nb = here:/srv size=big  #!",
            "a negative size": head + "[backups]\nb = here:/srv size=-1G  #!",
            "a reserve that does not parse": head + "[backups]\nb = here:/srv reserve=1X  #!",
            "neither size nor reserve": head + "[backups]\nb = here:/srv  #!",
            "a wrong key of a source": head + "[sources]\ns = here:/data size=1G  #!",
            "a wrong key of a backup": head + "[backups]\nb = here:/srv size=1G colour=red  #!",
            "replicas that are no number": "[cluster]\nname = t\nreplicas = two  #!",
            "no replicas at all": "[cluster]\nname = t\nreplicas = 0  #!",
            "replicas of a source that are no number": head + "[sources]\ns = here:/data replicas=some  #!",
            "a duration without a number": "[cluster]\nname = t\nscan = often  #!",
            "a duration with a wrong unit": "[cluster]\nname = t\nscrub = 30y  #!",
            "a rate that does not parse": "[cluster]\nname = t\nbwlimit = slow  #!",
            "an open quotation mark": head + "[sources]\ns = here:\"/data  #!",
            "a name that would leave its directory": head + "[sources]\n../s = here:/data  #!",
            "a name that is cbackup's own": head + "[sources]\n.cbackup = here:/data  #!",
        }
        for what, text in cases.items():
            with self.subTest(what):
                self.errors_of(text, commands=[["status"]])

    def test_what_only_looks_like_an_error_is_none(self):
        home = Home(self.directory(), textwrap.dedent("""
            # a comment
            [cluster]
            name     = home     # at the end of a line
            replicas = 2
            keep     = 2w
            scan     = 90s
            scan_min = 0s
            scrub    = 6h
            bwlimit  = 1.5M

            [hosts]
            here = 127.0.0.1:7001
            other= 127.0.0.1:7002
            [sources]
            s1 = here:/data
            s2 = other:/data exclude=*.tmp exclude="My Cache" replicas=1
            s3 = here:"/with # and blank"
            [backups]
            b1 = other:/databases/cb size=1.5T
            b2 = here:/data2 size=100
            b3 = here:/data3 reserve=20G
            b4 = other:'/data3' size=512M reserve=1G
            """))
        result = home.run("status", "--json")
        self.assertNotEqual(2, result.rc, str(result))
        self.assertEqual({"s1", "s2", "s3"}, set(result.json["sources"]))
        self.assertEqual("/with # and blank", result.json["sources"]["s3"]["path"])
        self.assertEqual({"b1", "b2", "b3", "b4"}, set(result.json["backups"]))

    def test_a_file_that_is_no_text_is_refused_without_a_traceback(self):
        for content in (b"\xff\xfe\x00\x00", b"\x00" * 100, os.urandom(4096), b"[cluster", b"=", b"[cluster]\n = \n"):
            with self.subTest(content=content[:10]):
                home = Home(self.directory(), "")
                write_file(home.path("cbackup.conf"), content)
                result = home.run("status")
                self.assertRc(2, result)
                self.assertIn("cbackup.conf", result.stderr)


class QuotingTest(Case):
    """Names with blanks are quoted as in a shell, and what is quoted is meant literally."""

    def test_directories_with_blanks_are_backed_up_and_back_up(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"a file": b"1", "My Cache/x": b"2", "b#1": b"3"},
                       path=cluster.path("s", "my # documents"), exclude="My Cache")
        cluster.backup("b1", "a", "1M", path=cluster.path("a", "big disk", "it's \"cb\""))
        cluster.start()
        self.assertRc(0, cluster.client("a"))
        self.assertEqual({"a file": ["b1"], "b#1": ["b1"], "My Cache/x": []}, cluster.copies_on_disk("docs"))


class HostNameTest(Case):
    """Which host this machine is: --host, else the file `host`, else the short host name."""

    def ready_line(self, host_file, *arguments):
        cluster = self.cluster("one", "two", self.short_name())
        home = cluster.home("one")
        os.unlink(os.path.join(home, "host"))
        if host_file is not None:
            write_file(os.path.join(home, "host"), host_file)
        server = cluster.spawn("one", *arguments, "server")
        self.addCleanup(server.kill)
        wait_for(lambda: "\n" in server.stdout or not server.running, 20, "no ready line")
        server.signal(signal.SIGTERM)
        result = server.wait(15)
        self.assertRc(0, result)
        name = re.match(r"cbackup server (\S+): listening on \S+:(\d+)\n", result.stdout)
        self.assertEqual(cluster.ports[name.group(1)], int(name.group(2)))
        return name.group(1)

    @staticmethod
    def short_name():
        return socket.gethostname().split(".")[0]

    def test_the_file_names_the_host(self):
        self.assertEqual("two", self.ready_line("two\n"))

    def test_the_option_wins_over_the_file(self):
        self.assertEqual("one", self.ready_line("two\n", "--host", "one"))

    def test_without_both_it_is_the_short_host_name(self):
        self.assertEqual(self.short_name(), self.ready_line(None))

    def test_a_host_that_the_configuration_does_not_know_is_refused_by_name(self):
        home = Home(self.directory(), "[cluster]\nname = t\n[hosts]\nhere = 127.0.0.1:7001\n", host="stranger")
        for command in ("server", "client"):
            with self.subTest(command):
                result = home.run(command)
                self.assertRc(2, result)
                self.assertOneError(result, "stranger")


class MissingProgramsTest(Case):
    """A missing rsync or openssl is one line that names it and how to get it, before anything is changed."""

    def path_without(self, *missing):
        """A PATH on which these programs, but no others, are missing."""
        folder = os.path.join(self.directory(), "bin")
        os.mkdir(folder)
        for place in reversed(os.environ["PATH"].split(os.pathsep)):
            for name in os.listdir(place) if os.path.isdir(place) else []:
                link = os.path.join(folder, name)
                if name not in missing and not os.path.lexists(link):
                    os.symlink(os.path.join(place, name), link)
        self.assertIsNotNone(shutil.which("sh", path=folder))
        return folder

    def assertNamesPackage(self, result, package):
        self.assertRc(2, result)
        self.assertOneError(result, package)
        self.assertRegex(result.stderr, r"install|pkg_add|\badd\b|\bemerge\b", "no way out in: %s" % result)

    def test_without_rsync_server_and_client_name_the_package(self):
        path = self.path_without("rsync", "openrsync")
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f": b"1"})
        kept = cluster.backup("b1", "a", "1M")
        self.assertNamesPackage(cluster.run("s", "server", timeout=20, PATH=path), "rsync")
        cluster.start("s")
        self.assertNamesPackage(cluster.run("a", "client", PATH=path), "rsync")
        self.assertFalse(os.path.exists(os.path.join(kept, "docs", "f")))

    def test_without_openssl_init_names_the_package_and_makes_no_key(self):
        home = Home(self.directory(), pem=False, host=None)
        result = home.run("init", PATH=self.path_without("openssl"))
        self.assertNamesPackage(result, "openssl")
        self.assertFalse(os.path.exists(home.path("cluster.pem")))
        self.assertRc(0, home.run("init"))

    def test_only_init_needs_openssl(self):
        path = self.path_without("openssl")
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f": b"1"})
        cluster.backup("b1", "a", "1M")
        cluster.start("s")
        self.assertRc(0, cluster.run("a", "client", PATH=path))
        self.assertEqual({"f": ["b1"]}, cluster.copies_on_disk("docs"))


class QuietTest(Case):
    """Without a terminal, what has nothing wrong to report prints nothing: cron mails what is printed."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.path = c.source("docs", "s", {"f%d" % number: b"1" for number in range(5)})
        c.backup("b1", "a", "1M")
        c.start()

    def setUp(self):
        if "s" not in self.c.servers:
            self.c.start("s")

    def test_a_pass_with_nothing_wrong_prints_nothing(self):
        cluster, path = self.c, self.path
        make_tree(path, {"f%d" % number: b"2" for number in range(5)})
        self.assertSilent(cluster.run("a", "client"))
        self.assertEqual([["b1"]] * 5, [cluster.copies_on_disk("docs")["f%d" % number] for number in range(5)])
        self.assertSilent(cluster.run("a", "client"))
        write_file(os.path.join(path, "f1"), "changed")
        os.unlink(os.path.join(path, "f2"))
        self.assertSilent(cluster.run("a", "client", "--until-settled"))
        self.assertSilent(cluster.run("s", "client"))       # a host without any backup

    def test_with_json_the_object_is_all_that_is_printed(self):
        self.c.client("a")
        make_tree(self.path, {"f": b"1"})
        result = self.c.client("a")
        self.assertRc(0, result)
        self.assertEqual(("", 1), (result.stderr, len(result.stdout.splitlines())), str(result))
        self.assertEqual(1, result.json["copied_files"])

    def test_a_server_prints_its_ready_line_and_nothing_else(self):
        self.assertSilent(self.c.run("a", "client"))
        server = self.c.servers["s"]
        self.c.stop("s")
        self.assertRegex(server.wait().stdout, r"\Acbackup server s: listening on \S+:\d+\n\Z")
        self.assertEqual("", server.wait().stderr)


class SignalsTest(Case):
    """A server ends with 0 at SIGTERM and at SIGINT, at once; an interrupted command ends with 130."""

    def test_a_server_exits_0_at_either_signal_and_can_start_again_at_once(self):
        cluster = self.cluster("s", replicas=1)
        cluster.source("docs", "s", {"f": b"1"})
        for number in (signal.SIGTERM, signal.SIGINT):
            cluster.start("s")
            server = cluster.servers.pop("s")
            server.signal(number)
            result = server.wait(10)
            self.assertRc(0, result)
            self.assertEqual("", result.stderr)

    def test_a_server_with_open_connections_ends_all_the_same(self):
        cluster = self.cluster("s", replicas=1)
        cluster.start("s")
        with socket.create_connection(("127.0.0.1", cluster.ports["s"]), 10):
            cluster.stop("s")

    def test_a_client_that_is_interrupted_exits_130(self):
        cluster = self.cluster("s", "a", replicas=1)
        cluster.source("docs", "s", {"f": b"1"})
        cluster.backup("b1", "a", "1M")
        with listening() as (port, listener):
            cluster.ports["s"] = port
            client = cluster.spawn("a", "client")
            listener.settimeout(20)
            with listener.accept()[0]:
                client.signal(signal.SIGINT)
                result = client.wait(15)
        self.assertRc(130, result)
        self.assertLessEqual(len(result.error_lines), 1, str(result))


class SecondServerTest(Case):
    """A home has one server: a second one is refused, and the first goes on."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "other", replicas=1)
        c.source("docs", "s", {"f": b"1"})
        c.backup("b1", "a", "1M")
        c.start("s")

    def test_a_second_server_on_the_same_home_is_refused(self):
        cluster = self.c
        result = cluster.run("s", "server", timeout=20)
        self.assertRc(1, result)
        self.assertOneError(result, "is in use by another cbackup")
        self.assertEqual("", result.stdout)
        self.assertRc(0, cluster.client("a"))
        self.assertEqual({"f": ["b1"]}, cluster.copies_on_disk("docs"))

    def test_nor_with_another_port(self):
        cluster = self.c
        # The same home, but the port of a host that is not running: only the home can tell.
        result = cluster.run("s", "--host", "other", "server", timeout=20)
        self.assertRc(1, result)
        self.assertOneError(result, "is in use by another cbackup")
        self.assertEqual("", result.stdout)


class VersionOfPythonTest(Case):
    """The module stays within the language of Python 3.8."""

    def test_the_module_compiles_for_python_3_8(self):
        import ast
        ast.parse(read_file(PROGRAM).decode(), feature_version=(3, 8))


if __name__ == "__main__":
    unittest.main()
