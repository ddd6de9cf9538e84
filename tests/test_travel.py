"""The configuration travels: one edit on any machine is in force on all, and nothing but an edit ever changes it."""

import os
import random
import re
import sys
import threading
import unittest

from tests.harness import TOP, Case, free_port, make_tree, one_in, read_file, tree, wait_for, write_file

sys.path.insert(0, TOP)
import cbackup  # noqa: E402

TAKEN_OVER = 20      # seconds within which a running server has to notice a changed file
STRANGE_LAYOUT = """\
# Every   byte of this\tmust arrive, also the blank at the end \r
\t[cluster]      # why not
name=test
replicas   =    1
scan = 1h
scan_min = 0s
# \u00fcml\u00e4uts, \u4e2d\u6587, and no newline at the end"""


def conf(cluster, host):
    return os.path.join(cluster.home(host), "cbackup.conf")


def texts(cluster, hosts=None):
    """{host: the bytes of its configuration}"""
    return {host: read_file(conf(cluster, host)) for host in hosts or cluster.hosts}


def conflicts(cluster, host):
    """The bytes of the edits that lost on a machine."""
    home = cluster.home(host)
    return [read_file(os.path.join(home, name)) for name in sorted(os.listdir(home)) if ".conflict-" in name]


def history(cluster, host):
    """[the bytes of every version that a machine keeps], the newest last; what a server is just writing is none yet."""
    kept = os.path.join(cluster.home(host), "state", "config-history")
    names = os.listdir(kept) if os.path.isdir(kept) else []
    return [read_file(os.path.join(kept, name)) for name in sorted(names) if name.endswith(".conf")]


def wait_for_message(cluster, host, words):
    server = cluster.servers[host]
    wait_for(lambda: words in server.stderr, TAKEN_OVER,
             lambda: "the server of %s did not say %r but %r" % (host, words, server.stderr))


def exchange(cluster, host):
    """The first thing that a client's pass does, in this process: it carries the configuration."""
    home = cbackup.Home(cluster.home(host), host)
    cbackup.Client(home, home.config(), host, cbackup.Progress(True)).exchange_config()


def is_everywhere(cluster, text):
    """Whether every machine has this text, in the same version."""
    states = [cbackup.Home(cluster.home(host)).config_state() for host in cluster.hosts]
    return len(set(map(cbackup.config_order, states))) == 1 and states[0]["sha256"] == cbackup.sha256_of(text) \
        and set(texts(cluster).values()) == {text}


class TravelCase(Case):
    """Hosts s and t have sources, a and b have backups; s and t never talk to each other, nor do a and b. c is new.

    One cluster for all tests; every test begins with the same right text on all machines and no conflicts.
    """

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "t", "a", "b", "c", replicas=1)
        c.source("docs", "s", {"f1": b"1"})
        c.source("pics", "t", {"p1": b"2"})
        c.backup("ba", "a", "1M")
        c.backup("bb", "b", "1M")
        c.start("s", "t", "a", "b")
        c.settle()

    def setUp(self):
        c = self.c
        for host in set("stab") - set(c.servers):
            c.start(host)
        c._written = c.config()
        for host in c.hosts:
            write_file(conf(c, host), "# %s\n%s" % (self.id(), c.config()))
            for name in os.listdir(c.home(host)):
                if ".conflict-" in name:
                    os.unlink(os.path.join(c.home(host), name))
        wait_for(lambda: exchange(c, "a") or exchange(c, "c") or is_everywhere(c, read_file(conf(c, "a"))), TAKEN_OVER,
                 "not in force everywhere")

    def edit(self, c, host, old, new):
        """One edit by hand on one machine, of that machine's own text; returns the new text."""
        text = read_file(conf(c, host)).decode()
        self.assertEqual(1, text.count(old), text)
        c._written = c.config()                   # the harness is not to write what travels
        write_file(conf(c, host), text.replace(old, new))
        return text.replace(old, new).encode()

    def assertBackedUp(self, source):
        """Every file is in a backup on another host; in one more where that was thought lost in the meantime."""
        self.assertEqual([], [name for name, backups in self.c.copies_on_disk(source).items() if not backups])

    def assertOneText(self, c, text, hosts="stab"):
        self.assertEqual({host: text for host in hosts}, texts(c, hosts))

    @staticmethod
    def in_force(c, host):
        return cbackup.Home(c.home(host)).config_state().get("sha256") == cbackup.sha256_of(texts(c)[host])

    @staticmethod
    def version(c, host):
        return cbackup.Home(c.home(host)).config_state()["version"]

    def sources(self, host, config):
        """What a host's server says of its sources."""
        return self.peer(host, config).call("status")["sources"]

    def peer(self, host, config):
        """A member that talks to a host's server, and whose configuration may be an older one."""
        link = cbackup.Link(host, cbackup.parse_config(config),
                            cbackup.Dialer(cbackup.Home(self.c.home("a"))))
        self.addCleanup(link.close)
        return link


@one_in(3, "test_an_edit_on_a_machine_with_a_backup_reaches_the_others_in_one_round_of_passes",
        "test_a_wrong_file_is_refused_by_all_with_every_line_and_a_right_one_is_taken_after_it",
        "test_of_two_edits_one_wins_everywhere_and_the_other_is_kept_and_named",
        "test_a_machine_that_was_off_for_a_month_and_has_an_old_file_does_not_win")
class OneTextTest(TravelCase):
    """One edit, on any machine, is carried everywhere by the passes, byte for byte; running servers take it over.

    A wrong file changes nothing anywhere: whoever reads it says what is wrong, and the server goes on.
    Of edits at the same time one is in force everywhere, the other is kept on its machine; what is old never wins.
    """

    def carried(self, order):
        for result in self.c.passes(order):
            self.assertRc(0, result)
            self.assertEqual("", result.stderr, str(result))

    def test_an_edit_on_a_machine_with_a_backup_reaches_the_others_in_one_round_of_passes(self):
        text = self.edit(self.c, "a", "[hosts]", "# edited on a\n[hosts]")
        self.carried("ab")
        self.assertOneText(self.c, text)
        self.assertEqual({self.c.status()["config_version"]}, {self.version(self.c, host) for host in "stab"})

    def test_an_edit_on_a_machine_with_a_source_is_noticed_by_its_server_and_then_carried(self):
        text = self.edit(self.c, "t", "[hosts]", "# edited on t\n[hosts]")
        before = self.version(self.c, "a")
        # Nobody runs a client on t.
        wait_for(lambda: text in history(self.c, "t"), TAKEN_OVER, "the server of t did not notice")
        exchange(self.c, "b")
        self.assertOneText(self.c, text, "stb")     # from t to s, which never talk to each other, in one pass of b
        exchange(self.c, "a")
        self.assertOneText(self.c, text)
        self.assertEqual(before + 1, self.version(self.c, "a"))

    def test_comments_and_layout_survive_byte_for_byte(self):
        rest = read_file(conf(self.c, "a")).decode()
        rest = rest[rest.index("[hosts]"):]
        text = (rest + STRANGE_LAYOUT).encode()
        write_file(conf(self.c, "b"), text)
        exchange(self.c, "b")
        self.assertOneText(self.c, text)

    def test_old_versions_are_kept_in_state_on_every_machine(self):
        old = read_file(conf(self.c, "a"))
        self.edit(self.c, "a", "[hosts]", "# another\n[hosts]")
        exchange(self.c, "a")
        for host in "stab":
            self.assertIn(old, history(self.c, host))

    def test_it_is_in_every_backup_and_a_disk_alone_is_enough_to_restore(self):
        text = self.edit(self.c, "a", "[hosts]", "# for the disk\n[hosts]")
        self.carried("ab")
        for backup in ("ba", "bb"):
            self.assertEqual(text, read_file(os.path.join(self.c.backups[backup].path, ".cbackup", "cbackup.conf")))
        # Neither key nor configuration, not even a home.
        base = self.directory()
        disks = [word for backup in ("ba", "bb") for word in ("--from", self.c.backups[backup].path)]
        for source in ("docs", "pics"):
            result = self.c.run("a", "--home", base + "/none", "restore", source, "--to", base + "/" + source, *disks)
            self.assertRc(0, result)
            self.assertSameTree(self.c.sources[source].path, base + "/" + source)
        self.assertFalse(os.path.exists(base + "/none"))
        # With the configuration from the disk, and no key: the source's own path is known again.
        home = os.path.join(base, "fresh")
        os.mkdir(home)
        write_file(home + "/cbackup.conf", read_file(self.c.backups["ba"].path + "/.cbackup/cbackup.conf"))
        before = tree(self.c.sources["docs"].path)
        os.unlink(os.path.join(self.c.sources["docs"].path, "f1"))
        self.assertRc(0, self.c.run("a", "--home", home, "restore", "docs", *disks))
        self.assertSameTree(before, tree(self.c.sources["docs"].path), ignore=["dir.mtime_ns"])

    # -- running servers take it over without a restart --

    def test_a_new_source_is_looked_at_and_served_and_a_removed_one_is_not(self):
        c, old = self.c, self.c.config()
        c.round()
        self.peer("s", old).stream(of="source", name="docs", source="docs").close()
        kept = c.kept("ba")
        new = c.source("new", "s", {"n%d" % number: b"3" for number in range(5)})
        removed = c.sources.pop("docs")
        c.write_config("a")                                   # one edit, on a machine of which neither is
        self.assertEqual(5, c.client("a").json["copied_files"] + c.client("b").json["copied_files"])
        self.assertBackedUp("new")
        self.assertIn("new", c.status()["sources"])
        for ask in (lambda link: link.stream(of="source", name="docs", source="docs"),
                    lambda link: link.call("claim", backup="ba", source="docs", free=1, most_files=1, most_bytes=1)):
            with self.assertRaises(cbackup.Refused):
                ask(self.peer("s", old))
        self.assertEqual(set(kept), set(kept) & set(c.kept("ba")), "the copies of a removed source are gone")
        make_tree(new, {"later": b"4"})
        c.sources["docs"] = removed
        c.write_config("s")
        wait_for(lambda: "docs" in self.sources("s", old), TAKEN_OVER, "the server did not notice the edit")
        c.settle()
        self.assertBackedUp("docs")

    def test_an_edit_that_a_client_has_entered_is_in_force_in_its_hosts_server_at_once(self):
        """Or a pass elsewhere says that it is settled, and does not know the source yet."""
        c = self.c
        c.source("entered", "s", {"n": b"5"})
        self.addCleanup(c.sources.pop, "entered")
        c.write_config("s")
        exchange(c, "s")
        self.assertIn("entered", self.sources("s", c.config()))

    def test_another_port_is_said_to_need_a_restart_and_is_one_line_for_all(self):
        c = self.c
        port, holder = free_port()
        c._holders.append(holder)
        c.ports["t"] = port
        c.write_config("t")
        wait_for_message(c, "t", "restart")
        self.assertIn(str(port), c.servers["t"].stderr)
        c.stop("t")
        c.start("t")
        self.assertIn("t", c.client("a").json["unreachable"])           # nobody can ask t at its new address
        self.assertRc(0, c.client("t"))                                 # but t can tell them
        make_tree(c.sources["pics"].path, {"p2": b"22"})
        c.round()
        self.assertBackedUp("pics")
        self.assertOneText(c, c.config().encode())

    def test_a_change_that_was_made_while_the_server_started_is_not_missed(self):
        c = self.c
        c.stop("s")
        c.servers["s"] = c.spawn("s", "server")
        home = cbackup.Home(c.home("s"))
        wait_for(lambda: os.path.exists(home.state("server.lock")), 20, "no server")
        text = read_file(conf(c, "s")) + b"# while it started\n"
        write_file(conf(c, "s") + ".new", text)     # as an editor does: the server must not meet half a file
        os.rename(conf(c, "s") + ".new", conf(c, "s"))
        c._wait_ready("s")
        wait_for(lambda: home.config_state()["sha256"] == cbackup.sha256_of(text.decode()), TAKEN_OVER,
                 "the server never noticed")
        exchange(c, "a")
        self.assertOneText(c, text)

    # -- a wrong file changes nothing anywhere --

    def test_a_wrong_file_is_refused_by_all_with_every_line_and_a_right_one_is_taken_after_it(self):
        c = self.c
        right = texts(c)
        wrong = right["s"].decode().replace("replicas = 1", "replicas = many").replace("[sources]", "[sauces]") + "x\n"
        numbers = [number for number, line in enumerate(wrong.split("\n"), 1)
                   if line in ("replicas = many", "[sauces]", "x")]
        self.assertEqual(3, len(numbers))
        write_file(conf(c, "s"), wrong)
        wait_for_message(c, "s", "last right one")
        for number in numbers:
            wait_for_message(c, "s", "line %d:" % number)
        for command in (["status"], ["client"], ["server"], ["invite"], ["restore", "docs"]):
            with self.subTest(command):
                result = c.run("s", *command)
                self.assertRc(2, result)
                self.assertEqual("", result.stdout)
                self.assertEqual(numbers, [int(n) for n in re.findall(r"cbackup.conf line (\d+): ", result.stderr)])
        make_tree(c.sources["docs"].path, {"f2": b"22"})         # the server goes on
        c.round()
        self.assertBackedUp("docs")
        self.assertEqual(dict(right, s=wrong.encode()), texts(c))
        self.assertEqual([], conflicts(c, "s"))
        text = self.edit(c, "a", "[hosts]", "# a right edit elsewhere\n[hosts]")
        exchange(c, "a")
        self.assertOneText(c, text)
        self.assertEqual([wrong.encode()], conflicts(c, "s"))
        self.assertIn("cbackup.conf.conflict-", c.run("s", "status").stdout)

    def test_what_a_full_disk_leaves_of_an_edit_is_refused(self):
        c = self.c
        right = texts(c)
        for rest in (b"", b"\n \n"):
            write_file(conf(c, "a"), rest)
            result = c.run("a", "client")
            self.assertRc(2, result)
            self.assertOneError(result, conf(c, "a"), "empty", "config-history")
            exchange(c, "b")
            self.assertEqual(dict(right, a=rest), texts(c))
        # The way out that it names.
        write_file(conf(c, "a"), history(c, "a")[-1])
        self.assertRc(0, c.run("a", "client"))
        self.assertEqual(right, texts(c))

    # -- simultaneous edits, and old ones --

    def both_edited(self, c):
        """Edits on s and b, which know nothing of each other; returns both texts."""
        return [self.edit(c, host, "[hosts]", "# edited on %s\n[hosts]" % host) for host in "sb"]

    def test_of_two_edits_one_wins_everywhere_and_the_other_is_kept_and_named(self):
        c = self.c
        both = self.both_edited(c)
        os.utime(conf(c, "s"), (2e9, 2e9))                      # the later one
        exchange(c, "b")
        exchange(c, "a")
        self.assertOneText(c, both[0])
        self.assertEqual([[], [], [], [both[1]]], [conflicts(c, host) for host in "stab"])
        said = c.run("b", "status").stdout
        self.assertRegex(said, r"(?m)^cbackup\.conf\.conflict-\d{8}-\d{6}: .*lost")
        self.assertNotIn("conflict", c.run("a", "status").stdout)
        name = re.search(r"cbackup\.conf\.conflict-\S+(?=:)", said).group(0)
        os.unlink(os.path.join(c.home("b"), name))
        self.assertNotIn("conflict", c.run("b", "status").stdout)

    def test_several_edits_that_lose_within_a_second_are_all_kept(self):
        c = self.c
        lost = []
        for number in range(3):
            both = self.both_edited(c)
            os.utime(conf(c, "s"), (2e9 + number, 2e9 + number))
            exchange(c, "b")
            lost.append(both[1])
            self.assertOneText(c, both[0], "sb")
            write_file(conf(c, "b"), both[0].replace(b"# edited on s\n", b"# %d\n" % number))
            exchange(c, "b")
        self.assertEqual(sorted(lost), sorted(conflicts(c, "b")))

    def three_changes(self, c):
        """Three edits on a that reach every server, but not c, which is off; returns the last text."""
        for number in range(3):
            text = self.edit(c, "a", "[hosts]", "# change %d\n[hosts]" % number)
            exchange(c, "a")
        self.assertOneText(c, text)
        return text

    def test_a_machine_that_was_off_for_a_month_and_has_an_old_file_does_not_win(self):
        c, old = self.c, read_file(conf(self.c, "c"))
        text = self.three_changes(c)
        c.advance(31 * 86400)
        self.assertEqual(old, read_file(conf(c, "c")))
        os.utime(conf(c, "c"), (2e9, 2e9))                      # however new its date
        c.passes("c")
        exchange(c, "a")
        self.assertOneText(c, text, "stabc")
        self.assertEqual([], conflicts(c, "c"))                  # nobody edited anything there

    def test_nor_does_one_that_has_also_lost_its_state(self):
        c = self.c
        text = self.three_changes(c)
        os.rename(os.path.join(c.home("c"), "state"), c.path("c", "lost-state-1"))
        exchange(c, "c")
        exchange(c, "a")
        self.assertOneText(c, text, "stabc")

    def test_an_edit_on_a_machine_that_had_lost_its_state_wins_like_any_other(self):
        c = self.c
        self.three_changes(c)
        exchange(c, "c")
        os.rename(os.path.join(c.home("c"), "state"), c.path("c", "lost-state-2"))
        exchange(c, "c")
        text = self.edit(c, "c", "# change 2\n", "# after the loss\n")
        exchange(c, "c")
        exchange(c, "a")
        self.assertOneText(c, text, "stabc")
        self.assertEqual([], conflicts(c, "c"))

    def test_an_edit_that_takes_another_back_is_an_edit(self):
        c = self.c
        first = self.edit(c, "a", "[hosts]", "# there\n[hosts]")
        exchange(c, "a")
        exchange(c, "c")                                         # c goes to sleep with this text, ...
        second = self.edit(c, "a", "# there\n", "")
        exchange(c, "a")
        self.assertOneText(c, second)
        write_file(conf(c, "a"), first)                          # ... which comes back meanwhile
        exchange(c, "a")
        exchange(c, "c")
        self.assertOneText(c, first, "stabc")
        text = self.edit(c, "c", "# there\n", "# and on\n")      # an edit on c counts from there
        exchange(c, "c")
        self.assertOneText(c, text, "stabc")
        self.assertEqual([], conflicts(c, "c") + conflicts(c, "a"))

    def test_when_the_only_host_with_a_source_has_died_its_source_can_be_given_to_another(self):
        c = self.c
        self.addCleanup(c.sources.update, c.sources.copy())
        for name in set(c.sources) - {"docs"}:
            del c.sources[name]
        self.assertRc(0, c.client("a"))
        c.kill("s")
        place = c.path("a", "restored")
        self.assertRc(0, c.restore("a", "docs", to=place))
        c.sources["docs"] = c.sources["docs"]._replace(host="a", path=place)
        c.write_config("a")
        wait_for(lambda: self.sources("a", c.config()).get("docs", {}).get("state") == "ok", TAKEN_OVER, "not taken over by a")
        self.assertRc(0, c.client("a"))
        self.assertEqual(texts(c, "a")["a"], texts(c, "b")["b"])
        c.settle("b")
        self.assertEqual([], [name for name, backups in c.copies_on_disk("docs").items() if "bb" not in backups])

    def test_a_host_whose_only_source_is_removed_elsewhere_hears_of_it(self):
        c = self.c
        self.addCleanup(c.sources.update, pics=c.sources.pop("pics"))
        c.write_config("a")
        exchange(c, "a")
        self.assertOneText(c, c.config().encode())
        self.assertNotIn("pics", c.status("t")["sources"])
        self.assertNotIn("pics", self.sources("t", c.config()))

    # -- whatever is edited where, in whatever order passes run: no edit vanishes --

    EDITS = 40

    def test_random_edits_on_random_machines_end_with_one_text_everywhere(self):
        seed = int(os.environ.get("CBACKUP_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
        print("\nrandom history of edits: CBACKUP_TEST_SEED=%d" % seed, file=sys.stderr)
        chance = random.Random(seed)
        c = self.c
        homes = {host: cbackup.Home(c.home(host), host) for host in c.hosts}
        edits, bases = [], set()                 # (machine, text), texts that a later edit began with
        for number in range(self.EDITS):
            host = chance.choice(c.hosts)
            what = chance.random()
            if what < 0.4:
                self.one_edit(c, chance, host, number, edits, bases)
            elif what < 0.45:
                for name in ("config.json", "config-history"):
                    if os.path.exists(homes[host].state(name)):
                        os.rename(homes[host].state(name), c.path(host, "lost-%s-%d" % (name, number)))
            elif what < 0.5 and host in c.servers:
                c.kill(host)
            elif what < 0.6 and host not in c.servers:
                c.start(host)
            else:
                exchange(c, host)
        c.start()
        self.addCleanup(c.stop, "c")
        for _ in range(2):
            for host in chance.sample(c.hosts, len(c.hosts)):
                exchange(c, host)
        final = texts(c)
        self.assertEqual(1, len(set(final.values())), "CBACKUP_TEST_SEED=%d" % seed)
        lineage = set(homes["s"].config_state()["history"]) | {homes["s"].config_state()["sha256"]}
        for host, text in edits:
            if text not in bases and cbackup.sha256_of(text) not in lineage:
                self.assertIn(text.encode(), conflicts(c, host), "an edit vanished; CBACKUP_TEST_SEED=%d" % seed)

    @staticmethod
    def one_edit(c, chance, host, number, edits, bases):
        base = read_file(conf(c, host)).decode()
        lines = base.split("\n")
        if chance.random() < 0.3:
            lines = [line for line in lines if not line.startswith("# edit") or chance.random() < 0.5]
        lines.insert(chance.randrange(len(lines)), "# edit %d on %s" % (number, host))      # no text comes twice
        text = "\n".join(lines)
        bases.add(base)
        edits.append((host, text))
        write_file(conf(c, host), text)

    def test_passes_of_real_clients_in_random_orders_carry_every_edit(self):
        seed = int(os.environ.get("CBACKUP_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
        print("\nrandom order of passes: CBACKUP_TEST_SEED=%d" % seed, file=sys.stderr)
        chance = random.Random(seed)
        c = self.c
        for number in range(4):
            if chance.random() < 0.5:
                self.one_edit(c, chance, chance.choice(c.hosts), number, [], set())
            self.assertRc(0, c.client(chance.choice("ab")))
        for host in c.servers:
            wait_for(lambda: self.in_force(c, host), TAKEN_OVER, "%s has not taken over what was edited there" % host)
        for host in chance.sample("abc", 3):
            self.assertRc(0, c.client(host))
        self.assertEqual(1, len(set(texts(c).values())), "CBACKUP_TEST_SEED=%d" % seed)


class ReadingWhileWritingTest(Case):
    """One home, several processes: no version is lost, and an old one does not come back."""

    def home(self, text):
        base = self.directory()
        write_file(os.path.join(base, "cbackup.conf"), text)
        return cbackup.Home(base)

    def test_what_was_read_just_before_another_version_came_is_not_taken_for_an_edit(self):
        home = self.home("[cluster]\nname = one\n")
        home.config()
        write_file(home.config_path, "[cluster]\nname = two\n")
        theirs = "[cluster]\nname = three\n"
        with home.lock("config.lock"):          # somebody is putting another version in force
            reader = threading.Thread(target=home.config)
            reader.start()
            waiting = "/proc/%d/fd" % os.getpid()
            wait_for(lambda: not os.path.isdir(waiting) or sum(
                os.path.realpath(os.path.join(waiting, fd)) == os.path.realpath(home.state("config.lock"))
                for fd in os.listdir(waiting)) > 1, 10, "nobody waits for the lock")
            cbackup.atomic_write(home.config_path, theirs.encode())
            home._record({"version": 9, "stamp": 1, "sha256": cbackup.sha256_of(theirs), "mine": False, "history": []},
                         theirs)
        reader.join(10)
        self.assertFalse(reader.is_alive())
        self.assertEqual((9, theirs), (home.config_state()["version"], home.config_offer()["text"]))

    def test_a_version_that_was_only_half_put_in_force_is_still_the_version_it_was(self):
        home, other = self.home("[cluster]\nname = one\n"), self.home("[cluster]\nname = one\n")
        home.config(), other.config()
        for number in range(5):
            write_file(other.config_path, "[cluster]\nname = two%d\n" % number)
            other.config()
        write_file(home.config_path, other.config_offer()["text"])      # killed before it was written down
        home.config()
        self.assertTrue(home.take_config(other.config_offer()))
        self.assertEqual(cbackup.config_order(other.config_state()), cbackup.config_order(home.config_state()))
        self.assertEqual([], home.conflicts())



if __name__ == "__main__":
    unittest.main()
