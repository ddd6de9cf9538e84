"""`plan`: does it fit, and what does the loss of each host mean?"""

import unittest

from tests.harness import Case

SIZE = 10000


class PlanTest(Case):
    """One source of 10 files, 2 copies wanted, on two other hosts; each test asks again with other rooms."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", "b", replicas=2)
        c.source("docs", "s", {"f%d" % number: SIZE for number in range(9)})
        c.source("one", "s", {"the large one": 3 * SIZE})
        for host in "ab":
            c.backup("b" + host, host, "1M")
        c.start()
        cls.before = c.run("a", "plan", "--json")
        c.round()
        cls.config, cls.plans = c.config(), {}

    def setUp(self):
        self.offer("1M")

    def offer(self, size):
        self.c.backups["bb"] = self.c.backups["bb"]._replace(options={"size": str(size)})

    def plan(self, rc, bb="1M"):
        """(text, object) of `plan` with this size of the backup on b, asked once; rc: how both have to end."""
        self.offer(bb)
        config = self.c.config()
        if config not in self.plans:
            if config != self.config:
                self.c.stop(*"sb")      # a's does not matter to them
                self.c.start("s", "b")
                type(self).config = config
            self.plans[config] = self.c.run("b", "plan"), self.c.run("b", "plan", "--json")
        text, data = self.plans[config]
        self.assertRc(rc, text)
        self.assertRc(rc, data)
        return text.stdout, data.json

    def test_what_fits_is_said_to_fit_with_the_real_sizes(self):
        text, plan = self.plan(0)
        self.assertIn("It fits", text)
        self.assertEqual((True, 24 * SIZE, 2 << 20, 0), tuple(plan[key] for key in (
            "fits", "needed_bytes", "offered_bytes", "short_bytes")))
        one = plan["sources"]["one"]
        self.assertEqual((1, 3 * SIZE, 6 * SIZE, 3 * SIZE, "the large one"), tuple(one[key] for key in (
            "files", "bytes", "needed_bytes", "largest_bytes", "largest_path")))

    def test_what_does_not_fit_is_said_with_what_is_missing(self):
        text, plan = self.plan(1, bb=4 * SIZE)
        self.assertIn("It does NOT fit", text)
        self.assertEqual((False, 8 * SIZE), (plan["fits"], plan["short_bytes"]))

    def test_a_file_that_is_larger_than_the_backups_is_named(self):
        text, plan = self.plan(1, bb=3 * SIZE - 1)
        self.assertIn("the large one", text)
        self.assertEqual(([], 1), (plan["sources"]["docs"]["problems"], len(plan["sources"]["one"]["problems"])))

    def test_before_the_first_pass_the_loss_of_the_sources_host_is_a_loss(self):
        loss = self.before.json["hosts"]["s"]
        self.assertEqual((10, 12 * SIZE), (loss["lost_files"], loss["lost_bytes"]))

    def test_afterwards_nothing_is_lost_with_any_one_host_but_copies_become_short(self):
        text, plan = self.plan(0)
        self.assertIn("If one host dies now", text)
        for host, loss in plan["hosts"].items():
            self.assertEqual((0, 0), (loss["lost_files"], loss["lost_bytes"]), host)
        self.assertEqual((10, 12 * SIZE), (plan["hosts"]["a"]["short_files"], plan["hosts"]["a"]["short_bytes"]))
        self.assertFalse(plan["hosts"]["a"]["room"], "two copies cannot be on the one host that is left")

    def test_what_is_not_known_is_not_said_to_fit(self):
        self.c.kill("s")
        try:
            text, plan = self.c.run("b", "plan"), self.c.run("b", "plan", "--json").json
        finally:
            self.c.start("s")
        self.assertRc(1, text)
        self.assertEqual((None, ["s"]), (plan["fits"], plan["unreachable"]))
        self.assertIn("its server does not answer", text.stdout)
        self.assertIn("It is unknown whether it fits: no answer from s.", text.stdout)
        self.assertIn("s: what would be lost of docs, one is unknown", text.stdout)
        self.assertNotIn("nothing would be lost", [line for line in text.stdout.splitlines() if line.startswith("    s:")][0])

    def test_what_a_server_that_is_down_offers_is_unknown(self):
        self.c.kill("b")
        try:
            text, plan = self.c.run("a", "plan"), self.c.run("a", "plan", "--json").json
        finally:
            self.c.start("b")
        self.assertRc(1, text)
        self.assertEqual((None, ["b"]), (plan["fits"], plan["unreachable"]))
        self.assertIn("offers at most 1 MB, and how much of it is there is unknown: its server does not answer", text.stdout)
        self.assertIn("It is unknown whether it fits: no answer from b.", text.stdout)

    def test_missing_hosts_are_told_from_missing_room(self):
        self.c.keys["replicas"] = 3
        try:
            text, plan = self.plan(1)
        finally:
            self.c.keys["replicas"] = 2
        self.assertEqual((False, 1, 0), (plan["fits"], plan["missing_hosts"], plan["short_bytes"]))
        self.assertIn("It does NOT fit: 1 more host with a backup is missing", text)
        self.assertNotIn("room for 0", text)
        self.assertIn("too few other hosts would be left for all copies", self.plan(0)[0])


if __name__ == "__main__":
    unittest.main()
