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
            fuzz.run(300, passes_share=0.015)
        except AssertionError as error:
            raise AssertionError("with the seed %d: %s" % (seed, error))
        finally:
            fuzz.close()


if __name__ == "__main__":
    unittest.main()
