"""What the configuration says of time, just before it and just after it, by the clock that tests can set."""

import time
import unittest

from tests.harness import Case, make_tree, wait_for

HOUR, DAY = 3600, 86400


class LookingTest(Case):
    """`scan`: how often a server looks by itself; `scan_min`: how old a look may be for a client's pass."""

    def start(self, **keys):
        self.c = self.cluster("s", "a", replicas=1, **keys)
        self.root = self.c.source("src", "s", {"one": b"1"})
        self.c.backup("ba", "a", "8M")
        self.c.start()
        wait_for(lambda: self.looked() is not None, 20, "no first look")
        return self.c

    def looked(self):
        return self.c.status("s")["sources"]["src"]["last_scan"]

    def files(self):
        return self.c.status("s")["sources"]["src"]["files"]

    def test_a_server_looks_again_after_scan_and_not_before(self):
        c = self.start(scan="1h")
        make_tree(self.root, {"two": b"2"})
        c.advance(HOUR - 300 - self.looked())
        time.sleep(1)       # it looks at the clock ten times in this second
        self.assertEqual(1, self.files())
        c.advance(600)
        wait_for(lambda: self.files() == 2, 20, "no look after `scan`")

    def test_a_pass_makes_the_server_look_when_the_last_look_is_older_than_scan_min(self):
        c = self.start(scan="30d", scan_min="1h")
        self.assertEqual(1, c.client("a").json["copied_files"])
        make_tree(self.root, {"two": b"2"})
        c.advance(HOUR - 300 - self.looked())
        self.assertEqual(0, c.client("a").json["copied_files"])
        c.advance(600)
        self.assertEqual(1, c.client("a").json["copied_files"])


if __name__ == "__main__":
    unittest.main()
