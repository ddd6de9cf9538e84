"""A short run of `python3 -m tests.fuzz`: mutated requests and answers leave no trace.  CBACKUP_TEST_SEED tries a seed again."""

import os
import random
import unittest

from tests.fuzz import Fuzz


class ShortRunTest(unittest.TestCase):
    def test_mutated_messages_are_answered_and_healed(self):
        seed = int(os.environ.get("CBACKUP_TEST_SEED") or random.randrange(1 << 32))
        fuzz = Fuzz(seed, lambda line: None)
        try:
            fuzz.run(400)
        except Exception as error:
            raise AssertionError("with the seed %d: %s: %s" % (seed, type(error).__name__, error)) from error
        finally:
            fuzz.close()
        fuzz.c.remove()


if __name__ == "__main__":
    unittest.main()
