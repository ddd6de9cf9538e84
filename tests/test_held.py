"""Sources that are suddenly empty, gone, elsewhere or mostly different: nothing changes until somebody has looked."""

import os
import shutil
import unittest
from unittest import mock

import cbackup
from tests.faults import lose_state, mount_or_skip, regular_files, tmpfs_or_skip, unmount
from tests.harness import Case, digest_of, make_tree, write_file

COUNT = 20          # from so many files on, a change of most of them is a mass change


def snapshot(cluster, source):
    """Everything of a source in all backups, outside of .cbackup: {backup/path: (inode, mtime, digest)}."""
    found = {}
    for backup in cluster.backups.values():
        for name, info in regular_files(backup.path, source).items():
            found[backup.name + "/" + name] = (info.st_ino, info.st_mtime_ns,
                                               digest_of(os.path.join(backup.path, source, name)))
    return found


def spoil(path, names, kind):
    """Does to a source what holds it."""
    if kind == "gone":
        os.rename(path, path + ".away")
    elif kind == "emptied":
        os.rename(path, path + ".away")
        os.mkdir(path)
    elif kind == "lost":
        for name in names[:len(names) // 2 + 1]:
            os.unlink(os.path.join(path, name))
    elif kind == "changed":
        for name in names[:len(names) // 2 + 1]:
            write_file(os.path.join(path, name), "encrypted by somebody")


class SpoiledTest(Case):
    """One source for each way to be spoiled, on one host; passes, a restart, and the loss of the host's state/."""

    SPOILED = {"gone": "gone", "emptied": "emptied", "small": "emptied", "lost": "lost", "changed": "changed"}

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=2)
        cls.names = {name: ["f%02d" % number for number in range(3 if name == "small" else COUNT)]
                     for name in list(cls.SPOILED) + ["half", "well"]}
        for name, files in cls.names.items():
            c.source(name, "s", {file: name + "/" + file for file in files})
        c.backup("b1", "a", "9M")
        c.backup("b2", "b", "9M")
        c.start()
        c.round()
        cls.before = {name: snapshot(c, name) for name in cls.names}
        for name, kind in cls.SPOILED.items():
            spoil(c.sources[name].path, cls.names[name], kind)
        for file in cls.names["half"][:COUNT // 2]:
            os.unlink(os.path.join(c.sources["half"].path, file))
        cls.seen = {}
        cls.look("at once")
        c.kill("s")
        c.start("s")
        cls.look("after a restart of the server")
        lose_state(c, "s")
        cls.look("after the loss of the server's state")
        cls.accepted = [c.run("s", "accept", name) for name in ("lost", "emptied")]
        cls.after_accept = [c.client(host) for host in "ab"]
        cls.status = c.status()

    @classmethod
    def look(cls, when):
        results = [cls.c.client(host) for host in "ab"]
        check = cls.c.run("s", "status", "--check", "--json")
        cls.seen[when] = results, {name: snapshot(cls.c, name) for name in cls.names}, check.json, check

    def test_nothing_of_it_changes_in_any_backup(self):
        for when, (_, snapshots, _, _) in self.seen.items():
            for name in self.SPOILED:
                with self.subTest(when=when, source=name):
                    self.assertEqual(self.before[name], snapshots[name])

    def test_status_says_held(self):
        for when, (_, _, status, check) in self.seen.items():
            self.assertEqual(1, check.rc)
            for name in self.SPOILED:
                with self.subTest(when=when, source=name):
                    self.assertEqual("held", status["sources"][name]["state"])

    def test_the_client_says_so_and_how_to_accept_and_exits_1(self):
        for when, (results, _, _, _) in self.seen.items():
            for result, name in ((result, name) for result in results for name in self.SPOILED):
                with self.subTest(when=when, source=name, command=result.command[-3:]):
                    self.assertRc(1, result)
                    line = [line for line in result.error_lines if line.startswith("cbackup: %s is held: " % name)]
                    self.assertEqual(1, len(line), str(result))
                    if self.SPOILED[name] == "gone":    # nothing is there that could be accepted
                        self.assertNotIn("accept", line[0])
                        self.assertIn("cbackup.conf", line[0])
                    else:
                        self.assertIn("accept " + name, line[0])

    def test_other_sources_of_the_same_host_go_on(self):
        _, snapshots, status, _ = self.seen["at once"]
        for name, count in (("half", COUNT // 2), ("well", COUNT)):
            self.assertEqual(2 * count, len(snapshots[name]))
            self.assertEqual("ok", status["sources"][name]["state"])

    def test_one_accept_is_enough_for_all_backups_even_after_the_loss_of_state(self):
        for result in self.accepted:
            self.assertRc(0, result)
        self.assertEqual({}, snapshot(self.c, "emptied"))
        self.assertEqual("ok", self.status["sources"]["emptied"]["state"])
        kept = {name.split("/", 1)[1] for name in snapshot(self.c, "lost")}
        self.assertEqual(set(self.names["lost"][COUNT // 2 + 1:]), kept)
        self.assertEqual("ok", self.status["sources"]["lost"]["state"])


class ReleaseTest(Case):
    """It ends by itself when the source is whole again, or when somebody says so."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.names = ["f%02d" % number for number in range(COUNT)]
        for name in ("emptied", "changed", "lost", "gone", "twice"):
            c.source(name, "s", {file: name + "/" + file for file in cls.names})
        c.backup("b1", "a", "9M")
        c.start()
        c.round()
        cls.before = {name: snapshot(c, name) for name in c.sources}
        for name in c.sources:
            spoil(c.sources[name].path, cls.names, {"twice": "lost"}.get(name, name))
        cls.held = c.client("a")
        cls.accepts = {name: c.run("s", "accept", name) for name in ("changed", "lost", "gone")}
        for name in ("emptied", "gone"):
            if os.path.isdir(c.sources[name].path):
                os.rmdir(c.sources[name].path)
            os.rename(c.sources[name].path + ".away", c.sources[name].path)
        for file in cls.names[:COUNT // 2 + 1]:
            write_file(os.path.join(c.sources["twice"].path, file), "twice/" + file)
        cls.twice = c.client("a")
        cls.released = c.client("a")
        cls.states = {name: facts["state"] for name, facts in c.status()["sources"].items()}

    def test_all_were_held(self):
        self.assertRc(1, self.held)

    def test_a_source_that_is_whole_again_is_released_by_itself(self):
        for name in ("emptied", "gone"):
            self.assertEqual(self.before[name], snapshot(self.c, name))
            self.assertEqual("ok", self.states[name])

    def test_accept_lets_the_change_through(self):
        for name in ("changed", "lost"):
            self.assertRc(0, self.accepts[name])
            self.assertEqual("ok", self.states[name])
            self.assertCopies(self.c, name, 1)
        self.assertEqual(COUNT - COUNT // 2 - 1, len(snapshot(self.c, "lost")))

    def test_what_was_let_through_is_in_the_attic(self):
        kept = sorted(content for _, content in self.c.attic("b1", "lost"))
        self.assertEqual([b"lost/" + file.encode() for file in self.names[:COUNT // 2 + 1]], kept)

    def test_a_source_that_is_gone_cannot_be_accepted(self):
        self.assertRc(1, self.accepts["gone"])
        self.assertOneError(self.accepts["gone"], "cannot be accepted")

    def test_a_restored_source_with_other_times_is_held_or_backed_up_but_loses_nothing(self):
        self.assertEqual({key: value[2] for key, value in self.before["twice"].items()},
                         {key: value[2] for key, value in snapshot(self.c, "twice").items()})

    def test_afterwards_passes_are_settled_where_nothing_is_held(self):
        held = [name for name, state in self.states.items() if state == "held"]
        self.assertLessEqual(set(held), {"twice"})


class ServerTest(Case):
    """What a server does with a held source, without a network."""

    def setUp(self):
        c = self.cluster("s", "a", replicas=1)
        self.root = c.source("docs", "s", {"f%02d" % number: 10 for number in range(60)})
        c.backup("ba", "a", "10M")
        c.write_config()
        home = cbackup.Home(c.home("s"))
        self.service = cbackup.Service(home, home.config(), "s")
        self.addCleanup(self.service.books.close)
        self.service.scan("docs")

    def lose(self, first, last):
        for number in range(first, last):
            os.unlink("%s/f%02d" % (self.root, number))
        with mock.patch.object(cbackup.log, "warning"):
            self.service.scan("docs")
        return self.service.books.source_row("docs")["state"]

    def test_consent_is_for_one_scan(self):
        self.assertEqual("held", self.lose(0, 36))
        self.service.scan("docs", consent=True)
        self.assertEqual("ok", self.service.books.source_row("docs")["state"])
        self.assertEqual("held", self.lose(36, 56))

    def test_more_than_half_of_many_and_all_of_few_are_held(self):
        self.assertEqual("ok", self.lose(0, 24))
        self.assertEqual("held", self.lose(24, 50))
        self.service.scan("docs", consent=True)
        self.assertEqual("ok", self.lose(50, 57))
        self.assertEqual("held", self.lose(57, 60))

    def test_what_is_mounted_below_a_source_is_not_walked_into(self):
        make_tree(self.root, {"below/file": b"1"})
        look = cbackup.Scan._look_at_root

        def on_another_one(scan):
            look(scan)
            scan.device += 1        # so that all that is below the root is on another file system than it
        with mock.patch.object(cbackup.Scan, "_look_at_root", on_another_one):
            self.service.scan("docs")
        found = self.service.books.rows("SELECT path FROM entries WHERE path LIKE 'below%' OR path=?", b"below/file")
        self.assertNotIn((b"below/file",), found)
        self.service.scan("docs")
        self.assertTrue(self.service.books.rows("SELECT path FROM entries WHERE path=?", b"below/file"))

    def test_nothing_that_would_change_a_backup_is_answered(self):
        asked = {"todo": dict(kind=1, after=0), "claim": dict(free=1000, most_files=9, most_bytes=1000), "claims": {},
                 "claim_paths": dict(free=1000, paths=["f59"], relieved=None), "placed": dict(rows=[["f59", 1, 1]]),
                 "confirm": dict(rows=[["f59", 1, "00" * 32, [], ""]]), "drop": dict(paths=["f59"]),
                 "droppable": dict(need=1), "smallest": dict(above=0, most=1000),
                 "relief": dict(relieved="ba", gap=1, most=1)}
        for held in (False, True):
            for op, fields in asked.items():
                with self.subTest(op=op, held=held):
                    request = dict(fields, op=op, backup="ba", source="docs")
                    if not held:
                        self.assertTrue(self.service.handle(request)["ok"])
                        continue
                    with self.assertRaises(cbackup.Refused) as caught:
                        self.service.handle(request)
                    self.assertEqual("held", caught.exception.reason)
            self.assertEqual("held", self.lose(0, 36) if not held else "held")


class MountTest(Case):
    """A source whose file system comes and goes."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        files = {"f%02d" % number: b"bytes of %d" % number for number in range(COUNT)}
        for name in ("unmounted", "other", "bound"):
            c.source(name, "s", files if name != "unmounted" else ())
        cls.unmounted = c.sources["unmounted"].path
        tmpfs_or_skip(cls, cls.unmounted)
        make_tree(cls.unmounted, files)
        c.backup("b1", "a", "9M")
        c.start()
        c.round()
        cls.before = {name: snapshot(c, name) for name in c.sources}
        # Another disk where `other` was, with all but one of its files; an empty directory over `bound`.
        copy = c.path("copy")
        shutil.copytree(c.sources["other"].path, copy)
        os.unlink(os.path.join(copy, "f00"))
        tmpfs_or_skip(cls, c.sources["other"].path)
        copy_files(copy, c.sources["other"].path)
        os.mkdir(c.path("void"))
        mount_or_skip(cls, "--bind", c.path("void"), c.sources["bound"].path)
        mount_or_skip(cls, "--move", cls.unmounted, cls.aside(c))      # what is left is the empty mount point
        cls.result = c.client("a")
        cls.status = c.status()
        cls.during = {name: snapshot(c, name) for name in c.sources}
        mount_or_skip(cls, "--move", cls.aside(c), cls.unmounted)
        unmount(c.sources["other"].path)
        unmount(c.sources["bound"].path)
        cls.after = [c.client("a"), c.client("a")]

    @staticmethod
    def aside(cluster):
        os.makedirs(cluster.path("aside"), exist_ok=True)
        return cluster.path("aside")

    def test_each_is_held_and_nothing_of_it_changes(self):
        self.assertRc(1, self.result)
        for name in self.c.sources:
            with self.subTest(source=name):
                self.assertEqual("held", self.status["sources"][name]["state"])
                self.assertEqual(self.before[name], self.during[name])

    def test_it_is_released_when_its_file_system_is_back(self):
        self.assertRc(0, self.after[-1])
        self.assertTrue(self.after[-1].json["settled"])
        for name in self.c.sources:
            self.assertEqual(self.before[name], snapshot(self.c, name))


def copy_files(source, target):
    """The files of a directory with their times, into another one that is there."""
    for name in os.listdir(source):
        shutil.copy2(os.path.join(source, name), target)


class UnreadableTest(Case):
    """A source, or a directory in it, that the server may not read any more."""

    def test_what_cannot_be_read_is_not_taken_for_deleted(self):
        if os.geteuid() == 0:
            self.skipTest("root may read everything")
        cluster = self.cluster("s", "a", replicas=1)
        root = cluster.source("root", "s", {"f%d" % number: b"1" for number in range(3)})
        inner = cluster.source("inner", "s", {"d/f%d" % number: b"1" for number in range(3)})
        cluster.backup("b1", "a", "9M")
        cluster.start()
        cluster.settle()
        before = snapshot(cluster, "root"), snapshot(cluster, "inner")
        for path in (root, os.path.join(inner, "d")):
            os.chmod(path, 0)
            self.addCleanup(os.chmod, path, 0o700)
        self.assertRc(1, cluster.client("a"))
        self.assertEqual("held", cluster.status()["sources"]["root"]["state"])
        self.assertEqual(before, (snapshot(cluster, "root"), snapshot(cluster, "inner")))


if __name__ == "__main__":
    unittest.main()
