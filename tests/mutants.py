"""Small deliberate faults in cbackup.py, each against one promise, and the tests that must notice.

    python3 -m tests.mutants [--only NAME ...] [--part K[/N]] [--minutes M] [--list]

Each is applied to a copy in a temporary directory; then its tests run there until the first one fails. Printed are those that no
test noticed, those for which there was no time, and those whose text is no longer in cbackup.py exactly once: they need another
text. The exit status is 1 when there is any of the first or the last kind. --part K/N takes the K-th of N parts (N: 20).
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
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
    ("grant-of-what-is-presumed", "AND e.path=? AND e.doubt IS NULL AND e.digest IS NOT NULL", "AND e.path=?",
     "what is presumed grants nothing", "test_proof.Grants"),
    ("grant-not-recorded", 'db.execute("DELETE FROM copies WHERE file=? AND backup=?", (row[0], backup))\n'
     '                    self._holders_changed(row[0])', 'self._holders_changed(row[0])',
     "a grant is recorded before it is answered", "test_liars.DroppingTest"),
    ("samples-not-compared", 'digest_samples(descriptor, given["offsets"]) != given["samples"]', "False",
     "the samples of a large copy are compared", "test_liars.CountingTest"),
    ("small-not-compared", 'verdict = "ok" if own == given["digest"] else "bad"', 'verdict = "ok"',
     "a small copy is compared in full", "test_liars.CountingTest"),
    ("dispute-not-settled", 'return "ok" if facts["digest"] == given["digest"] else "bad"', 'return "ok"',
     "a disputed digest is settled by reading", "test_liars.CountingTest"),
    ("dispute-first-is-right", 'verdict = "ok" if known in (None, given["digest"]) else "unproven"', 'verdict = "ok"',
     "a later copy's digest must equal the proven one", "test_liars.CountingTest"),
    ("placed-unconfirmed", "if not row or row[1] != version or row[2] != version:", "if not row or row[1] != version:",
     "a copy counts only after its checksum was confirmed", "test_liars.CountingTest"),
    ("placed-other-version", "if not row or row[1] != version or row[2] != version:", "if not row or row[2] is None:",
     "a copy counts only for the version that is known now", "test_liars.CountingTest"),
    ("confirm-other-version", 'if facts is None or facts["version"] != one["version"] or', "if facts is None or",
     "the checksum is confirmed against the version known now", "test_liars.CountingTest"),
    ("fields-not-checked", "        if wrong or operation.handler is None:", "        if operation.handler is None:",
     "every message is checked before it is used", "test_liars.FieldsTest"),
    ("counts-unbounded", "return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62",
     "return isinstance(value, int)", "ranges are checked", "test_liars.FieldsTest"),
    ("names-anything", "return isinstance(value, str) and bool(_NAME.match(value))", "return isinstance(value, str)",
     "names are checked", "test_liars.FieldsTest"),
    ("paths-with-dots", 'if part in (b"", b".", b".."):', 'if part in (b"",):',
     "no path leads outside", "test_liars.FieldsTest"),
    ("paths-with-nul", 'if not raw or len(raw) > 8192 or b"\\0" in raw:', "if not raw or len(raw) > 8192:",
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
    ("claims-for-ever", "(number, backup, source, self.up() + CLAIM_LEASE))\n        self.regroup([number])",
     "(number, backup, source, self.up() + 1e9))\n        self.regroup([number])",
     "a claim expires", "test_times.LeasesTest"),
    ("claims-short", "CLAIM_LEASE = 3600.0", "CLAIM_LEASE = 1800.0", "a claim holds for an hour", "test_times.LeasesTest"),
    ("declines-for-years", "DECLINE_FOR = 24 * 3600.0", "DECLINE_FOR = 87600 * 3600.0",
     "a file is declined for a while", "test_times.LeasesTest"),
    ("declines-short", "DECLINE_FOR = 24 * 3600.0", "DECLINE_FOR = 12 * 3600.0",
     "a file is declined for a while", "test_times.LeasesTest"),
    ("lost-after-halved", "configured=1 AND heard<?\", now - lost_after)", "configured=1 AND heard<?\", now - lost_after / 2)",
     "lost_after", "test_times.LeasesTest"),
    ("lost-never", "configured=1 AND heard<?\", now - lost_after)", "configured=1 AND heard<?\", now - lost_after * 2)",
     "lost_after", "test_times.LeasesTest"),
    ("lost-for-ever", '            if row[0]:\n                db.execute("UPDATE backups SET lost=0', 
     '            if False:\n                db.execute("UPDATE backups SET lost=0',
     "a backup that is back counts again", "test_times.LeasesTest"),
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
    ("scrub-always", "now - self.config.scrub / 2,", "now,", "scrub", "test_times.KeepTest"),
    ("mounts-walked-into", 'row["walk"] = info.st_dev == self.device', 'row["walk"] = True',
     "a scan stays on one file system", "test_held.MountTest"),
    ("mass-change-passes", "if known >= HELD_SHARE_OF and (gone + changed) * 2 > known:", "if False:",
     "a mass change is held", "test_held"),
    ("empty-passes", "if known and gone == known and not", "if False and not", "an empty source is held", "test_held"),
    ("mass-change-too-early", "(gone + changed) * 2 > known:", "(gone + changed) * 4 > known:",
     "up to half of the files are changes like others", "test_proof.MassChange"),
    ("attic-skipped", "self.tree.link(place, META_DIR + b\"/\" + row[0])", "pass",
     "what was there before goes to the attic", "test_vault.OldVersionsTest test_changes.OldVersionsTest"),
    ("delete-without-grant", "if not own and (grant is None or self.place_of(grant.source, grant.path) != rel):", "if False:",
     "no copy is deleted without a grant", "test_vault test_house"),
    ("clock-wrong-ignored", "        if self.clock_wrong:\n            return\n", "", "a wrong clock costs no old version",
     "test_vault.WrongClockTest"),
    ("held-expires", "WHERE done=1 AND source NOT IN (SELECT source FROM temp.kept) ", "WHERE done=1 ",
     "nothing of a held source expires", "test_vault.HeldTest"),
    ("restore-unchecked", "return count == size and (digest is None or found == digest)", "return True",
     "restore checks every byte", "test_restore.BadCopiesTest"),
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
    ("writable-rsync", "read only = yes", "read only = no", "a peer only reads", "test_hostile"),
    ("rsync-options", "remove-source-files remove-sent-files", "", "options that change the source are refused", "test_hostile"),
    ("fresh-is-proof", "return verdict, None if is_fresh(info) else own", "return verdict, own",
     "a digest is a fact only when times are old enough", "test_proof"),
    ("test-switch", 'if os.environ.get("CBACKUP_TEST") == "1" else None', "", "what tests set needs CBACKUP_TEST=1",
     "test_harness.EnvironmentTest"),
    ("steady-goes-back", "self._furthest = max(self._furthest, self._offset())", "self._furthest = self._offset()",
     "the clock for leases only grows", "test_harness.EnvironmentTest"),
]


def wrong(text):
    """{name: why} of the faults that cannot be applied."""
    found = {}
    for name, old, new, _, _ in MUTANTS:
        if text.count(old) != 1:
            found[name] = "its text is there %d times" % text.count(old)
            continue
        try:
            compile(text.replace(old, new), name, "exec")
        except SyntaxError as error:
            found[name] = "it does not compile: %s" % error
    return found


def noticed(mutant, text):
    """How its tests ended: "failed", "late", or "" when they are all well."""
    name, old, new, _, tests = mutant
    with tempfile.TemporaryDirectory(prefix="cbackup-mutant-") as base:
        for entry in os.listdir(TOP):
            if not entry.startswith("."):
                path = os.path.join(TOP, entry)
                (shutil.copytree if os.path.isdir(path) else shutil.copy2)(path, os.path.join(base, entry))
        with open(os.path.join(base, "cbackup.py"), "w", encoding="utf-8") as file:
            file.write(text.replace(old, new))
        process = subprocess.Popen([sys.executable, "-B", "-m", "unittest", "-f"] + ["tests." + one for one in tests.split()],
                                   cwd=base, env=dict(os.environ, TMPDIR=base, CBACKUP_TEST_JOBS="1"), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            return "failed" if process.wait(LIMIT * PATIENCE) else ""
        except subprocess.TimeoutExpired:
            return "late"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def chosen(args):
    if args.only:
        return [one for one in MUTANTS if one[0] in args.only]
    if args.part:
        part, _, parts = args.part.partition("/")
        number = int(parts or 20)
        return MUTANTS[int(part) % number::number]
    return MUTANTS


def main():
    parser = argparse.ArgumentParser(prog="python3 -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--part", metavar="K[/N]", help="the K-th of N parts, by default of 20")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no other one after so long")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    with open(os.path.join(TOP, "cbackup.py"), encoding="utf-8") as file:
        text = file.read()
    bad, alive, begun = wrong(text), [], time.monotonic()
    for mutant in chosen(args):
        name, _, _, promise, tests = mutant
        if args.list:
            print("%-26s %-60s %s" % (name, promise, tests))
        elif name in bad:
            continue
        elif time.monotonic() - begun > args.minutes * 60:
            print("%-26s no time" % name)
        else:
            how = noticed(mutant, text)
            print("%-26s %s" % (name, how or "ALIVE: %s" % promise), flush=True)
            alive += [] if how else [name]
    for name, why in bad.items():
        print("%-26s WRONG: %s" % (name, why))
    return bool(alive or bad)


if __name__ == "__main__":
    sys.exit(main())
