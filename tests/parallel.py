"""Runs the classes of a test suite side by side, in two processes more than there are processors (at most four):
`python3 -m unittest` of them all.

Most tests wait for processes of their own or keep a single processor busy, and each has its own ports and directories. A
class always runs in one process, so that what it shares between its tests is made once. $CBACKUP_TEST_JOBS says how many
processes there are (1: all tests run in the process that was started, as those of a single file do).
"""

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
import unittest

from tests.harness import TOP, Guard

LONGEST = """Silence AllHoldersAtOnce Interrupted Killed Inferred HostileRsync AsOrdinaryUser OneText DiskErrors OwnFailure KillPoints Real
LongerThanALease Power Demo Matrix Members Seed""".split()
"""Classes, without the "Test" at their end, with which to begin: so that no one runs alone at the end."""

JOBS = int(os.environ.get("CBACKUP_TEST_JOBS") or min(4, (os.cpu_count() or 1) + 2))     # some of them wait


# ---- the process that was started -------------------------------------------------------------------------------

class Elsewhere(Exception):
    """What went wrong with a test in another process: its traceback as text."""


class Label:
    """Stands in a result for what is no test, such as a setUpClass that failed."""

    failureException = None

    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text

    id = __str__

    def shortDescription(self):
        return None


def tests_of(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from tests_of(test)
        else:
            yield test


class ParallelSuite(unittest.TestSuite):
    """A suite whose classes are run by several workers. What could not even be loaded fails here."""

    def run(self, result, debug=False):
        classes = collections.OrderedDict()
        for test in tests_of(self):
            if type(test).__module__.startswith("tests."):
                classes.setdefault(type(test), {})[test.id()] = test
            else:
                test.run(result)
        first = {name: place for place, name in enumerate(LONGEST)}
        self.waiting = collections.deque(classes[kind] for kind in sorted(
            classes, key=lambda kind: first.get(kind.__name__.replace("Test", ""), len(first))))
        self.result, self.lock = result, threading.Lock()
        workers = [Worker(self) for _ in range(min(JOBS, len(classes)))]
        try:
            for worker in workers:
                worker.join()
        finally:
            for worker in workers:
                worker.end()
        if os.environ.get("CBACKUP_TEST_SKIPS"):        # a file for what was skipped: [as text, name, why], .ci/stages.py
            with open(os.environ["CBACKUP_TEST_SKIPS"], "w") as file:
                json.dump([[str(test), test.id(), why] for test, why in result.skipped], file)
        return result

    def next_class(self):
        """{id: test} of a class that nobody has run yet; None after the last one."""
        with self.lock:
            return self.waiting.popleft() if self.waiting and not self.result.shouldStop else None

    def report(self, test, outcomes, seconds=None):
        """Enters what a worker says of one test, or (`seconds` None) of what stands around tests."""
        with self.lock:
            if seconds is not None:
                self.result.startTest(test)
                if not outcomes:
                    self.result.addSuccess(test)
            for how, label, text in outcomes:
                what = test if label is None else Label(label)
                if how == "skip":
                    self.result.addSkip(what, text)
                else:
                    enter = self.result.addFailure if how == "failure" else self.result.addError
                    enter(what, (Elsewhere, Elsewhere("\n" + text), None))
            if seconds is not None:
                if hasattr(self.result, "addDuration"):     # Python 3.12
                    self.result.addDuration(test, seconds)
                self.result.stopTest(test)


class Worker(threading.Thread):
    """Has one class after the other run by a process, until none is left."""

    def __init__(self, suite):
        super().__init__(daemon=True)
        self.suite, self.process = suite, None
        self.start()

    def run(self):
        tests = self.suite.next_class()
        while tests:
            if self.process is None:
                self.process = subprocess.Popen([sys.executable, "-m", "tests.parallel"], cwd=TOP, start_new_session=True,
                                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                Guard.tell(b"+", self.process.pid)
            self.run_class(dict(tests))
            tests = self.suite.next_class()
        self.end()

    def run_class(self, tests):
        self.process.stdin.write(json.dumps(list(tests)).encode() + b"\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            told = json.loads(line)
            if told is None:
                return
            name, outcomes, seconds = told
            self.suite.report(tests.pop(name) if seconds is not None else Label(name), outcomes, seconds)
        self.end()
        for test in tests.values():
            self.suite.report(test, [["error", None, "the process that ran it died"]], 0.0)

    def end(self):
        process, self.process = self.process, None
        if process is not None:
            process.terminate()
            process.stdin.close()
            process.stdout.close()
            process.wait()
            Guard.tell(b"-", process.pid)


# ---- a worker's process -----------------------------------------------------------------------------------------

class Recorder(unittest.TestResult):
    """Writes a line of JSON for each test: [id, [[failure | error | skip, label or null, text] ...], seconds], the seconds
    null for what stands around tests; no outcome is success."""

    def __init__(self, out):
        super().__init__()
        self.out, self.current = out, None

    def tell(self, what):
        self.out.write(json.dumps(what) + "\n")
        self.out.flush()

    def startTest(self, test):
        super().startTest(test)
        self.current, self.outcomes, self.began = test, [], time.monotonic()

    def stopTest(self, test):
        super().stopTest(test)
        self.current = None
        self.tell([test.id(), self.outcomes, time.monotonic() - self.began])

    def note(self, how, test, text):
        if how != "skip":
            self.errors.append((test, text))        # Case keeps its directories then
        if self.current is None:
            self.tell([str(test), [[how, None, text]], None])
        else:
            self.outcomes.append([how, None if test is self.current else str(test), text])

    def addFailure(self, test, err):
        self.note("failure", test, self._exc_info_to_string(err, test))

    def addError(self, test, err):
        self.note("error", test, self._exc_info_to_string(err, test))

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.note("failure" if issubclass(err[0], test.failureException) else "error", subtest,
                      self._exc_info_to_string(err, test))

    def addSkip(self, test, reason):
        self.note("skip", self.current or test, reason)     # of a part of a test, too

    def addExpectedFailure(self, test, err):
        pass

    def addUnexpectedSuccess(self, test):
        self.note("failure", test, "this was expected to fail")


def work():
    """Runs the tests that each line of standard input names, a JSON list of those of one class; then writes null."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    recorder = Recorder(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)       # what a test prints does not belong between our lines
    for line in sys.stdin:
        unittest.defaultTestLoader.loadTestsFromNames(json.loads(line)).run(recorder)
        recorder.tell(None)


if __name__ == "__main__":
    work()
