"""The tests of cbackup: black-box tests that drive the real program through its contract.

Run all with `python3 -m unittest` from the project's top, or one file with `python3 -m unittest tests.test_restore`.
"""

import os


def load_tests(loader, tests, pattern):
    """All tests, as a suite that keeps every processor busy; unittest's discovery asks for it."""
    from tests import parallel
    here = os.path.dirname(os.path.abspath(__file__))
    found = loader.discover(here, pattern or "test*.py", os.path.dirname(here))
    return parallel.ParallelSuite([found]) if parallel.JOBS > 1 else found
