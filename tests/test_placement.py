"""Copies find their place: with real clients in random orders, and, in one process, in more scenarios than could be tried so.

The seeds are printed when a test fails; CBACKUP_TEST_SEED=N tries the same orders again. All scenarios with many seeds:
`python3 -m tests.placement`, with real clients and servers `python3 -m tests.placement --real`.
"""

import os
import random
import unittest
from unittest import mock

from tests import placement, placement_real
from tests.harness import Case, one_in

SEED = int(os.environ.get("CBACKUP_TEST_SEED") or random.SystemRandom().randrange(10 ** 6))


@one_in(5)
class RealTest(unittest.TestCase):
    """Scenarios with real clients and servers in random orders, all with one outcome: every copy is made, with little
    waste, or else the room is used; no backup is ever over its size, and then nothing moves any more."""

    def assertComesToRest(self, name, waste=0.2):
        """In a feasible scenario: `waste` is the most that may be copied in vain, as a share of what was missing. With so few
        files a single one is several percent: `python3 -m tests.placement` measures waste."""
        outcome = placement_real.run(name, SEED, further=1)    # after a round in which nothing moved
        facts = "%s, seed %d: %s" % (name, SEED, vars(outcome))
        self.assertEqual((0, 0), (outcome.churn, round(outcome.useless, 3)), facts)
        if name in placement.IMPOSSIBLE:
            self.assertGreaterEqual(outcome.used, 0.97, facts)
        else:
            self.assertTrue(outcome.settled, facts)
            self.assertLessEqual(outcome.waste, waste, facts)

    def test_three_copies_on_two_large_and_two_small_hosts_without_slack(self):
        self.assertComesToRest("n3_exact", 0.2)

    def test_small_files_make_way_together_for_a_large_one(self):
        self.assertComesToRest("frag", 0.4)

    def test_two_backups_on_one_host_count_once(self):
        self.assertComesToRest("twoloc")

    def test_too_little_room_and_then_a_new_host(self):
        self.assertComesToRest("join")

    def test_a_backup_that_shrinks_is_relieved_of_what_it_cannot_keep(self):
        self.assertComesToRest("shrink")


class LostHostTest(Case):
    """Absence is counted in time that the server was up; what a lost host has is not forgotten."""

    def round(self, cluster, hosts):
        for host in random.Random(SEED).sample(hosts, len(hosts)):
            result = cluster.client(host)
            self.assertEqual([], [line for line in result.error_lines if "a on a was last heard of" not in line])
            self.assertRc(int(bool(result.error_lines)), result)

    def test_a_host_is_lost_after_a_while_and_its_copies_are_recognised_when_it_is_back(self):
        cluster = self.cluster(*"sabc")
        cluster.source("docs", "s", {"f%d" % number: 4000 for number in range(12)})
        for host in "abc":
            cluster.backup(host, host, 12 * 4000)
        cluster.start()
        cluster.settle("abc")
        cluster.stop("s")
        cluster.advance(20 * 86400)                     # the source's machine was off: that is no absence of others
        cluster.start("s")
        self.round(cluster, "bc")
        self.assertEqual(24, sum(map(len, cluster.copies_on_disk("docs").values())), "a restart made a host a lost one")
        had = [name for name, backups in cluster.copies_on_disk("docs").items() if "a" in backups]
        cluster.stop("a")
        for _ in range(2):
            cluster.advance(8 * 86400)                  # 16 days, the default is 14; b and c are heard of meanwhile
            self.round(cluster, "bc")
        there = cluster.copies_on_disk("docs")
        self.assertEqual([], [name for name in had if not {"b", "c"} <= set(there[name])], "seed %d" % SEED)
        cluster.start("a")
        back = cluster.client("a")
        self.assertRc(0, back)
        self.assertEqual((0, 0, 0), tuple(back.json[key] for key in ("copied_files", "wire_bytes", "dropped_files")))
        docs = cluster.status()["sources"]["docs"]
        self.assertEqual((len(had), 0), (docs["overserved_files"], docs["underserved_files"]))


@mock.patch.object(placement, "FILES", 120)
class SimulatedTest(Case):
    """The same decisions of server and client, with hundreds of files, in simulated time."""

    def test_scenarios_settle_without_churn(self):
        for name in self.todays(("trap", "unequal_exact", "multi3"), 1):
            with self.subTest(scenario=name, seed=SEED):
                outcome = placement.run(name, SEED, further=3)
                self.assertTrue(outcome.settled, vars(outcome))
                self.assertFalse(outcome.churn, vars(outcome))

    def test_too_little_room_is_used_and_nothing_churns(self):
        for name in ("infeasible50",):
            with self.subTest(scenario=name, seed=SEED):
                outcome = placement.run(name, SEED, further=3)
                self.assertGreaterEqual(outcome.used, 0.97, vars(outcome))
                self.assertFalse(outcome.churn, vars(outcome))


if __name__ == "__main__":
    unittest.main()
