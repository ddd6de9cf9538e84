"""The small faults of tests/mutants.py can be applied, and the tests that must notice them are there."""

import os
import re
import unittest

from tests import mutants
from tests.harness import TOP, read_file


class MutantsTest(unittest.TestCase):
    def test_each_text_is_in_the_program_exactly_once(self):
        self.assertEqual({}, mutants.wrong(read_file(os.path.join(TOP, "cbackup.py")).decode()))

    def test_names_and_promises(self):
        names = [one[0] for one in mutants.MUTANTS]
        self.assertEqual(len(set(names)), len(names))
        self.assertGreaterEqual(len(names), 120)
        for name, old, new, promise, tests in mutants.MUTANTS:
            self.assertTrue(old != new and promise and tests, name)

    def test_the_tests_that_are_named_exist(self):
        for name in {word for one in mutants.MUTANTS for word in one[4].split()}:
            module, _, rest = name.partition(".")
            text = read_file(os.path.join(TOP, "tests", module + ".py")).decode()
            for word in filter(None, rest.split(".")):
                self.assertTrue(re.search(r"^ *(?:class|def) %s\b" % word, text, re.M), name)


if __name__ == "__main__":
    unittest.main()
