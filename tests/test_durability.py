"""What is said to be done is durable by then: the order of syncs, renames, commits and messages is recorded, not believed."""

import os
import unittest
from unittest import mock

import cbackup
from tests import recorder
from tests.harness import Case, copy_wrong_bytes, make_tree, write_file

FULL = 2        # PRAGMA synchronous: FULL; EXTRA is 3


@unittest.skipUnless(recorder.possible(), "this system does not tell the path of an open file")
class OrderTest(Case):
    """One story: two backups copy, update, move and retire files, one is killed meanwhile and goes on, one drops copies. To
    the client on b there is no syncfs(2): it syncs file by file."""

    @classmethod
    def setUpClass(cls):
        cls.c = cls.share_cluster("s", "a", "b", replicas=2)
        recorder.record(cls, cls.c)
        cls.source = cls.c.source("docs", "s", {"d/e%d/f%d" % (n % 3, n): 5000 + n for n in range(12)})
        for host in "ab":
            cls.c.backup("b" + host, host, size="1M")
        cls.c.start("s")
        cls.tell()
        cls.c.stop("s")
        cls.events = recorder.events(cls.c)

    @classmethod
    def passes(cls, hosts="ab"):
        for host in hosts:
            result = cls.c.client(host, CBACKUP_RECORD_SYNCFS="no" if host == "b" else "yes")
            assert result.rc == 0, result

    @classmethod
    def tell(cls):
        c, source = cls.c, cls.source
        cls.passes()
        for n in (0, 1, 2, 3):
            write_file(os.path.join(source, "d/e%d/f%d" % (n % 3, n)), "edited %d" % n)
        for n in (4, 5):
            os.unlink(os.path.join(source, "d/e%d/f%d" % (n % 3, n)))
        os.rename(os.path.join(source, "d/e0"), os.path.join(source, "d/moved"))
        make_tree(source, {"deep/er/and/deeper/new": 3000})
        cls.passes()
        for n in (1, 2, 7):
            write_file(os.path.join(source, "d/e%d/f%d" % (n % 3, n)), "edited again %d" % n)
        for host in "ab":
            killed = c.client(host, CBACKUP_TEST_KILL="linked:3")
            assert killed.rc == -9, killed
        cls.passes()
        assert not copy_wrong_bytes(c, "docs", 2), copy_wrong_bytes(c, "docs", 2)
        c.keys["replicas"] = 1
        c.backups["bb"].options["size"] = "20000"
        cls.passes("b")

    # -- reading the record

    def sent(self, op, what="send"):
        """The requests for an operation that clients have sent, or (`receive`) that the server has received."""
        found = [event for event in self.events if event.what == what and event.answer is None
                 and event.message and event.message["op"] == op]
        self.assertTrue(found, "no %s: not a test" % op)
        return found

    def answered(self, op):
        """The answers that the server is about to send for an operation."""
        found = [event for event in self.events if event.what == "send" and event.answer and event.request.get("op") == op
                 and event.answer.get("ok")]
        self.assertTrue(found, "no answer to %s: not a test" % op)
        return found

    def place(self, request, path):
        return self.c.kept_as(request["backup"], request["source"], path)

    def staged(self, request, path):
        return os.path.join(self.c.backups[request["backup"]].path, ".cbackup/incoming", request["source"], path)

    def disk(self):
        """(event, Disk as it was just before it) for all of the record."""
        disk = recorder.Disk(self.c.base)
        for event in self.events:
            yield event, disk
            disk.follow(event)
            if event.what == "send" and event.message.get("op") == "confirm":
                for row in event.message["rows"]:
                    disk.arrived(self.staged(event.message, row[0]), event.at)

    def assertCertain(self, disk, path, when):
        self.assertEqual([], disk.doubts(path), when)

    def commits(self, event, name, since=0):
        """What was committed to a database of this name, by the thread of an event, before it; and it was durable: with a WAL
        by the last of these commits."""
        found = [e for e in self.events if e.what == "commit" and since <= e.at < event.at and e.pid == event.pid
                 and e.thread == event.thread and os.path.basename(e.path) == name]
        for one in [each for each in found if each.journal_mode != "wal"] + found[-1:]:
            self.assertGreaterEqual(one.synchronous, FULL if one.journal_mode == "wal" else FULL + 1, one)
        return [sql for one in found for sql in one.changed]

    # -- copies

    def test_what_is_told_to_be_in_place_is_there_to_stay(self):
        count = 0
        for event, disk in self.disk():
            if event.what == "send" and event.message.get("op") == "placed":
                for path, _, _ in event.message["rows"]:
                    self.assertCertain(disk, self.place(event.message, path), "when it was told to be in place")
                    count += 1
        self.assertGreaterEqual(count, 2 * (12 + 4 + 3))

    def test_what_the_backup_itself_calls_a_copy_is_there_to_stay(self):
        for event, disk in self.disk():
            if event.what == "commit" and any(sql.startswith("INSERT INTO held") for sql in event.changed):
                root = os.path.dirname(os.path.dirname(event.path))
                doubts = [path for path in list(disk.names) + list(disk.bytes)
                          if path.startswith(os.path.join(root, "docs/")) and os.path.lexists(path)]
                self.assertEqual([], doubts)

    def test_a_copy_is_counted_by_a_durable_commit_before_that_is_answered(self):
        asked, count = {}, 0
        for event in self.events:
            if event.what == "receive" and event.message and event.message.get("op") == "placed" and event.message["rows"]:
                asked[event.pid, event.thread] = event
            elif event.what == "send" and event.answer and event.answer.get("counted"):
                changed = self.commits(event, "books.db", asked[event.pid, event.thread].at)
                self.assertTrue([sql for sql in changed if " copies" in sql], changed)
                count += 1
        self.assertGreaterEqual(count, 6)

    def test_a_claim_waits_for_no_disk(self):
        for event in self.events:
            if event.what == "commit" and any(sql.startswith("INSERT INTO copies") for sql in event.changed):
                self.assertLess(event.synchronous, FULL, event)

    # -- what was there before

    def test_the_old_version_is_in_the_attic_before_the_new_one_takes_its_place(self):
        count = 0
        links = {}
        for event in self.events:
            if event.what == "link":
                links[event.old] = event
            elif event.what == "rename" and "/.cbackup/incoming/" in event.old:
                place = event.new
                before = [e for e in self.events if e.at < event.at and e.what == "rename" and e.new == place]
                if before:
                    self.assertIn(place, links, "nothing was kept of what stood there")
                    link = links.pop(place)
                    self.assertIn("/.cbackup/attic/docs/", link.new)
                    self.assertGreater(link.at, before[-1].at)
                    count += 1
        self.assertGreaterEqual(count, 2 * (2 + 3))

    def test_what_is_to_be_done_is_written_down_before_files_are_touched(self):
        for event in self.events:
            backup = event.what in ("rename", "link") and next(
                (one.path for one in self.c.backups.values() if event.old.startswith(one.path + "/")), None)
            if not backup or event.old.endswith(".new") or "/.cbackup/incoming/" in event.new or "/catalog/" in event.new:
                continue        # not a file of a source, or a basis for rsync
            wanted = "UPDATE coming SET digest=?, stage=1" if "/.cbackup/incoming/" in event.old else \
                "INSERT INTO moving" if "/.cbackup/moving/" in event.old + event.new else "INSERT INTO attic"
            changed = [sql for e in self.events if e.what == "commit" and e.at < event.at
                       and e.path == os.path.join(backup, ".cbackup/backup.db") for sql in e.changed]
            self.assertTrue([sql for sql in changed if sql.startswith(wanted)], event)

    def test_the_attic_is_certain_before_the_intention_is_forgotten(self):
        count = 0
        for event, disk in self.disk():
            if event.what == "commit" and any(sql.startswith("UPDATE attic SET done=1") for sql in event.changed):
                attic = os.path.join(os.path.dirname(event.path), "attic") + "/"
                self.assertEqual([], [path for path in disk.names if path.startswith(attic) and not os.path.isdir(path)])
                count += 1
        self.assertGreaterEqual(count, 4)

    def test_a_move_and_a_removal_are_certain_before_they_are_told_to_be_done(self):
        kinds = set()
        for event, disk in self.disk():
            if event.what == "send" and event.message.get("op") == "done" and event.message["rows"]:
                kinds.add(event.message["kind"])
                root = os.path.join(self.c.backups[event.message["backup"]].path, event.message["source"]) + "/"
                self.assertEqual([], [path for path in disk.names if path.startswith(root) and not os.path.isdir(path)])
        self.assertLessEqual({cbackup.TODO_MOVE, cbackup.TODO_RETIRE}, kinds)

    # -- deleting

    def test_a_grant_is_committed_durably_before_it_is_answered(self):
        granted = 0
        for event in self.answered("drop"):
            asked = max((e for e in self.sent("drop", "receive") if e.at < event.at and e.thread == event.thread
                         and e.pid == event.pid), key=lambda e: e.at)
            changed = self.commits(event, "books.db", asked.at)
            if event.answer["granted"]:
                self.assertTrue([sql for sql in changed if sql.startswith("DELETE FROM copies")], changed)
                granted += len(event.answer["granted"])
        self.assertGreaterEqual(granted, 2)

    def test_only_what_was_granted_is_deleted_and_after_it_was_written_down(self):
        granted, count = set(), 0
        for event in self.events:
            if event.what == "receive" and event.answer and event.request.get("op") == "drop":
                granted |= {self.place(event.request, path) for path in event.answer["granted"]}
            elif event.what == "unlink" and any(event.path.startswith(self.c.kept_as(backup, "docs"))
                                                for backup in self.c.backups):
                self.assertIn(event.path, granted)
                changed = self.commits(event, "backup.db")
                self.assertTrue([sql for sql in changed if "INTO dropping" in sql], changed)
                count += 1
        self.assertGreaterEqual(count, 2)

    # -- files of our own

    def test_files_of_our_own_are_replaced_whole_and_for_good(self):
        """Databases, locks and the list of passes apart, nothing is written in place, and what is renamed over it is durable before and after."""
        synced, waiting, count = {}, {}, 0
        for event in self.events:
            if event.what == "fsync":
                synced[event.path] = event.at
                for place in [place for place in waiting if os.path.dirname(place) == event.path]:
                    del waiting[place]
            elif event.what == "rename" and (event.old.endswith(".new") or "/catalog/" in event.new):
                self.assertIn(event.old, synced, "renamed before it was durable")
                waiting[event.new] = synced.pop(event.old)
                count += 1
            elif event.what == "write" and event.path.startswith(self.c.base):
                self.assertRegex(event.path, r"(\.new|/new|\.db|/lock|\.lock|/passes\.jsonl)\Z")
                synced.pop(event.path, None)
            elif event.what == "send":
                self.assertEqual({}, {place: at for place, at in waiting.items() if at < event.at}, "the directory is not synced")
        self.assertGreaterEqual(count, 10)


class AtomicWriteTest(Case):
    """atomic_write: a new file, synced, renamed, its directory synced."""

    def steps(self, path, **more):
        told = []

        def tell(name, real):
            def called(*args, **words):
                told.append(name)
                return real(*args, **words)
            return mock.patch.object(os, name, called)
        with tell("fsync", os.fsync), tell("rename", os.rename):
            cbackup.atomic_write(path, b"content", **more)
        return told

    def test_it_is_synced_then_renamed_then_its_directory_is_synced(self):
        path = os.path.join(self.directory(), "file")
        self.assertEqual(["fsync", "rename", "fsync"], self.steps(path))
        self.assertEqual(["file"], os.listdir(os.path.dirname(path)))

    def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(self):
        path = os.path.join(self.directory(), "file")
        write_file(path, "old")
        for name in ("fsync", "rename"):
            with mock.patch.object(os, name, side_effect=OSError(5, "Input/output error")):
                self.assertRaises(OSError, cbackup.atomic_write, path, b"new")
            self.assertEqual(["file"], os.listdir(os.path.dirname(path)))
            with open(path) as file:
                self.assertEqual("old", file.read())


if __name__ == "__main__":
    unittest.main()
