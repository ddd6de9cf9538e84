"""What is said between client and server: levels, and that each side checks what the other one says."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import threading
import time
import unittest
from unittest import mock

import cbackup
from tests import fuzz
from tests.harness import Case, one_in, wait_for, write_file
from tests.members import Member, between, context, copy, one_pass


class LevelTest(Case):
    """Members of different versions talk to each other while a cluster is being brought to a new one."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        c.source("docs", "s", {"f": b"1"})
        c.backup("b1", "a", "10M")
        c.start("s")

    def link(self):
        home = cbackup.Home(self.c.home("a"))
        link = cbackup.Link("s", home.config(), cbackup.Dialer(home))
        self.addCleanup(link.close)
        return link

    def test_a_server_says_its_level(self):
        self.assertEqual(cbackup.LEVEL, self.link().peer_level())

    def test_a_field_that_is_not_known_is_ignored(self):
        self.assertIn("docs", self.link().call("status", of_a_newer_version=[1, {"x": None}])["sources"])

    def test_an_operation_that_is_not_known_has_an_answer_that_says_which_side_to_update(self):
        link = self.link()
        with self.assertRaises(cbackup.Refused) as caught:
            link.call("of_a_newer_version")
        self.assertEqual("unknown-op", caught.exception.reason)
        self.assertIn("update cbackup on", str(caught.exception))
        link.call("status")  # the connection goes on

    def claim(self, link):
        """Claim docs/f for b1; returns its version."""
        link.call("begin", backup="b1", identity="61", adopt=False, capacity=1 << 20, free=1 << 20, used=0, files=0, sums={})
        return link.call("claim", backup="b1", source="docs", free=1 << 20, most_files=1, most_bytes=1 << 20)["rows"][0][-1]

    def test_what_was_only_claimed_cannot_be_moved_into_the_sums(self):
        link = self.link()
        self.claim(link)
        link.call("done", backup="b1", source="docs", kind=cbackup.TODO_MOVE, rows=[[number, 77] for number in range(10)])
        link.call("release", backup="b1", source="docs", paths=[], all=True)
        self.assertEqual([0, 0, 0], link.call("standing", backup="b1", source="docs")["sum"])

    def test_no_jump_of_the_configurations_version_uses_the_numbers_up(self):
        link = self.link()
        offer = link.call("config")["config"]
        text = offer["text"] + "# of a member that jumps\n"
        for version in ((1 << 62) - 1, 1 << 61, offer["version"] + cbackup.VERSION_JUMP + 1):
            jump = dict(offer, version=version, text=text, sha256=cbackup.sha256_of(text), history=[offer["sha256"]])
            with self.assertRaisesRegex(cbackup.Refused, "claims to be version %d" % version):
                link.call("new_config", config=jump)
            fresh = cbackup.Home(self.directory())
            if version > 1 << 61:
                with self.assertRaises(cbackup.ProtocolError):
                    fresh.take_config(jump)
            self.assertEqual(offer, link.call("config")["config"])
        # The next honest edit has the next number.
        text = text.replace("of a member that jumps", "an edit")
        self.assertTrue(link.call("new_config", config=dict(
            offer, version=offer["version"] + 1, text=text, sha256=cbackup.sha256_of(text), history=[offer["sha256"]]))["taken"])
        self.assertEqual((offer["version"] + 1, text), tuple(link.call("config")["config"][key] for key in ("version", "text")))

    def test_words_that_no_bytes_give_are_shown_and_kept_all_the_same(self):
        link = self.link()
        version = self.claim(link)
        for why in ("\ud800", "\udcff\x1b[2J"):
            link.call("decline", backup="b1", source="docs", rows=[["f", version, why]])
        self.addCleanup(self.c.advance, 25 * 3600)
        short = link.call("status")["sources"]["docs"]["short"]
        self.assertEqual([["f", 1]], [row[:2] for row in short])
        self.assertIn("\\udcff\\x1b[2J", short[0][2])


class TableTest(unittest.TestCase):
    """The shapes by which both sides check."""

    def test_every_operation_has_a_function(self):
        missing = [name for name, operation in cbackup.OPERATIONS.items() if operation.handler is None]
        self.assertEqual(["rsync"], missing)

    def test_shapes(self):
        name, count, May, Maybe = cbackup._is_name, cbackup._is_count, cbackup.May, cbackup.Maybe
        right = [(1, count), ([], [count]), ([1, 2], [count]), ([1, "a"], (count, name)), (None, Maybe(count)),
                 ({"a": 1, "surplus": []}, {"a": count}), ({}, {"a": May(count)}), ({"x": 1}, cbackup.Each(count))]
        wrong = [(True, count), (-1, count), (1 << 62, count), (1.0, count), ({}, [count]), ([1] * 4001, [count]),
                 ([1, 2, 3], (count, count)), ([1], (count, count)), ("", Maybe(count)), ({}, {"a": count}), ([], {"a": count}),
                 ({"a": None}, {"a": May(count)}), ({"../x": 1}, cbackup.Each(count)), ({"x": []}, cbackup.Each(count)),
                 ("../x", cbackup._is_path), ("\ud800", cbackup._is_path), ("\ud800", cbackup._is_text), (float("nan"), cbackup._is_real)]
        for value, shape in right:
            self.assertEqual("", cbackup.misfit(value, shape), (value, shape))
        for value, shape in wrong:
            self.assertNotEqual("", cbackup.misfit(value, shape), (value, shape))

    def test_many_values_fit_when_each_of_them_does(self):
        odd = fuzz.VALUES + ["a/b", "a//b", "/a", "a/", "./a", "a/..", "a/...", ".a", "d/" * 1500 + "f", "A" * 64, "abc", 1 << 32, 1 << 48]
        for shape, good in ((cbackup._is_count, 1), (cbackup._is_number, -1), (cbackup._is_mode, 0o644), (cbackup._is_size, 1),
                            (cbackup._is_tag, 1), (cbackup._is_path, "d/f"), (cbackup._is_hex, "00"), (cbackup._is_name, "ba")):
            for value in odd:
                for many in ([value], [value, good], [good, value], [good, value, good]):
                    self.assertEqual(shape(value), not cbackup.misfit(many, [shape]), (many, shape.__name__))
                    self.assertEqual(shape(value), not cbackup.misfit([[1, each] for each in many], [(cbackup._is_count, shape)]))
                    self.assertEqual(shape(value), not cbackup.misfit([many], [cbackup.Every(shape, 3)]))

    def test_rows_of_two_kinds_are_told_apart_by_their_length(self):
        copy, old = ["a", 1, 2, None], [1, "a", "b", 3, 4, "aa"]
        for rows in ([], [copy, copy], [old, old], [copy, old]):
            self.assertFalse(cbackup.misfit(rows, [cbackup.HOLDING]), rows)
        for odd in ([], [1], copy + old, 5, None, "aaaa", ["/a", 1, 2, None], ["a", 1, 2, 3], [1, "a", "../b", 3, 4, "aa"]):
            for rows in ([odd], [odd, odd], [copy, odd], [odd, old]):
                self.assertTrue(cbackup.misfit(rows, [cbackup.HOLDING]), rows)

    def test_what_is_printed_as_it_is_can_only_be_a_name_or_a_word(self):
        for value in ("\x1b[2J", "\udcff", "a b", ""):
            self.assertNotEqual("", cbackup.misfit(value, cbackup._is_word))
            self.assertNotEqual("", cbackup.misfit({"more": False, "rows": [["ba", value, "f", 1, 1, None]]},
                                                   cbackup.OPERATIONS["find"].answer))

    def test_words_for_people_become_ones_that_can_be_shown(self):
        said = {"text": "\x1b[2J", "rows": [["a\rb"]]}
        self.assertEqual("", cbackup.misfit(said, {"text": cbackup._is_said, "rows": [[cbackup._is_said]]}))
        self.assertEqual({"text": "\\x1b[2J", "rows": [["a\\rb"]]}, said)

    def test_what_is_missing_from_an_older_peer_gets_its_default(self):
        answer = {"rows": []}
        self.assertEqual("", cbackup.misfit(answer, {"rows": [cbackup._is_count], "new": cbackup.May([], list)}))
        self.assertEqual([], answer["new"])


class FormerVersionTest(Case):
    """What client and server of level 1 said to each other, recorded from them (wire_level_1.json), is understood by both
    sides now: a cluster is brought to a new version machine by machine."""

    @classmethod
    def setUpClass(cls):
        with open(os.path.join(os.path.dirname(__file__), "wire_level_1.json")) as stream:
            cls.said = json.load(stream)
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=1)
        c.source("docs", "s", {"f": b"1", "dir/g": b"22", "big": 300000, "old": b"x"})
        c.backup("ba", "a", "10M")
        c.backup("bb", "b", "10M")
        c.start("s", "a")
        c.settle()
        cls.pem = os.path.join(c.home("a"), "cluster.pem")

    def test_the_answers_of_a_former_server_are_right_ones(self):
        for op, pairs in self.said.items():
            for pair in pairs:
                if "error" not in pair["answer"]:
                    with self.subTest(op=op):
                        self.assertEqual("", cbackup.misfit(copy(pair["answer"]), cbackup.OPERATIONS[op].answer))

    def test_the_requests_of_a_former_client_are_answered_as_before(self):
        for host in ("s", "a"):
            for op, pairs in self.said.items():
                for pair in pairs:
                    with self.subTest(op=op, host=host, request=str(pair["request"])[:200]):
                        answer = self.answer(host, dict(pair["request"], op=op))
                        self.assertNotIn(answer.get("error"), ("protocol", "unknown-op"), answer)
                        if answer.get("ok") and pair["answer"].get("ok"):
                            self.assertCovers(pair["answer"], answer)

    def answer(self, host, request):
        plain = socket.create_connection(("127.0.0.1", self.c.ports[host]), 30)
        with contextlib.closing(cbackup.Channel(context(self.pem).wrap_socket(plain))) as channel:
            self.assertLessEqual({"cbackup", "host", "books", "version", "config"}, set(channel.receive(30)))
            channel.socket.sendall(json.dumps(request, separators=(",", ":")).encode() + b"\n")
            return channel.receive(60)

    def assertCovers(self, old, new, where=""):
        """`new` has all that a reader of `old` looks for: the same kinds of values at the same places."""
        if old is None or new is None:
            return
        kinds = [(int, float) if isinstance(one, (int, float)) and not isinstance(one, bool) else type(one) for one in (old, new)]
        self.assertEqual(kinds[0], kinds[1], where)
        if isinstance(old, dict):
            names = {"docs", "ba", "bb", "a", "b", "0", "1"}  # what is there now need not be what was there then
            for key in set(old) - names if new else ():
                self.assertIn(key, new, where)
            for key in set(old) & set(new):
                self.assertCovers(old[key], new[key], "%s.%s" % (where, key))
        elif isinstance(old, list) and old and new:
            if any(type(one) is not type(old[0]) for one in old):  # a row
                self.assertEqual(len(old), len(new), where)
                for number, (one, other) in enumerate(zip(old, new)):
                    self.assertCovers(one, other, "%s[%d]" % (where, number))
            elif isinstance(old[0], (list, dict)):
                self.assertCovers(old[0], new[0], where + "[]")


class OddServerTest(Case):
    """One server that answers what no server would costs its own files, and nobody else's."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("odd", "good", "a", "b", replicas=1)
        c.source("own", "odd", {"dir/f%d" % number: 100 for number in range(5)})
        c.source("others", "good", {"g%d" % number: 100 for number in range(20)})
        c.backup("ba", "a", "10M")
        c.start("odd", "good")
        c.settle()
        cls.number = 0

    def new_files(self):
        """A file more in each source: there is something of everything to say."""
        type(self).number += 1
        for source in ("own", "others"):
            write_file(os.path.join(self.c.sources[source].path, "new%d" % self.number), b"new %d" % self.number)

    def lied_to(self, change, **more):
        with between(self.c, "a", "odd", change=change, **more) as liar:
            return one_pass(self.c, "a", liar.config)

    def assertOnlyTheOddOneIsOut(self, figures, why="talks nonsense"):
        self.assertEqual({"odd"}, set(figures.unreachable), figures.lines)
        self.assertTrue(figures.trouble)
        self.assertTrue(any(why in line for line in figures.lines), figures.lines)
        self.assertIn("new%d" % self.number, self.c.copies_on_disk("others"))
        self.assertEqual(["ba"], self.c.copies_on_disk("others")["new%d" % self.number])

    def test_an_answer_with_a_missing_or_a_wrong_key_puts_only_that_server_out(self):
        lies = [(op, key, ("gone", {"x": [None]}, 1 << 70)[number % 3])
                for op in ("look", "begin", "standing", "demand", "claim", "confirm", "placed", "catalog")
                for number, (key, shape) in enumerate(cbackup.OPERATIONS[op].answer.items()) if not isinstance(shape, cbackup.May)]
        for op, key, wrong in self.todays(lies, 3):
            def change(request, answer):
                if request["op"] == op:
                    answer = copy(answer)
                    answer[key] = wrong
                    if wrong == "gone":
                        del answer[key]
                return answer
            with self.subTest(op=op, key=key, wrong=wrong):
                self.new_files()
                self.assertOnlyTheOddOneIsOut(self.lied_to(change))
        self.c.settle()
        self.assertCopies(self.c, "own", 1)

    def test_a_list_that_goes_round_in_circles_ends(self):
        rows = [[1, "dir/f1", None, None]] * cbackup.PAGE

        def todo(request, answer):
            if request["op"] == "begin":
                answer["sources"]["own"]["todo"] = 1
            return dict(answer, rows=rows) if request["op"] == "todo" and request["kind"] == cbackup.TODO_RETIRE else answer

        def catalog(request, answer):
            return dict(answer, cursor=[1, 1]) if request["op"] == "catalog" else answer

        for change in (todo, catalog):
            self.new_files()
            self.assertOnlyTheOddOneIsOut(self.lied_to(change), "round in circles")

    def test_claims_of_which_nothing_comes_end(self):

        def change(request, answer):
            if request["op"] == "demand":
                answer["sources"]["own"].update(missing=100, lacking=100, lacking_files=1)
            if request["op"] == "claim" and request["source"] == "own":
                return dict(answer, rows=[["nothing", 100, 1, 0o644, 0, 0, 1]])
            return answer
        self.new_files()
        with mock.patch.object(cbackup, "BARREN_LIMIT", 5):
            self.assertOnlyTheOddOneIsOut(self.lied_to(change), "none of them comes")

    def test_a_server_that_speaks_for_anothers_source_is_not_listened_to(self):
        before = self.c.copies_on_disk("others")
        gone = [[number, "g%d" % number, None, None] for number in range(20)]

        def change(request, answer):
            if request["op"] == "begin":
                answer = copy(answer)
                answer["sources"]["others"] = dict(answer["sources"]["own"], todo=20)
            if request.get("source") == "others":
                return {"ok": True, "rows": gone if request.get("kind") == cbackup.TODO_RETIRE else []}
            if request["op"] == "demand":
                answer = copy(answer)
                answer["sources"]["others"] = dict(answer["sources"]["own"], lacking_files=1)
            return answer
        figures = self.lied_to(change)
        self.assertTrue(any("speaks for the source others" in line for line in figures.lines), figures.lines)
        self.assertEqual(before, self.c.copies_on_disk("others"))
        self.assertEqual(0, figures.counts["dropped_files"])

    def test_what_a_peer_says_is_never_printed_raw(self):
        evil = "\x1b]0;owned\x07\r\x9b2J\u202e"

        def refuses(request, answer):
            return {"error": "held", "text": evil} if request["op"] == "begin" else answer

        def holds(request, answer):
            if request["op"] == "begin":
                answer = copy(answer)
                answer["sources"]["own"].update(state="held", reason=evil, cause=evil)
            return answer

        def lies(request, answer):
            return dict(answer, sources={evil: 1}) if request["op"] == "begin" else answer
        for change in (refuses, holds, lies):
            figures = self.lied_to(change)
            text = "".join(figures.lines)
            self.assertTrue(text.isprintable(), ascii(text))
        self.assertIn("x1b]0;owned", "".join(self.lied_to(refuses).lines))
        record = logging.LogRecord("cbackup", logging.WARNING, "", 0, "%s", (evil,), None)
        self.assertTrue(cbackup.PlainFormatter("%(message)s").format(record).isprintable())

    def test_a_transfer_of_much_more_than_was_claimed_is_cut(self):
        write_file(os.path.join(self.c.sources["own"].path, "small"), os.urandom(10))
        self.new_files()
        sent = [0]

        def flood(data):
            if sent[0] == 0:
                sent[0] = 1
                return data
            sent[0] += 65536
            return data + b"\x07\x00\x00\x07" * 16384
        begun = time.monotonic()
        figures = self.lied_to(lambda request, answer: answer, stream=flood)
        self.assertLess(sent[0], 64 << 20)
        self.assertLess(time.monotonic() - begun, 60)
        self.assertTrue(figures.trouble, (sent, figures.lines))
        self.assertEqual(["ba"], self.c.copies_on_disk("others")["new%d" % self.number])
        self.c.settle()

    def test_what_comes_in_one_packet_with_the_answer_to_rsync_is_rsyncs(self):
        self.new_files()
        figures = self.lied_to(lambda request, answer: answer, hasty=True)
        self.assertFalse(figures.trouble, figures.lines)
        self.assertEqual(["ba"], self.c.copies_on_disk("own")["new%d" % self.number])

    def test_a_jump_of_a_generation_is_not_believed_and_hides_nothing(self):
        link = cbackup.Link("odd", cbackup.Home(self.c.home("a")).config(),
                            cbackup.Dialer(cbackup.Home(self.c.home("a"))))
        self.addCleanup(link.close)
        vault = os.path.join(self.c.backups["ba"].path, ".cbackup", "catalog", "own")
        identity = cbackup.read_json(os.path.join(self.c.backups["ba"].path, ".cbackup", "identity"))["id"]
        before = link.call("begin", backup="ba", identity=identity, adopt=False, capacity=10, free=10, used=0, files=0,
                           sums={"own": [999999999998]})["sources"]["own"]["gen"]
        self.assertLess(before, 1000)
        # A file of such a number, of whatever origin, does not hide what comes later.
        newest = sorted(os.listdir(vault))[-1]
        os.link(os.path.join(vault, newest), os.path.join(vault, "000000000000-999999999998-1.gz"))
        self.new_files()
        self.c.settle()
        names = [name for name in os.listdir(vault) if name.endswith(".gz")]
        self.assertNotIn("000000000000-999999999998-1.gz", names)
        target = os.path.join(self.directory(), "back")
        self.assertRc(0, self.c.run("b", "restore", "own", "--to", target, "--from", self.c.backups["ba"].path))
        self.assertTrue(os.path.exists(os.path.join(target, "new%d" % self.number)))


class OddHolderTest(Case):
    """One odd server stops neither `status` nor a restore from the others."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=2)
        cls.source = c.source("docs", "s", {"f": b"1", "dir/g": b"22", "big": 300000})
        c.backup("ba", "a", "10M")
        c.backup("bb", "b", "10M")
        c.start("s", "a", "b")
        c.settle()
        cls.home = c.fresh_home("x")

    def nonsense(self):
        """Answers that a server would not give, for each kind of answer."""
        rows = [["f", 1, 1, None]] * cbackup.PAGE
        return [lambda request, answer: {"ok": True}, lambda request, answer: b"nonsense\n", lambda request, answer: None,
                lambda request, answer: dict(answer, rows=rows) if "rows" in answer else answer,
                lambda request, answer: dict(answer, rows=[[1]], vaults={"ba": {}}, sources={"docs": {}}, rooms=1)]

    def test_restore_brings_everything_from_the_others(self):
        for number, change in self.todays(enumerate(self.nonsense()), 3):
            with self.subTest(number), between(self.c, "a", "a", change=change) as liar:
                write_file(os.path.join(self.home, "cbackup.conf"), liar.config)
                target = os.path.join(self.directory(), "back")
                result = self.c.run("x", "restore", "docs", "--to", target)
                self.assertRc(0, result)
                self.assertSameTree(self.source, target)

    def test_a_catalog_of_which_nothing_comes_is_not_called_damaged(self):
        def ends(data):
            raise ConnectionResetError("cut")

        said = ""
        for host in ("a", "b"):  # one of them has the newest
            with between(self.c, "a", host, change=lambda request, answer: answer, stream=ends) as liar:
                write_file(os.path.join(self.home, "cbackup.conf"), liar.config)
                result = self.c.run("x", "restore", "docs", "--to", os.path.join(self.directory(), "back"))
            self.assertRc(0, result)
            said += result.stderr
        self.assertRegex(said, r"the catalog of b(.) on \1: \1: cannot be reached: the transfer broke off")
        self.assertNotIn("damaged", said)

    def test_status_says_what_the_others_know(self):
        for number, change in enumerate(self.nonsense()):
            with self.subTest(number), between(self.c, "a", "a", change=change) as liar:
                write_file(os.path.join(self.home, "cbackup.conf"), liar.config)
                result = self.c.run("x", "--host", "b", "status", "--json")
                self.assertEqual("ok", result.json["sources"]["docs"]["state"], result)
                self.assertEqual("ok", result.json["backups"]["bb"]["state"], result)
                self.assertNotIn("mistake", result.stderr)


class ForgedCatalogTest(Case):
    """A catalog that the source's own server did not make is not the newest, whatever it is called."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=2)
        cls.source = c.source("docs", "s", {"f": b"1", "dir/g": b"22"})
        c.backup("ba", "a", "10M")
        c.backup("bb", "b", "10M")
        c.start("s", "a", "b")
        c.settle()
        cls.home = c.fresh_home("x")
        cls.catalogs, cls.others = (os.path.join(one.path, ".cbackup", "catalog", "docs") for one in c.backups.values())

    def forge(self, ahead, older=0):
        """A catalog in which there is but one file, of a generation so far ahead; returns its path."""
        newest = max((cbackup.catalogs_in(path)[0] for path in (self.catalogs, self.others)), key=lambda file: file.upto)
        header = {"catalog": 1, "source": "docs", "books": "00", "since": 0, "upto": newest.upto + ahead, "time": newest.time + 5 - older}
        rows = [cbackup.CatalogRow(b"", "d", mode=0o755), cbackup.CatalogRow(b"f", "f", size=1, digest=hashlib.blake2b(
            b"1", digest_size=32).digest())]
        path = os.path.join(self.catalogs, cbackup.write_catalog(
            self.catalogs, header, [row.to_wire(cbackup.LEVEL) for row in rows]).name)
        self.addCleanup(os.unlink, path)
        return path

    def restored(self):
        target = os.path.join(self.directory(), "back")
        result = self.c.run("x", "restore", "docs", "--to", target)
        self.assertRc(0, result)
        return result, target

    def test_it_is_not_taken_where_the_sources_own_server_answers(self):
        for ahead, older in self.todays(((7, 0), (7, 10), (0, 0), (10**17, 0)), 2):
            with self.subTest(ahead=ahead):
                self.forge(ahead, older)
                result, target = self.restored()
                self.assertSameTree(self.source, target)
                self.assertOneError(result, "ba on a has a catalog of docs", "own server on s did not make")
                listing = self.c.run("x", "ls", "docs", "--json")
                self.assertEqual({"dir", "f"}, {entry["name"] for entry in listing.json["entries"]}, listing)
                self.doCleanups()

    def test_where_it_does_not_answer_it_is_said_whose_catalog_was_taken(self):
        self.forge(7)
        self.c.stop("s")
        try:
            result, target = self.restored()
        finally:
            self.c.start("s")
        self.assertEqual({"f"}, set(os.listdir(target)))
        self.assertIn("by the catalog of ba on a", result.stdout)

    def test_new_books_do_not_hide_what_there_was(self):
        """The source's own machine is a new one, and no backup has told it anything yet."""
        self.c.stop("s")
        shutil.rmtree(os.path.join(self.c.home("s"), "state"))
        self.c.start("s")
        with Member(self.c, "bb", "docs") as member:
            wait_for(lambda: member.ask("status")["sources"]["docs"]["last_scan"] is not None, 30, "it has not looked")
        result, target = self.restored()
        self.assertSameTree(self.source, target)
        self.assertEqual("", result.stderr)
        self.c.settle()  # the first pass: from now on there is a catalog that this server made, and it is the newest
        before = {file.upto for file in cbackup.catalogs_in(self.catalogs)}
        self.forge(7)
        result, target = self.restored()
        self.assertSameTree(self.source, target)
        self.assertOneError(result, "own server on s did not make")
        self.assertGreater(len(before), 1)


@one_in(2, "test_pages")
class LongNamesTest(Case):
    """However long names are and whatever they consist of, what is sent stays below what the other side listens to."""

    def test_pages(self):
        name = "\udcff" * 4096
        pages = list(cbackup.in_pages([[name, 1, None]] * 2001))
        self.assertEqual(2001, sum(map(len, pages)))
        self.assertLess(max(len(json.dumps(page)) for page in pages), cbackup.REQUEST_LIMIT // 2)
        self.assertEqual([2000, 1], [len(page) for page in cbackup.in_pages(["short"] * 2001)])
        self.assertEqual([[b"x" * (1 << 20)]] * 2, list(cbackup.in_pages([b"x" * (1 << 20)] * 2)))
        self.assertEqual(([], False), cbackup.with_more([]))

    def test_files_with_the_longest_names_are_copied_reported_moved_and_restored(self):
        with self.cluster("s", "a", replicas=1) as c:
            source = os.fsencode(c.source("docs", "s", {"f": b"1"}))
            c.backup("ba", "a", "50M")
            deep = b"/".join([b"\xff" * 250] * 9)  # rsync 3.5 itself fails from 2,800 bytes on
            os.makedirs(os.path.join(source, b"d", deep))
            for number in range(600):       # each of the last few is longer than LONG_PATH, and takes an rsync of its own
                odd = b"\xfe" * (230 if number < 597 else 240)
                write_file(os.path.join(source, b"d", deep, b"%d" % number + odd), b"%d" % number)
            c.start("s", "a")
            c.settle()
            os.rename(os.path.join(source, b"d"), os.path.join(source, b"e"))
            self.assertEqual(600, sum(figures["moved_files"] for figures in c.settle()))
            c.stop("s")
            shutil.rmtree(os.path.join(c.home("s"), "state"))
            c.start("s")
            self.assertEqual(0, sum(figures["copied_files"] for figures in c.settle()))
            self.assertCopies(c, "docs", 1)
            target = c.path("back")
            self.assertRc(0, c.restore("s", "docs", to=target))
            self.assertSameTree(c.sources["docs"].path, target)


class DripTest(unittest.TestCase):
    def test_a_byte_now_and_then_is_no_transfer(self):
        (near, far), (reader, writer) = socket.socketpair(), socket.socketpair()
        over = threading.Event()

        def drip():
            while not over.wait(0.05):
                far.send(b"x")
        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with mock.patch.object(cbackup, "RATE_WINDOW", 1.0):
                how = cbackup.relay(near, reader.fileno(), reader.fileno(), 60.0, lambda count: None)
        finally:
            over.set()
            thread.join()
            for one in (near, far, reader, writer):
                one.close()
        self.assertEqual("stalled", how)


if __name__ == "__main__":
    unittest.main()
