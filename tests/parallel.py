"""Runs the classes of a test suite side by side, in twice as many processes as there are processors and one more (at most
five): `python3 -m unittest` of them all.

Most tests wait for processes of their own or keep a single processor busy, and each has its own ports and directories. A
class always runs in one process, so that what it shares between its tests is made once. $CBACKUP_TEST_JOBS says how many
processes there are (1: all tests run in the process that was started, as those of a single file do).
"""

import collections
import contextlib
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import unittest
import unittest.suite
import warnings

WAITING = """AllHoldersAtOnce Inferred Lies Interrupted OwnFailure Killed LongerThanALease DuringATransfer Web HostileRsync
DiskErrors OddServer Simulated Crowd MassChange Calm AsOrdinaryUser OldVersions Power FailingTarget HostileDisk Silence Reason
Folding""".split()
"""Classes, without the "Test" at their end, that spend most of their time waiting, the longest first: half of the workers take
these, so that there is something to be done beside them all the time."""

BUSY = """Restore OneText Matrix Members SourcesAndLines Demo BackupsComeAndGo Soak Join Find WrongDirectory Declined KillPoints
BackInTime CatalogsEnd CatalogsCostLittle HarderRenames Reserve Changes Spoiled Damage Options RoundTrip CompleteOrTold Asleep
WhereTo AfterChanges Verify ForgedCatalog ShortRun Unread FullDisk RestlessFile HeldConfig Held Seed BackInBusiness OddHolder
DistinctHosts EverythingComesBack Run""".split()
"""Those with which the other half begins: so that no one runs alone at the end."""

JOBS = int(os.environ.get("CBACKUP_TEST_JOBS") or min(5, 2 * (os.cpu_count() or 1) + 1))    # some of them wait


# ---- the process that was started -------------------------------------------------------------------------------

class Elsewhere(Exception):
    """What went wrong with a test in another process: its traceback as text."""


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
        place = {name: at for at, name in enumerate(WAITING + [""] + BUSY[::-1])}
        waiting = collections.deque(classes[kind] for kind in sorted(
            classes, key=lambda kind: place.get(kind.__name__.replace("Test", ""), len(WAITING))))
        self.result = result
        gc.freeze()
        idle, busy = [Worker() for _ in range(min(JOBS, len(classes)))], {}
        try:
            while busy or waiting and not result.shouldStop:
                while idle and waiting and not result.shouldStop:
                    worker = idle.pop()
                    worker.waits = 2 * sum(other.waits for other in busy.values()) < JOBS
                    busy[worker.connection] = worker.begin(waiting.popleft() if worker.waits else waiting.pop())
                for connection in multiprocessing.connection.wait(busy):
                    ready = self.hear(busy[connection])
                    if ready:
                        del busy[connection]
                        idle.append(ready)
        finally:
            for worker in busy.values():
                worker.process.terminate()
            for worker in idle + list(busy.values()):
                worker.end()
        if os.environ.get("CBACKUP_TEST_SKIPS"):        # a file for what was skipped: [as text, name, why], .ci/stages.py
            with open(os.environ["CBACKUP_TEST_SKIPS"], "w") as file:
                json.dump([[str(test), test.id(), why] for test, why in result.skipped], file)
        return result

    def hear(self, worker):
        """Enters what a worker says. When it has nothing to do after that, the worker, or another one in its place."""
        try:
            name, outcomes, seconds = worker.connection.recv()
        except (EOFError, OSError):
            for test in worker.tests.values():
                self.report(test, [("errors", None, "the process that ran it died")], 0.0)
            return Worker()
        self.report(worker.tests.pop(name, None), outcomes, seconds)
        return worker if name is None else None

    def report(self, test, outcomes, seconds):
        """Enters what came of a test, or (None) of what stands around tests."""
        result = self.result
        if test:
            result.startTest(test)
            if not outcomes:
                result.addSuccess(test)
        for how, label, text in outcomes:
            what = test if label is None else unittest.suite._ErrorHolder(label)
            if how == "skipped":
                result.addSkip(what, text)
            else:
                enter = result.addFailure if how == "failures" else result.addError
                enter(what, (Elsewhere, Elsewhere("\n" + text), None))
        if test:
            if hasattr(result, "addDuration"):     # Python 3.12
                result.addDuration(test, seconds)
            result.stopTest(test)


class Worker:
    """A process that runs one class after the other."""

    context = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")

    def __init__(self):
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(target=work, args=(theirs, os.getpid()))
        with theirs:
            self.process.start()

    def begin(self, tests):
        """Has it run the tests of a class, {id: test}; it says what came of each, and at last of what stands around them."""
        self.tests = tests
        self.connection.send(list(tests))
        return self

    def end(self):
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join()


# ---- a worker's process -----------------------------------------------------------------------------------------

class Recorder(unittest.TestResult):
    """Tells of each test: (id, [("failures" | "errors" | "skipped", label or None, text) ...], seconds); no outcome is
    success. The id is None for what stands around tests."""

    def __init__(self, connection, parent):
        super().__init__()
        self.connection, self.parent = connection, parent
        self.told = {"failures": 0, "errors": 0, "skipped": 0}

    def startTest(self, test):
        super().startTest(test)
        self.began = time.monotonic()

    def stopTest(self, test):
        super().stopTest(test)
        self.tell(test)

    def tell(self, test=None):
        if os.getppid() != self.parent:
            sys.exit(1)
        outcomes = []
        for how, known in self.told.items():
            found = getattr(self, how)
            for one, text in found[known:]:
                own = test and (one is test or how == "skipped")        # of a part of it, too
                outcomes.append((how, None if own else str(one), text))
            self.told[how] = len(found)
        self.connection.send((test and test.id(), outcomes, test and time.monotonic() - self.began))


def work(connection, parent):
    """Runs the tests of each list of names, those of one class."""
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    recorder = Recorder(connection, parent)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        for names in iter(connection.recv, None):
            unittest.defaultTestLoader.loadTestsFromNames(names).run(recorder)
            recorder.tell()
