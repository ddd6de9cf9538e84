"""A new machine: invite and join with one line, and what starts the server at boot."""

import configparser
import contextlib
import json
import os
import plistlib
import pty
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import unittest
import xml.etree.ElementTree
from unittest import mock

import cbackup
from tests.harness import (PROGRAM, Case, Process, free_port, inodes, listening, make_tree, new_cluster_pem,
                           plain_environment, quick_program, read_file, tree, write_file)


class JoiningCase(Case):
    """Hosts s and a are a cluster; other machines, of which it has not heard, join it."""

    count = 0

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=2)
        c.source("docs", "s", {"f%d" % number: 100 for number in range(5)})
        c.backup("ba", "a", "1M")
        c.start("s")

    def machine(self):
        """The name of a machine on which there is nothing at all."""
        type(self).count += 1
        os.mkdir(self.c.path("new%d" % self.count))
        return "new%d" % self.count

    def invite(self):
        """[address, token] of an invitation that was not made at the command line."""
        with mock.patch.dict(os.environ, CBACKUP_TEST="1", **self.c.variables):
            return ["127.0.0.1:%d" % self.c.ports["s"], cbackup.make_invitation(cbackup.Home(self.c.home("s")))]

    def printed(self):
        """[address, token], as `invite` prints them."""
        result = self.c.run("s", "invite")
        self.assertRc(0, result)
        self.assertEqual(("", 1), (result.stderr, len(result.stdout.splitlines())), str(result))
        words = shlex.split(result.stdout)
        self.assertEqual(["python3", "cbackup.pyz", "join"], words[:3])
        return words[3:]

    def join(self, machine, address, token, *options):
        return self.c.run(machine, *(options or ("--host", machine)), "join", address, token)

    def say(self, request):
        """The whole answer to somebody without the key who says this."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", self.c.ports["s"]), 10) as plain:
            with context.wrap_socket(plain) as peer:
                peer.sendall(json.dumps(request).encode() + b"\n")
                return b"".join(iter(lambda: peer.recv(65536), b""))

    def assertNothingThere(self, machine):
        found = [name for name, entry in tree(self.c.path(machine)).items() if entry.kind != "dir"]
        self.assertEqual([], found, "a join that was refused left something")


class JoinTest(JoiningCase):

    def test_a_new_machine_joins_with_one_line_and_then_takes_its_share(self):
        c, new = self.c, self.machine()
        result = self.join(new, *self.printed())
        self.assertRc(0, result)
        home = c.home(new)
        self.assertEqual({"cbackup.conf": 0o600, "cluster.pem": 0o600, "host": 0o600, "state": 0o700},
                         {name: entry.mode for name, entry in tree(home).items() if "/" not in name})
        for name in ("cbackup.conf", "cluster.pem"):
            self.assertEqual(read_file(os.path.join(c.home("s"), name)), read_file(os.path.join(home, name)))
        # The lines that it prints may be appended as they are; the rest of what it says is typed as it stands.
        printed = re.findall(r"(?m)^     (.*)$", result.stdout)
        port, holder = free_port()
        self.addCleanup(holder.close)
        lines = "\n".join(line for line in printed if "service --install" not in line)
        lines = lines.replace("%s = 127.0.0.1" % new, "%s = 127.0.0.1:%d" % (new, port))
        lines = re.sub(r"(?m)^%s = %s:/\S+" % (new, new), "bnew = %s:%s" % (new, c.path(new, "backup")), lines)
        lines = re.sub(r"(?m)^(\S+-home = %s:).*" % new, r"\1" + shlex.quote(c.path(new, "my files")), lines)
        make_tree(c.path(new, "my files"), {"g": b"mine"})
        write_file(home + "/cbackup.conf", read_file(home + "/cbackup.conf") + lines.encode() + b"\n")
        c.ports[new] = port
        c._written = c.config()
        c.servers[new] = c.spawn(new, "server")
        c._wait_ready(new)
        self.assertTrue(result.stdout.endswith("     %s\n" % printed[-1]), result.stdout)       # the one thing to be typed
        command = printed[-1].replace("sudo ", "").replace("service --install", "client")
        self.assertNotEqual(command, printed[-1])
        self.assertRc(0, Process(shlex.split(command), c.environment(new), c.path(new)).wait())
        self.assertRc(0, c.client("a"))
        self.assertRc(0, c.client(new))
        status = c.status("a")
        self.assertEqual({"1": 0, "2": 5}, dict({"1": 0}, **{
            key: value for key, value in status["sources"]["docs"]["copies"].items() if value}))
        self.assertEqual(["f%d" % number for number in range(5)], sorted(os.listdir(c.path(new, "backup", "docs"))))
        self.assertEqual(b"mine", read_file(c.backups["ba"].path + "/%s-home/g" % new))
        self.assertEqual(read_file(home + "/cbackup.conf"), read_file(c.home("a") + "/cbackup.conf"))
        again = self.machine()
        result = self.join(again, *self.invite(), "--host", new)
        self.assertIn("knows it already: source %s-home, backup bnew" % new, result.stdout)
        c.stop(new)

    def test_the_key_is_private_whatever_the_umask(self):
        new = self.machine()
        command = quick_program("--home", self.c.home(new), "join", *self.invite())
        self.assertRc(0, Process(command, self.c.environment(new), self.c.path(new), umask=0).wait(30))
        self.assertEqual(0o600, tree(self.c.home(new))["cluster.pem"].mode)
        self.assertEqual(0o700, os.stat(self.c.home(new)).st_mode & 0o777)

    def test_a_token_works_once(self):
        address, token = self.printed()
        self.assertRc(0, self.join(self.machine(), address, token))
        late = self.machine()
        result = self.join(late, address, token)
        self.assertRc(1, result)
        self.assertOneError(result, "invitation")
        self.assertNothingThere(late)

    def test_of_two_that_join_at_once_one_is_let_in(self):
        address, token = self.invite()
        machines = [self.machine() for _ in range(3)]
        joining = [self.c.spawn(machine, "join", address, token) for machine in machines]
        results = [process.wait() for process in joining]
        self.assertEqual([0, 1, 1], sorted(result.rc for result in results), "\n".join(map(str, results)))
        for machine, result in zip(machines, results):
            if result.rc:
                self.assertNothingThere(machine)

    def test_a_token_is_worthless_after_an_hour(self):
        address, token = self.printed()
        self.c.advance(3601)
        late = self.machine()
        self.assertRc(1, self.join(late, address, token))
        self.assertNothingThere(late)
        address, token = self.invite()
        self.c.advance(3500)
        self.assertRc(0, self.join(late, address, token))

    def test_a_new_invitation_ends_the_one_before(self):
        address, old = self.printed()
        _, token = self.printed()
        self.assertNotEqual(old, token)
        new = self.machine()
        self.assertRc(1, self.join(new, address, old))
        self.assertRc(0, self.join(new, address, token))

    def test_five_wrong_tries_close_the_door_until_the_next_invitation(self):
        address, token = self.invite()
        new = self.machine()
        for number in range(4):
            self.assertIn(b"error", self.say({"op": "join", "secret": "%020x" % number}))
        self.assertRc(0, self.join(new, address, token))                # four do not
        address, token = self.invite()
        new = self.machine()
        for number in range(4):
            self.assertIn(b"error", self.say({"op": "join", "secret": "%020x" % number}))
        result = self.join(new, address, token[:-1] + ("0" if token[-1] != "0" else "1"))
        self.assertRc(1, result)
        self.assertOneError(result, "wrong")
        result = self.join(new, address, token)
        self.assertRc(1, result)
        self.assertOneError(result, "no invitation is open")
        self.assertNothingThere(new)
        self.assertRc(0, self.join(new, *self.invite()))

    def test_another_server_than_the_tokens_is_refused_before_anything_is_sent(self):
        pem = os.path.join(self.directory(), "other.pem")
        write_file(pem, new_cluster_pem())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        heard = []

        def impostor(listener):
            plain, _ = listener.accept()
            with plain, context.wrap_socket(plain, server_side=True) as stream:
                data = b""
                with contextlib.suppress(OSError):          # the client may be gone already
                    stream.settimeout(10)
                    stream.sendall(b'{"cbackup": 1, "join": true}\n')
                    data = stream.recv(1000)
                heard.append(data)

        _, token = self.invite()
        new = self.machine()
        with listening() as (port, listener):
            thread = threading.Thread(target=impostor, args=(listener,), daemon=True)
            thread.start()
            result = self.join(new, "127.0.0.1:%d" % port, token)
            thread.join(20)
        self.assertRc(1, result)
        self.assertOneError(result, "not a server of the cluster")
        self.assertEqual([b""], heard)
        self.assertNothingThere(new)

    def test_what_is_there_is_never_overwritten_and_the_token_is_not_spent(self):
        address, token = self.invite()
        for name in ("cluster.pem", "cbackup.conf", "host"):
            new = self.machine()
            os.mkdir(self.c.home(new))
            write_file(os.path.join(self.c.home(new), name), "precious\n")
            before = inodes(self.c.home(new))
            result = self.join(new, address, token)
            self.assertRc(2, result)
            self.assertOneError(result, name)
            self.assertEqual(before, inodes(self.c.home(new)))
        new = self.machine()
        for options, where in ((("--host", "no good"), address), ((), "127.0.0.1:many")):
            self.assertRc(2, self.join(new, where, token, *(options or ("-q",))))
            self.assertNothingThere(new)
        for wrong in ("x", token[:-1], token + "0"):
            self.assertRc(2, self.join(new, address, wrong))
        self.assertRc(0, self.join(new, address, token))

    def test_a_machine_that_lost_its_key_or_all_but_its_state_joins_again_and_nothing_is_copied_again(self):
        new = self.machine()
        self.assertRc(0, self.join(new, *self.invite()))
        home = self.c.home(new)
        self.assertRc(1, self.c.run(new, "status", "--check"))        # it has a state now
        write_file(os.path.join(home, "state", "books.db"), read_file(os.path.join(self.c.home("s"), "state", "books.db")))
        text = read_file(os.path.join(home, "cbackup.conf"))
        state = read_file(os.path.join(home, "state", "config.json"))
        for lost in (["cluster.pem"], ["cluster.pem", "cbackup.conf"], ["cluster.pem", "cbackup.conf", "host"]):
            for name in lost:
                os.unlink(os.path.join(home, name))
            if len(lost) == 1:
                self.assertOneError(self.c.run(new, "client"), "cluster.pem", "invite")
            result = self.join(new, *self.invite())
            self.assertRc(0, result)
            self.assertIn("has joined again", result.stdout)
            self.assertEqual((text, state), (read_file(os.path.join(home, "cbackup.conf")),
                                             read_file(os.path.join(home, "state", "config.json"))))
            self.assertEqual(read_file(os.path.join(self.c.home("s"), "cluster.pem")),
                             read_file(os.path.join(home, "cluster.pem")))

    def test_a_configuration_of_another_cluster_is_not_joined_with(self):
        new = self.machine()
        os.mkdir(self.c.home(new))
        write_file(os.path.join(self.c.home(new), "cluster.pem"), new_cluster_pem())
        os.chmod(os.path.join(self.c.home(new), "cluster.pem"), 0o600)
        write_file(os.path.join(self.c.home(new), "cbackup.conf"), "[cluster]\nname = other\n")
        self.c.run(new, "status")
        os.unlink(os.path.join(self.c.home(new), "cluster.pem"))
        before = inodes(self.c.home(new))
        result = self.join(new, *self.invite())
        self.assertRc(2, result)
        self.assertOneError(result, "cbackup.conf", "not of this cluster")
        self.assertEqual(before, inodes(self.c.home(new)))

    def test_without_the_key_nothing_but_join_is_answered_and_it_costs_a_try(self):
        address, token = self.invite()
        with open(os.path.join(self.c.home("s"), "state", "invitation.json")) as file:
            self.assertNotIn(token[32:], file.read(), "the secret is stored as it is")
        for request in ({"op": "status"}, {"op": "join"}, {"op": "join", "secret": None},
                        {"op": "join", "secret": [token]},
                        {"op": "rsync", "of": "source", "name": "docs", "source": "docs"}):
            answer = self.say(request)
            self.assertNotIn(b"PRIVATE", answer)
            self.assertNotIn(b"docs", answer)
            self.assertIn(b"error", answer.splitlines()[-1])

    def test_it_names_itself_by_the_short_host_name_or_as_told(self):
        new = self.machine()
        result = self.join(new, *self.invite(), "-q")
        self.assertRc(0, result)
        self.assertIn(socket.gethostname().split(".")[0] + " has joined", result.stdout)
        self.assertFalse(os.path.exists(os.path.join(self.c.home(new), "host")))
        new = self.machine()
        result = self.join(new, *self.invite(), "--host", "kitchen")
        self.assertIn("kitchen has joined", result.stdout)
        self.assertEqual(b"kitchen\n", read_file(os.path.join(self.c.home(new), "host")))


class AllKeysLostTest(Case):
    """No machine has the key any more: `init`, `join`, and the disks are taken over after a question; nothing is copied."""

    def test_disks_of_a_cluster_whose_key_is_lost_are_adopted(self):
        c = self.cluster("s", "a", replicas=1)
        c.source("docs", "s", {"f%d" % number: 100 for number in range(30)})
        kept = c.backup("ba", "a", "9M")
        c.start()
        self.assertRc(0, c.client("a"))
        before = c.kept_inodes("ba")
        c.stop()
        for host in "sa":
            os.unlink(os.path.join(c.home(host), "cluster.pem"))
            self.assertOneError(c.run(host, "client"), "init", "invite", "--adopt")
        self.assertRc(0, c.run("s", "init"))
        c.start("s")
        words = shlex.split(c.run("s", "invite").stdout)
        self.assertRc(0, c.run("a", *words[2:]))
        c.start("a")
        self.assertOneError(c.client("a"), "another cluster", "--adopt ba")
        self.assertOneError(c.client("a", "--adopt", "ba"), "another cluster", "--adopt ba --yes")
        self.assertEqual(before, c.kept_inodes("ba"))
        for answer, rc in (("no", 1), ("yes", 0)):
            self.assertEqual(rc, self.on_a_terminal(c, answer, "client", "--adopt", "ba"))
        c.settle()
        self.assertEqual(before, c.kept_inodes("ba"))
        self.assertRc(0, c.run("a", "verify"))
        self.assertTrue(os.path.exists(kept))

    @staticmethod
    def on_a_terminal(c, answer, *words):
        """Runs a command that asks one question on a terminal; returns its exit code."""
        control, terminal = pty.openpty()
        with open(terminal, "rb", 0) as file:
            process = Process(quick_program("--home", c.home("a"), *words), c.environment("a"), c.path("a"), terminal=file)
        seen = b""
        with contextlib.suppress(OSError):
            while True:
                seen += os.read(control, 4096)
                if answer and b"Type yes:" in seen:
                    os.write(control, answer.encode() + b"\n")
                    answer = ""
        os.close(control)
        return process.wait().rc


class ServiceTest(Case):
    """`service` prints what starts the server at boot on each of five systems; it is read here as those systems do."""

    @classmethod
    def setUpClass(cls):
        cls.cluster_ = c = cls.share_cluster("s")
        cls.home = os.path.join(c.base, "it's 100% \"my\" $HOME")
        os.rename(c.home("s"), cls.home)
        write_file(os.path.join(cls.home, "cbackup.conf"), c.config())
        cls.words = [sys.executable, PROGRAM, "--home", cls.home, "server"]

    def unit(self, *kind):
        result = Process(quick_program("--home", self.home, "service", *kind), self.cluster_.environment("s"),
                         self.cluster_.base).wait(30)
        self.assertRc(0, result)
        self.assertEqual("", result.stderr)
        return result.stdout

    def shell(self, script):
        """The lines that a shell script prints."""
        done = subprocess.run(["sh", "-eu"], input=script.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env={"PATH": os.defpath, "HOME": "/wrong"}, timeout=20)
        self.assertEqual((0, b""), (done.returncode, done.stderr), script)
        return done.stdout.decode().splitlines()

    def assertRight(self, words, path):
        self.assertEqual(self.words, words)
        self.assertTrue(shutil.which("rsync", path=path), "no rsync in PATH=%s" % path)

    def assertIsShell(self, text):
        self.assertEqual(0, subprocess.run(["sh", "-n"], input=text.encode(), timeout=20).returncode)

    def test_systemd(self):
        parser = configparser.ConfigParser(interpolation=None, strict=True)
        parser.optionxform = str
        parser.read_string(self.unit("systemd"))
        service = parser["Service"]
        path = re.match(r'"?PATH=([^"]*)"?\Z', service["Environment"]).group(1)
        words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(service["ExecStart"])]
        self.assertRight(words, path)
        self.assertEqual(("always", "multi-user.target"), (service["Restart"], parser["Install"]["WantedBy"]))
        self.assertTrue(service["User"])
        server = Process(words, dict(plain_environment("/"), PATH=path), "/")       # and that is a server
        self.cluster_.servers["s"] = server
        self.cluster_._wait_ready("s")
        self.cluster_.stop("s")

    def test_launchd(self):
        unit = plistlib.loads(self.unit("launchd").encode())
        self.assertRight(unit["ProgramArguments"], unit["EnvironmentVariables"]["PATH"])
        self.assertTrue(unit["RunAtLoad"] and unit["KeepAlive"] and unit["Label"] and unit["UserName"])

    def test_freebsd_rc(self):
        unit = self.unit("rc.d")
        self.assertIsShell(unit)
        self.assertTrue(unit.startswith("#!/bin/sh\n"))
        for word in ("# PROVIDE: cbackup\n", "# REQUIRE: ", "rcvar=cbackup_enable\n"):
            self.assertIn(word, unit)
        # rc.subr evaluates "$command $command_args".
        found = self.shell(unit.replace(". /etc/rc.subr", "load_rc_config() { :; }\nrun_rc_command() {\n"
                           'eval "set -- $command $command_args"\n'
                           'printf "%s\\n" "$@" "$PATH" "$cbackup_enable"; }').replace('"$1"', "start"))
        end = found.index(sys.executable)
        self.assertEqual(["/usr/sbin/daemon", "-r", "-P", "/var/run/cbackup.pid", "-u"], found[:5])
        self.assertRight(found[end:-2], found[-2])
        self.assertEqual("NO", found[-1])

    def test_openrc(self):
        unit = self.unit("openrc")
        self.assertIsShell(unit)
        self.assertTrue(unit.startswith("#!/sbin/openrc-run\n"))
        # start-stop-daemon.sh evaluates "--exec $command ... -- $command_args".
        found = self.shell(unit + "eval \"set -- $command $command_args\"; printf '%s\\n' \"$@\" \"$PATH\"\n")
        self.assertRight(found[:-1], found[-1])

    def test_smf(self):
        unit = xml.etree.ElementTree.fromstring(self.unit("smf"))
        start, stop = unit.findall("service/exec_method")
        self.assertEqual(("start", "stop", ":kill"), (start.get("name"), stop.get("name"), stop.get("exec")))
        words = shlex.split(start.get("exec").replace("%%", "%"))
        self.assertEqual("&", words.pop())
        self.assertRight(words, start.find("method_context/method_environment/envvar").get("value"))
        self.assertTrue(start.find("method_context/method_credential").get("user"))

    def test_without_a_word_it_is_that_of_this_system(self):
        unit = self.unit()
        kind = next(kind for kind, found in (
            ("launchd", sys.platform == "darwin"), ("rc.d", "bsd" in sys.platform), ("smf", "sunos" in sys.platform),
            ("openrc", os.path.exists("/sbin/openrc-run")), ("systemd", True)) if found)
        self.assertEqual(self.unit(kind), unit)

    def test_another_system_is_refused_by_name(self):
        result = Process(quick_program("--home", self.home, "service", "upstart"), self.cluster_.environment("s"),
                         self.cluster_.base).wait(30)
        self.assertRc(2, result)
        self.assertOneError(result, "upstart", "systemd")


if __name__ == "__main__":
    unittest.main()
