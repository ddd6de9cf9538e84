"""Small deliberate faults in cbackup.py, each against one promise, and the tests that must notice.

    python3 -m tests.mutants [--only NAME ...] [--minutes M] [--seed S] [--jobs N] [--list]

Each is applied to a copy in a temporary directory; then its tests run there until the first one fails,
which is run once more without the fault: one that fails then as well has noticed nothing.  Printed are
who noticed, and those that nobody did.  With --seed they come in an order of its own, and --minutes is
how long it takes at most: that is how CI tries a few others each day.  The exit status is 1 when one is
left alive, or cannot be applied: its text must be in cbackup.py exactly once.
"""

import argparse
import concurrent.futures
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from tests.harness import PATIENCE, TOP

LIMIT = 170     # seconds for the tests of one fault; not to have come to an end by then is to have noticed

# name, text, text instead, the promise, tests that must notice
MUTANTS = [
    ("own-host-counts", "not lost and host != self.host)", "not lost)",
     "the source's own host never counts", "test_liars.CountingTest"),
    ("grant-counts-claims", "for b, copy in self.members.items() if copy and b != backup and b not in self.leaving})",
     "for b, copy in self.members.items() if b != backup and b not in self.leaving})",
     "a claim is no copy", "test_liars.DroppingTest"),
    ("grant-counts-itself", "if copy and b != backup and b not in self.leaving})", "if copy and b not in self.leaving})",
     "a grant leaves N copies on others", "test_liars.DroppingTest"),
    ("grant-of-what-is-presumed", 'AND e.doubt IS NULL "', '"',
     "what is presumed grants nothing", "test_proof.Grants"),
    ("grant-not-recorded", 'db.execute("DELETE FROM copies WHERE file=? AND backup=?", (row[0], backup))\n'
     '                    self._are_news([row[0]])', 'self._are_news([row[0]])',
     "a grant is recorded before it is answered", "test_liars.DroppingTest"),
    ("moved-together", "if group != grp and number not in moved:", "if group != grp and not moved:",
     "each file of a batch is claimed for itself", "test_liars.CountingTest test_client_pass"),
    ("claims-at-once", "min(APPLY_CHUNK, max_files - len(taken))", "max_files - len(taken)",
     "others are served in between", "test_databases.BatchesTest"),
    ("waits-again", "self.dialer = Dialer(home, impatient=True)", "self.dialer = Dialer(home)",
     "a pass waits once for a silent host", "test_channel.SilenceTest"),
    ("counted-unsaid", "self.figures.add(**figures)\n", "pass\n", "a pass says what it copied",
     "test_faults.FullDiskTest"),
    ("changed-unseen", "info.st_ino, info.st_ctime_ns) and old[11] is None", "info.st_ino, old[8]) and old[11] is None",
     "a change that keeps size and time is seen", "test_proof test_decay test_exact"),
    ("checked-where-more-comes", "flight.side = 1 - flight.side", "flight.side = 0",
     "what is checked is what is put into place", "test_schedule.ScheduleTest"),
    ("moved-twice", "if group != grp and number not in moved:", "if group != grp:",
     "what is placed is what there is", "test_databases.BatchesTest"),
    ("moved-without-bytes", "(count, size, after)])", "(count, 0, after)])", "what is placed is what there is",
     "test_databases.BatchesTest"),
    ("counted-not-durable", "            self.save_up()  # a lasting one", "            pass  # a lasting one",
     "what counts is durable before it is told", "test_durability"),
    ("never-lasting-again", '("EXTRA" if lasting else "NORMAL")', '"NORMAL"',
     "what counts is durable before it is told", "test_durability"),
    ("books-gone-for-good", "(is_damage(error) or self.books.gone)", "is_damage(error)",
     "a disk that fails for a while ends no server", "test_databases"),
    ("new-files-uncounted", "(len(sizes), sum(sizes), group)", "(len(sizes), 0, group)",
     "what is placed is what there is", "test_databases.BatchesTest"),
    ("claims-are-holders", "(members_of(row[0]) if row else ()) if copy)", "(members_of(row[0]) if row else ()))",
     "a catalog says who has a copy", "test_databases.BatchesTest"),
    ("page-within-a-generation", 'parts.insert(0, ("gen=? AND id>?", *after))', "pass",
     "a catalog is whole", "test_catalog_files.GenerationTest"),
    ("lines-by-their-looks", """text.count('],["') == len(rows) - 1:""", "True:",
     "a catalog is what there was", "test_catalog_files.CatalogFilesTest"),
    ("copies-not-added-up", "(len(rows), sum(row[2] for row in rows), sum(row[5] for row in rows),", "(len(rows), 0, 0,",
     "a backup's sum is that of its copies", "test_vault test_client_pass"),
    ("coming-takes-no-room", "(sum(f.size for f in files),))", "(0,))", "what is on its way takes room", "test_vault test_client_pass"),
    ("batch-cut-short", "some += [some[-1]] * (width - len(some))", "some = some[:1] * width",
     "a question about many files is about all of them", "test_liars test_client_pass"),
    ("samples-not-compared", 'digest_samples(descriptor, given["offsets"]) != given["samples"]', "False",
     "the samples of a large copy are compared", "test_liars.CountingTest"),
    ("small-not-compared", 'verdict = "ok" if own == given["digest"] else "bad"', 'verdict = "ok"',
     "a small copy is compared in full", "test_liars.CountingTest"),
    ("presumed-not-read", "return facts[\"digest\"] if facts[\"doubt\"] is None else None", "return facts[\"digest\"]",
     "what is presumed is read", "test_proof"),
    ("proof-of-another", "return \"ok\" if found and _is_version(found, facts) else \"changed\", None", "return \"ok\", None",
     "a proof is of a file that is the same now", "test_proof"),
    ("dispute-not-settled", 'return "ok" if facts["digest"] == given["digest"] else "bad"', 'return "ok"',
     "a disputed digest is settled by reading", "test_liars.CountingTest"),
    ("dispute-first-is-right", 'verdict = "ok" if known in (None, given["digest"]) else "unproven"', 'verdict = "ok"',
     "a later copy's digest must equal the proven one", "test_liars.CountingTest"),
    ("placed-unconfirmed", "known[path][1] == known[path][2] == version]", "known[path][1] == version]",
     "a copy counts only after its checksum was confirmed", "test_liars.CountingTest"),
    ("placed-other-version", "known[path][1] == known[path][2] == version]", "known[path][2] is not None]",
     "a copy counts only for the version that is known now", "test_liars.CountingTest"),
    ("confirm-other-version", 'if facts is None or facts["version"] != one["version"] \\\n', "if facts is None \\\n",
     "the checksum is confirmed against the version known now", "test_liars.CountingTest"),
    ("fields-not-checked", "        if wrong or operation.handler is None:", "        if operation.handler is None:",
     "every message is checked before it is used", "test_liars.FieldsTest"),
    ("counts-unbounded", "return type(value) is int and self.low <= value < self.high",
     "return isinstance(value, int)", "ranges are checked", "test_liars.FieldsTest"),
    ("many-counts-unbounded", "return set(map(type, values)) == {int} and self.low <= min(values)",
     "return set(map(type, values)) == {int}", "ranges are checked", "test_wire.TableTest"),
    ("many-paths-unseen", 'b"//", b"/./", b"/../"))', 'b"//"))',
     "no path leads outside", "test_wire.TableTest"),
    ("names-anything", "return isinstance(value, str) and bool(_NAME.match(value))", "return isinstance(value, str)",
     "names are checked", "test_liars.FieldsTest"),
    ("paths-with-dots", r'|/)\.{0,2}(?:/|\Z)|\0").search', r'|/)(?:/|\Z)|\0").search',
     "no path leads outside", "test_liars.FieldsTest"),
    ("paths-with-nul", r'(?:/|\Z)|\0").search', r'(?:/|\Z)").search',
     "paths are checked", "test_liars.FieldsTest"),
    ("flags-anything", "    return isinstance(value, bool)\n", "    return True\n", "types are checked", "test_liars.FieldsTest"),
    ("any-protocol", 'if hello.get("cbackup") != PROTOCOL:', "if False:",
     "another version of the protocol is refused", "test_liars.HelloTest"),
    ("any-host", 'if hello.get("host") != self.host:', "if False:",
     "a server is the host that its line names", "test_liars.HelloTest"),
    ("idle-for-ever", "request = channel.receive(REQUEST_IDLE)", "request = channel.receive(REQUEST_IDLE * 100)",
     "requests have time limits", "test_liars.LimitsTest"),
    ("connections-without-end", "full = own if len(own) >= MEMBER_SHARE else", "full = own if False else",
     "no host takes all places", "test_liars.LimitsTest"),
    ("handler-raises", 'names = os.listdir(self.root)', 'names = os.listdir(self.root) + [1 // 0]',
     "an error is no traceback", "test_times.LookingTest"),
    ("claims-for-ever", "until = self.up() + CLAIM_LEASE", "until = self.up() + 1e9",
     "a claim expires", "test_times.LeasesTest"),
    ("claims-short", "CLAIM_LEASE = 3600.0", "CLAIM_LEASE = 1800.0", "a claim holds for an hour", "test_times.LeasesTest"),
    ("declines-for-years", "DECLINE_FOR = 24 * 3600.0", "DECLINE_FOR = 87600 * 3600.0",
     "a file is declined for a while", "test_times.LeasesTest"),
    ("declines-short", "DECLINE_FOR = 24 * 3600.0", "DECLINE_FOR = 12 * 3600.0",
     "a file is declined for a while", "test_times.LeasesTest"),
    ("lost-after-halved", "now - lost_after)", "now - lost_after / 2)",
     "lost_after", "test_times.LeasesTest"),
    ("lost-never", "now - lost_after)", "now - lost_after * 2)",
     "lost_after", "test_times.LeasesTest"),
    ("lost-for-ever", '            if row[0]:\n                db.execute("UPDATE backups SET lost=0', 
     '            if False:\n                db.execute("UPDATE backups SET lost=0',
     "a backup that is back counts again", "test_times.LeasesTest"),
    ("waiting-is-work", "                if news:  # once", "                if True:  # once",
     "who waits costs nothing", "test_times.LookingTest"),
    ("scan-never", "or now - seen >= every:", "or False:", "scan", "test_times.LookingTest"),
    ("scan-twice-as-often", "or now - seen >= every:", "or now - seen >= every / 2:", "scan", "test_times.LookingTest"),
    ("scan-min-ignored", "self.scanner.look(self.config.scan_min, LOOK_WAIT)", "self.scanner.look(0.0, LOOK_WAIT)",
     "scan_min", "test_times.LookingTest"),
    ("scan-min-for-ever", "self.scanner.look(self.config.scan_min, LOOK_WAIT)", "self.scanner.look(1e9, LOOK_WAIT)",
     "scan_min", "test_times.LookingTest"),
    ("read-rate-ignored", "                time.sleep(self._due - now)", "                pass", "read_rate", "test_times.KeepTest"),
    ("keep-doubled", 'self.OLD + "AND since<? LIMIT 500", clock.now() - keep)',
     'self.OLD + "AND since<? LIMIT 500", clock.now() - 2 * keep)', "keep", "test_times.KeepTest"),
    ("keep-halved", 'self.OLD + "AND since<? LIMIT 500", clock.now() - keep)',
     'self.OLD + "AND since<? LIMIT 500", clock.now() - keep / 2)', "keep", "test_times.KeepTest"),
    ("scrub-never", "now - self.config.scrub / 2,", "now - self.config.scrub * 100,", "scrub", "test_times.KeepTest"),
    ("scrub-always", "budget = total * max(0.0, now - last) / max(1.0, self.config.scrub)\n"
     "        checked = self.verify(budget, now - self.config.scrub / 2,",
     "budget = total\n        checked = self.verify(budget, now,", "scrub",
     "test_times.KeepTest.test_every_copy_is_read_again_within_scrub"),
    ("mounts-walked-into", 'row["walk"] = info.st_dev == self.device', 'row["walk"] = True',
     "a scan stays on one file system", "test_held.ServerTest"),
    ("mass-change-passes", "if known >= HELD_SHARE_OF and (gone + changed) * 2 > known:", "if False:",
     "a mass change is held", "test_held.ServerTest"),
    ("empty-passes", "if known and gone == known and not", "if False and not", "an empty source is held", "test_held.ServerTest"),
    ("mass-change-too-early", "(gone + changed) * 2 > known:", "(gone + changed) * 4 > known:",
     "up to half of the files are changes like others", "test_held.ServerTest"),
    ("attic-skipped", "self.tree.link(place, META_DIR + b\"/\" + stored)", "pass",
     "what was there before goes to the attic", "test_vault.OldVersionsTest test_changes.OldVersionsTest"),
    ("delete-without-grant", "if not own and (grant is None or self.place_of(grant.source, grant.path) != rel):", "if False:",
     "no copy is deleted without a grant", "test_vault.OldVersionsTest"),
    ("clock-wrong-ignored", "        if self.clock_wrong:\n            return\n", "", "a wrong clock costs no old version",
     "test_vault.WrongClockTest"),
    ("held-expires", "\"AND source NOT IN (SELECT source FROM temp.kept) \"", '""',
     "nothing of a held source expires", "test_vault.HeldTest"),
    ("restore-checks-first", "checker.submit(functools.partial(", "(lambda check: check())(functools.partial(", "a batch is fetched while the one before it is checked",
     "test_schedule.ScheduleTest.test_the_next_batch_is_on_its_way_while_the_last_one_is_checked"),
    ("torn-is-damaged", 'return outcome.went_through or item.size > PLAIN_BELOW', "return True",
     "what was cut off is no damaged copy",
     "test_schedule.ScheduleTest.test_a_small_file_that_lies_torn_because_the_line_was_cut_is_not_called_damaged"),
    ("restore-compares-always", "if not flight.rate or not flight.parts:", "if True:",
     "a part that came quickly is not compared at length",
     "test_schedule.ScheduleTest.test_a_part_is_gone_on_with_where_the_line_is_slower_than_comparing"),
    ("restore-unchecked", "right = info.st_size == item.size and item.digest in (\n"
     "                None, digest_descriptor(descriptor, size=item.size)[0])", "right = True",
     "restore checks every byte", "test_restore.RestoreTest"),
    ("token-twice", '            found["tries"] = 0\n', "            pass\n", "a token works once", "test_joining.JoinTest"),
    ("any-token", "right = secrets.compare_digest(given, found[\"secret\"])", "right = True",
     "a wrong token lets nobody in", "test_joining.JoinTest"),
    ("backup-in-source", "and _inside(backup[\"path\"], source[\"path\"]):", "and False:",
     "a backup inside a source is an error", "test_cli.ConfigurationErrorsTest"),
    ("backups-nested", "and _inside(backup[\"path\"], other[\"path\"]) \\", "and False \\",
     "two backups nested in each other are an error", "test_cli.ConfigurationErrorsTest"),
    ("name-twice", "            if known != number:\n", "            if False:\n",
     "a name used twice is an error", "test_cli.ConfigurationErrorsTest"),
    ("size-or-reserve", 'if "size" not in found and "reserve" not in found:', "if False:",
     "a backup needs size or reserve", "test_cli.ConfigurationErrorsTest"),
    ("writable-rsync", "read only = yes", "read only = no", "a peer only reads",
     "test_hostile.HostileRsyncTest"),
    ("rsync-options", "remove-source-files remove-sent-files", "", "options that change the source are refused",
     "test_hostile.OptionsTest test_hostile.HostileRsyncTest"),
    ("fresh-is-proof", "return verdict, None if is_fresh(info) else own", "return verdict, own",
     "a digest is a fact only when times are old enough",
     "test_proof.FreshTest"),
    ("test-switch", 'if os.environ.get("CBACKUP_TEST") == "1" else None', "", "what tests set needs CBACKUP_TEST=1",
     "test_harness.EnvironmentTest"),
    ("steady-goes-back", "self._furthest = max(self._furthest, self._offset())", "self._furthest = self._offset()",
     "the clock for leases only grows", "test_harness.EnvironmentTest"),
    # what is said
    ("slept-too-long-is-safe",
     'elif status["hosts"][s["host"]]["answered"] > status["warn_after"]:', "elif False:",
     "a source not heard of for warn_after is not safe", "test_said.AsleepTest"),
    ("a-scan-in-one", "in_batches(self.found.rest(), APPLY_CHUNK)", "[list(self.found.rest())]",
     "what a scan found is entered in slices", "test_databases.BatchesTest"),
    ("a-scan-has-the-lock", "self._db = books.reader()", "self._db = books.reader(); books.lock.acquire()",
     "nobody waits for a scan", "test_databases.BatchesTest"),
    ("active-before-all-is-counted", "int(source.name not in again)", "1",
     "a source that comes again is active when none of its old copies counts", "test_databases.BatchesTest"),
    ("asleep-is-unsafe-at-once",
     'elif status["hosts"][s["host"]]["answered"] > status["warn_after"]:', "elif True:",
     "a source asleep is safe until warn_after", "test_said.AsleepTest"),
    ("what-was-wrong-then", 'before = source_trouble(name, s["then"])', "before = []",
     "what was not safe when it fell asleep is not called safe", "test_said.AsleepTest"),
    ("silent-backup-is-safe", 'elif silent > status["warn_after"]:', "elif False:",
     "a backup silent for warn_after is named", "test_said.AsleepTest.test_a_backup_that_was_not_heard_of_is_named_and_by_passes_when_its_host_cannot_be_reached"),
    ("nothing-is-safe", '    if not status["sources"]:\n        found.wrong', '    if False:\n        found.wrong',
     "nothing configured is not safe", "test_said.NothingConfiguredTest"),
    ("proof-overdue-is-safe", 'if s["unproven_since"] > warn_after:', "if False:",
     "what is presumed is safe until warn_after only", "test_said.ProofTest"),
    ("proof-is-not-said", '        found.note(line)\n\n\ndef print_status', '        pass\n\n\ndef print_status',
     "what is presumed is called so", "test_said.ProofTest"),
    ("check-exits-0", "return EXIT_DONE if verdict(status).safe else EXIT_INCOMPLETE", "return EXIT_DONE",
     "status --check exits 1 when not safe", "test_status.CheckTest"),
    ("status-exits-0", 'return EXIT_INCOMPLETE if any(s["state"] == "unreachable" for s in status["sources"].values()) '
     'else EXIT_DONE', "return EXIT_DONE", "status exits 1 when a source is unreachable", "test_status.StagesTest.test_a_source_whose_host_is_down_is_unreachable_and_the_others_are_not"),
    ("status-lacks-a-key", '"overserved_files", "state", "last_scan", "unproven_files", "unproven_since"),',
     '"state", "last_scan", "unproven_files", "unproven_since"),', "the keys of status --json", "test_status.JsonTest.test_the_keys_and_kinds_are_those_of_the_contract"),
    ("error-without-json", 'print(json.dumps(dict(vars(args).get("failed", {}), error=text)))', "pass",
     "--json is one object whatever happens", "test_restore_says.JsonTest"),
    ("quiet-is-not", "        Progress.quiet = args.quiet\n", "", "-q shows no progress",
     "test_terminal.ProgressTest"),
    ("quiet-speaks", "elif sys.stdout.isatty() and not args.quiet:", "elif sys.stdout.isatty():",
     "-q is quiet at a terminal",
     "test_terminal.AtATerminalTest.test_a_pass_ends_with_what_it_did_and_whether_all_is_safe"),
    # being told
    ("alert-too-early", '>= self.after]\n                due', '>= 0]\n                due',
     "told after alert_after", "test_alert.WatchTest"),
    ("alert-only-once", ' or not 0 <= self.now - facts["told"] < ALERT_AGAIN)', ")",
     "told once a day while it lasts", "test_alert.WatchTest"),
    ("alert-each-pass", ' or not 0 <= self.now - facts["told"] < ALERT_AGAIN)', " or True)",
     "told once a day, not in each pass", "test_alert.WatchTest"),
    ("alert-well-too-early", 'elif self.over and not any(facts.get("told") is not None for facts in self.wrong.values()):',
     "elif self.over:", "well is told once all is over", "test_alert.WatchTest"),
    ("alert-tried-each-pass", "< ALERT_RETRY)]", "< 0)]", "an alert that fails is tried again after an hour",
     "test_alert.WatchTest"),
    # exclude
    ("anchored-by-the-first", '        anchored = "/" in body\n', '        anchored = body.startswith("/")\n',
     "a pattern with / inside is anchored", "test_excludes.RulesTest"),
    ("first-pattern-decides", "for pattern in reversed(list(patterns)):", "for pattern in patterns:",
     "the last pattern that matches decides", "test_excludes.RulesTest"),
    ("slash-at-the-end-ignored", "if (directory or not only_directories) and regex.match(", "if regex.match(",
     "a trailing / means directories", "test_excludes.RulesTest"),
    ("star-crosses-slashes", '"[^/]*" if not deep', '".*" if not deep', "* stops at a /", "test_excludes.RulesTest"),
    ("question-mark-is-a-slash", 'out.append("[^/]")', 'out.append(".")', "? is no /", "test_excludes.RulesTest"),
    ("no-exclamation-mark", 'keep = pattern.startswith("!")', "keep = False", "! brings back",
     "test_excludes.RulesTest"),
    ("caret-does-not-negate", 'in ("!", "^")', 'in ("!",)', "classes as gitignore has them", "test_excludes.RulesTest"),
    ("any-tag-is-a-cache", "return stream.read(len(CACHE_SIGNATURE)) == CACHE_SIGNATURE", "return True",
     "only a tag with its signature marks a cache", "test_excludes.FileTest test_excludes.BackedUpTest.test_exclude_caches_keeps_the_directory_and_its_tag"),
    ("cache-without-its-tag", "if cache and entry.name != CACHE_TAG:", "if cache:",
     "of a cache the directory and its tag are kept", "test_excludes.BackedUpTest.test_exclude_caches_keeps_the_directory_and_its_tag"),
    # proof
    ("changed-while-read", 'return ("read", own) if _is_version(os.fstat(descriptor), facts) else ("changed", None)',
     'return "read", own', "a proof needs the same times before and after", "test_proof.FreshTest"),
    ("fresh-is-read", '        if is_fresh(info):\n            return "fresh", None\n', "",
     "a file changed just now is no proof", "test_proof.FreshTest"),
    ("consent-for-ever", "def scan(self, name: str, consent: bool = False) -> None:\n",
     "def scan(self, name: str, consent: bool = False) -> None:\n        self.consents = consent = consent or "
     "getattr(self, \"consents\", False)\n", "consent is for one scan", "test_held.ServerTest"),
    ("accept-is-nothing", "        if not self.consent:\n            self._judge()", "        if True:\n            self._judge()",
     "accept lets the change through", "test_held.ServerTest"),
    # held
    ("held-is-said-only", '        if row["state"] != "ok":\n            raise Refused("held"',
     '        if False:\n            raise Refused("held"', "held means that nothing changes", "test_held.ServerTest"),
    ("other-disk-passes", "if elsewhere and gone + changed:", "if False:", "another file system is held",
     "test_held.MountTest"),
    # the door and the channel
    ("strangers-say-much", "channel = Channel(tls, STRANGER_LINE, 0)", "channel = Channel(tls)",
     "a stranger can say little and nothing packed", "test_door.MemoryTest"),
    ("nested-without-end", '    if brackets:\n        raise ProtocolError("a message that is nested',
     '    if False:\n        raise ProtocolError("a message that is nested', "depth has a bound", "test_door.MemoryTest"),
    ("values-without-end", 'if bare.count(b",") + bare.count(b"[") + bare.count(b"{") > ELEMENTS:', "if False:",
     "the number of values has a bound", "test_door.MemoryTest"),
    ("digits-without-end", 'if b"0" * (DIGITS + 1) in bare.translate(_ALL_DIGITS_0):', "if False:",
     "numbers have a bound", "test_door.MemoryTest"),
    ("key-readable", "if mode & 0o077:", "if False:", "a key that others can read is refused", "test_cli.KeyFileTest"),
    # shapes
    ("keys-may-be-missing", '        if key not in value:\n            return ".%s is missing" % key',
     '        if key not in value:\n            continue', "what is missing is an error", "test_wire.TableTest"),
    ("lists-without-end", "if not isinstance(value, (list, tuple)) or len(value) > most:",
     "if not isinstance(value, (list, tuple)):", "lists have a bound", "test_wire.TableTest"),
    ("rows-of-any-length", "len(value) not in kinds:\n            return \" is no list of %s\" % \" or \".join(map(str, kinds))\n"
     "        parts = zip(itertools.count(), value, kinds[len(value)])",
     "not kinds:\n            return \" is no list of %s\" % \" or \".join(map(str, kinds))\n"
     "        parts = zip(itertools.count(), value, next(iter(kinds.values())))",
     "rows have their length", "test_wire.TableTest"),
    ("no-defaults", "value[key] = default() if callable(default) else default", "pass",
     "what an older peer lacks gets its default", "test_wire.TableTest"),
    ("said-raw", "            value[key] = shown(value[key])\n", "            pass\n",
     "nothing that a peer says is printed raw", "test_wire.TableTest"),
    # folding names
    ("case-is-not-folded", 'unicodedata.normalize("NFD", path.decode()).casefold()',
     'unicodedata.normalize("NFD", path.decode())', "names that differ in case are one there", "test_folding.StandInTest"),
    ("others-name-taken", "if not self.folds or self.tree.lstat(place) is None:", "if True:",
     "a name that is another's is refused", "test_folding.StandInTest"),
    # rsync
    ("own-failure-is-theirs", 'return "own" if relayed == "unstarted" or relayed == "done" and failed_here else "cut"',
     'return "cut"', "own failures of rsync are put down to this side", "test_rsyncs.HowItEndedTest"),
    ("killed-rsync-is-theirs", "failed_here = result.code < 0 or", "failed_here = False or",
     "a killed rsync is this side's", "test_rsyncs.HowItEndedTest"),
    # the page
    ("names-are-markup", 'return html.escape(str(text).encode("utf-8", "backslashreplace").decode())', "return str(text)",
     "a name is only text", "test_page.HtmlTest"),
    ("any-host-name", 'if not web.is_for_us(self.headers.get("Host")):', "if False:",
     "the page answers to its own name only", "test_page.WebTest"),
    ("no-csp", """self.send_header("Content-Security-Policy", page_policy() + "; frame-ancestors 'none'")""", "pass",
     "the page runs nothing", "test_page.WebTest"),
    ("page-without-token", "return not self.token or secrets.compare_digest(", "return True or secrets.compare_digest(",
     "beyond this machine the address has a token", "test_page.WebTest"),
    # looking back
    ("ls-without-older", "if r[5] and (r[2], r[3]) != (size, mtime)})", "if False})", "older versions are counted",
     "test_looking_back.LsTest"),
    ("log-of-idle-passes", 'if pass_text(record) == "nothing to do" and not', "if False and not",
     "idle passes are one line", "test_looking_back.LogTest"),
    ("day-begins", "int(hour or 23)", "int(hour or 0)",
     "a day is its end", "test_restore_says.TimesTest"),
    ("find-raises", 'if found["until"] is not None:\n        text +=', 'if found["unti"] is not None:\n        text +=',
     "find is no traceback", "test_restore_says.FindTest"),
    ("ls-without-gone", "if name and name not in names and any(r[5] for r in rows)),", "if False),",
     "what is gone and has old versions is named", "test_looking_back.LsTest"),
    # what restore says
    # services, completion
    ("timer-forgets", "Persistent=true\n", "", "a pass missed in sleep is made up for", "test_service.InstallerTest"),
    ("service-not-started", ', ["systemctl", "restart"] + names],', "],", "service --install starts it",
     "test_service.InstallerTest"),
    ("crontab-overwritten", 'if not line.endswith(" " + mark)]', "if False]", "the other lines of a crontab stay",
     "test_service.InstallerTest"),
    ("crontab-percent", 'map(shlex.quote, words)))).replace("%", "\\\\%")', 'map(shlex.quote, words))))',
     "the lines are of crontab's form", "test_service.InstallerTest"),
    ("bash-without-options", """yield "        %s) word='%s';;" % (name, words(one))""", "pass",
     "options are completed", "test_terminal.CompletionTest"),
    # the demo
    ("demo-says-same", "if before.get(path) != after.get(path)}", "if False}",
     "the demo compares", "test_demo.CompareTest"),
    # durability
    ("written-not-synced", "            fsync(stream.fileno())\n        os.rename(temporary, path)",
     "        os.rename(temporary, path)", "atomic_write syncs before it renames", "test_durability.AtomicWriteTest"),
    ("name-not-synced", '    fsync_directory(os.path.dirname(path) or ".")\n', "", "a new name is durable",
     "test_durability.AtomicWriteTest"),
    ("placed-not-synced", "        try:\n            self.tree.sync(names)\n", "        try:\n            pass\n",
     "no placed before it is durable", "test_durability.OrderTest"),
    ("commits-not-synced", 'connection.execute("PRAGMA synchronous=EXTRA")', 'connection.execute("PRAGMA synchronous=OFF")',
     "a grant is durable before its answer",
     "test_durability.OrderTest"),
    ("attic-not-synced", "        self.tree.sync(touched)\n        with self.write() as db:\n            db.executemany(\"UPDATE attic SET done=1",
     "        with self.write() as db:\n            db.executemany(\"UPDATE attic SET done=1",
     "what goes to the attic is durable before it is forgotten", "test_durability.OrderTest"),
    # the backup's directory
    ("anybodys-directory", "names = [] if adopt else in_use_by_others(self.spec.path)", "names = []",
     "a directory in use is refused", "test_vault.InUseTest"),
    ("open-to-others", "self.tree.chmod(name, 0o700)", "pass", "a backup is closed to others", "test_vault.PrivateTest.test_those_that_were_open_are_mended"),
    ("setuid-copies", "self.tree.lstat(rel), mode & 0o777", "self.tree.lstat(rel), mode", "no copy has setuid",
     "test_vault.PrivateTest.test_no_copy_has_setuid_setgid_or_sticky_and_nothing_churns"),
    ("key-backed-up", "skip = [self.home.state_path, self.home.key_path]", "skip = [self.home.state_path]",
     "the key is never backed up", "test_vault.PrivateTest.test_the_key_is_never_backed_up_also_when_the_home_lies_inside_a_source"),
    ("identity-ignored", 'and not request["adopt"] \\\n', "and False \\\n", "another directory in a backup's place is refused",
     "test_liars.CountingTest.test_another_directory_in_a_backups_place_is_refused_unless_it_is_adopted"),
    # catalogs and configuration
    ("catalog-cut-off", "    if not ended:\n        raise DamagedCatalog", "    if False:\n        raise DamagedCatalog",
     "a damaged catalog is found", "test_catalog_files.CatalogFilesTest"),
    ("catalogs-for-ever", "        if found not in needed:\n", "        if False:\n", "catalogs are kept for keep",
     "test_catalog_files.CatalogFilesTest"),
    # extended attributes
    ("attributes-without-end", "if value is not None and size <= XATTRS_LIMIT:", "if value is not None:",
     "attributes that are too much are named", "test_xattrs.ScanTest"),
    ("scan-fails-silently", '    if s["failed"]:\n', "    if False:\n",
     "a scan that fails makes the source unsafe", "test_said.ScanTest.test_a_scan_that_fails_makes_the_source_unsafe_and_every_pass_says_so"),
    ("scan-too-late-is-safe", '    elif s["late"]:\n', "    elif False:\n",
     "a look that is too old is not safe", "test_said.ScanTest.test_a_look_that_is_too_old_is_not_safe"),
    ("unreadable-not-said", '(s["problems"], "path", "could not be read")',
     '({}, "path", "could not be read")', "what could not be read is named", "test_said.UnreadTest.test_an_unreadable_directory"),
    ("stuck-not-said", '(s["stuck"] or {}, "file", "cannot be copied")',
     '({}, "file", "cannot be copied")', "what no backup can take is named", "test_said.UnreadTest.test_what_no_backup_can_take"),
    ("same-time-is-proof", 'row["doubt"] = int(ctime != row["ctime"])', 'row["doubt"] = 0',
     "the same size and time under another ctime is presumed",
     "test_proof.Inferred.test_an_edit_that_keeps_its_time_is_found_whatever_else_happens_to_the_file"),
    ("restore-is-backed-up", "if RESTORE_DIR in names and restore_unfinished(self.root):", "if False:",
     "a source under restore is held", "test_restore_says.FinishedTest"),
    ("unreadable-is-deleted", "            self._problem(directory, reason_of(error))\n            return []\n        different",
     "            self._lose(known)\n            return []\n        different",
     "what cannot be read is not taken for deleted", "test_said.UnreadTest.test_an_unreadable_directory test_held.UnreadableTest"),
    ("strangers-stay", 'STRANGER_SILENCE if guest.kind == "silent" else STRANGER_TIME)]', "1e9)]",
     "who says nothing is turned away", "test_door.CrowdTest.test_who_says_nothing_is_turned_away_soon"),
    ("key-for-strangers", "if not tls.getpeercert(binary_form=True):", "if False:",
     "both sides prove that they hold the key", "test_channel.StrangersTest.test_the_port_is_open_for_the_right_key_only"),
    ("list-not-told", "if written:  # a disk", "if False:  # a disk", "a disk that was put back before the last pass is known",
     "test_client_pass.ChangesTest.test_a_disk_that_is_put_back_as_it_was_gets_the_modes_of_today"),
    ("entered-edit-unheeded", 'if state.get("sha256") not in (None, sha256_of(self.config.text)):', "if False:",
     "an edit that a client has entered is in force at once",
     "test_travel.OneTextTest.test_an_edit_that_a_client_has_entered_is_in_force_in_its_hosts_server_at_once"),
    ("jump-believed", 'if newest >= row["gen"] + GENERATION_JUMP:', "if False:",
     "a jump of a generation is not believed", "test_wire.OddServerTest.test_a_jump_of_a_generation_is_not_believed_and_hides_nothing"),
    ("days-ahead", "return now - parse_duration(word)", "return now + parse_duration(word)", "3d is three days ago",
     "test_catalogs.BackInTimeTest.test_every_form_of_a_time"),
    ("find-finds-nothing", 'at in zip(answer["rows"], times):', "at in zip([], times):",
     "find says where copies and old versions are", "test_restore_says.FindTest"),
    ("unread-not-counted", '(unreadable, "could not be read by', '(0, "could not be read by',
     "restore counts what its own host could not read", "test_said.UnreadTest.test_a_restore_counts_what_could_not_be_read"),
    ("half-of-the-lines", "and 2 * len(gone) > len(before)):", "and False):", "a configuration that removes most is held",
     "test_said.HeldConfigTest.test_held_until_accepted_anywhere_and_then_in_force_everywhere"),
    ("invitation-for-ever", 'found.get("until", 0) > clock.now() >', "True or clock.now() >", "a token works for one hour",
     "test_joining"),
    ("attributes-changes-missed", '            row["how"] = "attributes"\n', '            return None\n',
     "a change of attributes alone is seen", "test_xattrs.RoundTripTest.test_a_change_of_attributes_alone_is_seen_and_copies_nothing"),
    ("client-exits-0", "return EXIT_INCOMPLETE if total.trouble else EXIT_DONE", "return EXIT_DONE",
     "a client that could not do everything exits 1", "test_looking_back.LogTest.test_a_host_that_is_down_is_in_the_log"),
    ("restore-exits-0", "return EXIT_DONE if complete else EXIT_INCOMPLETE", "return EXIT_DONE",
     "an incomplete restore exits 1",
     "test_restore.RestoreTest.test_a_path_that_is_not_in_the_source_is_named_and_the_others_are_restored"),
    ("crowd-without-end", "if not strangers or len(strangers) < most:", "if True:", "strangers have so much room and no more",
     "test_door.CrowdTest.test_when_the_room_is_full_the_oldest_goes_at_once"),
    ("ls-counts-any-version", "for r in held if (r[2], r[3]) == (size, mtime)}", "for r in held}",
     "ls counts copies of the version that it shows",
     "test_looking_back.LsTest.test_a_backup_that_still_has_an_older_version_has_no_copy"),
    ("unproven-not-counted", '(unproven, "of them not proven yet', '(0, "of them not proven yet',
     "restore says how much of what it brought back is not proven",
     "test_restore_says.WhereToTest.test_what_is_not_proven_is_counted_and_named"),
    ("no-chroot", 'chroot="yes" if as_root else "no"', 'chroot="no"', "as root rsync is locked into the tree",
     "test_hostile.HostileRsyncTest.test_as_root_rsync_is_locked_into_the_tree"),
    ("catalog-of-another-time", 'gen, = db.execute("SELECT gen FROM sources WHERE id=?", (number,)).fetchone()',
     'gen = source["gen"]', "who asks for a catalog just after another gets the same one",
     "test_catalog_files.GenerationTest.test_two_that_ask_at_once_get_the_same_one_and_no_number_is_left_out"),
    ("news-in-an-old-catalog", 'OPEN_GEN = "(SELECT gen FROM sources WHERE id=?)"',
     'OPEN_GEN = "(SELECT gen-1 FROM sources WHERE id=?)"', "what is new is in the next catalog",
     "test_catalog_files.GenerationTest.test_a_digest_that_comes_when_a_catalog_was_just_closed_is_in_the_next_one"),
    ("old-disk-is-as-today", "if known is not None and newest < known:", "if False:",
     "a disk that was put back as it was gets the modes of today",
     "test_client_pass.ChangesTest.test_a_disk_that_is_put_back_as_it_was_gets_the_modes_of_today"),
]


def places_of(old, text):
    """The places of a fault's text in cbackup.py, wherever the lines within it are broken."""
    within = re.sub(r"(\\[ \n])+", lambda _: r"\s+", re.escape(old.strip()))
    begin, end = old[:len(old) - len(old.lstrip())], old[len(old.rstrip()):]
    return list(re.finditer(re.escape(begin) + within + re.escape(end), text))


def with_fault(old, new, text):
    """cbackup.py with a fault."""
    place, = places_of(old, text)
    return text[:place.start()] + new + text[place.end():]


def wrong(text):
    """{name: why} of the faults that cannot be applied to this text of cbackup.py."""
    found = {}
    for name, old, new, _, _ in MUTANTS:
        if len(places_of(old, text)) != 1:
            found[name] = "its text is there %d times" % len(places_of(old, text))
    return found


def copied(base, text):
    """The project at `base`, with this text of cbackup.py."""
    for entry in os.listdir(TOP):
        if not entry.startswith("."):
            path = os.path.join(TOP, entry)
            (shutil.copytree if os.path.isdir(path) else shutil.copy2)(path, os.path.join(base, entry))
    with open(os.path.join(base, "cbackup.py"), "w", encoding="utf-8") as file:
        file.write(text)


class Trial:
    """All faults against one text of cbackup.py.  `alone`: how tests ended without one."""

    def __init__(self, text, seconds):
        self.text, self.end = text, time.monotonic() + seconds
        self.alone, self.lock, self.running = {}, threading.Lock(), set()

    def stop(self, *_):
        """Ends what runs; also as the handler of a signal."""
        self.end = 0.0
        for process in list(self.running):
            os.killpg(process.pid, signal.SIGKILL)

    def run_tests(self, text, names):
        """(how they ended, the first that failed): ("well", ""), ("failed", its name), ("late", ""),
        ("broken", the last line) where there were no tests, ("no time", "")."""
        left = self.end - time.monotonic()
        if left <= 0:
            return "no time", ""
        with tempfile.TemporaryDirectory(prefix="cbackup-mutant-") as base:
            os.chmod(base, 0o711)       # some tests run it as another user
            copied(base, text)
            process = subprocess.Popen(
                [sys.executable, "-B", "-m", "unittest", "-f", *names], cwd=base, start_new_session=True,
                env=dict(os.environ, TMPDIR=base, CBACKUP_TEST_JOBS="1", CBACKUP_TEST_WHOLE="1"), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            self.running.add(process)
            try:
                said = process.communicate(timeout=min(LIMIT * PATIENCE, left))[1]
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                said = process.communicate()[0]
            finally:
                self.running.discard(process)
        if process.returncode == -signal.SIGKILL:
            return "late" if time.monotonic() < self.end else "no time", ""
        return ("well", "") if process.returncode == 0 else who_failed(said.decode("utf-8", "replace"))

    def try_one(self, mutant):
        """(whether somebody noticed, words); None for the first where there was no time."""
        name, old, new, promise, tests = mutant
        how, who = self.run_tests(with_fault(old, new, self.text), ["tests." + one for one in tests.split()])
        alone = self.without(who) if how == "failed" else ""
        if "no time" in (how, alone):
            return None, "no time"
        if how == "well":
            return False, "ALIVE: %s" % promise
        if how == "broken":
            return False, "NO TESTS: %s" % who
        if how == "failed" and alone != "well":
            return False, "NOT SURE: %s fails without it too" % who
        return True, who[6:] if who else "they do not come to an end"

    def without(self, test):
        with self.lock:
            if test not in self.alone:
                self.alone[test] = self.run_tests(self.text, [test])[0]
            return self.alone[test]


def who_failed(said):
    """Of what unittest has printed: ("failed", the first test), ("broken", the last line)."""
    first = re.search(r"^(?:FAIL|ERROR): (\w+) \(([\w.]+)\)", said, re.M)
    if first is None or "_FailedTest" in said:
        return "broken", (said.strip().splitlines() or [""])[-1]
    test, where = first.groups()
    if not test.startswith("test") or where.endswith("." + test):   # those of a class have its name alone
        return "failed", where
    return "failed", "%s.%s" % (where, test)


def chosen(args):
    found = [one for one in MUTANTS if not args.only or one[0] in args.only]
    if args.seed is not None:
        random.Random(args.seed).shuffle(found)
    return found


def main():
    parser = argparse.ArgumentParser(prog="python3 -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end after so long")
    parser.add_argument("--seed", type=int, help="in another order")
    parser.add_argument("--jobs", type=int, default=2, help="so many at a time")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    with open(os.path.join(TOP, "cbackup.py"), encoding="utf-8") as file:
        text = file.read()
    bad, trial = wrong(text), Trial(text, args.minutes * 60)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, trial.stop)
    todo = [one for one in chosen(args) if one[0] not in bad]

    def one(mutant):
        found, words = trial.try_one(mutant)
        if found is not None:
            print("%-26s %s" % (mutant[0], words), flush=True)
        return found
    for name, why in bad.items():
        print("%-26s WRONG: %s" % (name, why))
    if args.list:
        for name, _, _, promise, tests in todo:
            print("%-26s %-60s %s" % (name, promise, tests))
        return bool(bad)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        ends = list(pool.map(one, todo))
    print("%d of %d tried (seed %s), %d alive, %d wrong" % (sum(end is not None for end in ends), len(todo), args.seed,
                                                           ends.count(False), len(bad)))
    return bool(bad) or False in ends


if __name__ == "__main__":
    sys.exit(main())
