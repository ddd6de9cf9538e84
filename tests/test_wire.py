"""What is said between client and server: levels, and that each side checks what the other one says."""

import unittest

import cbackup
from tests.harness import Case


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
        link = cbackup.Link("s", home.config(), cbackup.tls_context(home, server_side=False))
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


if __name__ == "__main__":
    unittest.main()
