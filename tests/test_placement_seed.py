"""The seed case: 10 files of equal size, three backups with room for exactly 7 each, 2 replicas.

Twenty copies must find their place in room for twenty-one. A client that simply copies what has the fewest copies
until it is full runs into dead ends here, in some orders of passes but not in others: so all orders are tried.
"""

import itertools
import time
import unittest

from tests.harness import PATIENCE, Case, one_in

FILES, SIZE, ROOM = 10, 20000, 7


@one_in(6, "test_clients_that_run_at_the_same_time")
class SeedTest(Case):
    """Whatever the order: every file twice, nothing over its size, at most one copy more than the twenty needed."""

    def seed(self):
        cluster = self.cluster("s", "a", "b", "c")
        cluster.source("docs", "s", {"file %d" % number: SIZE for number in range(FILES)})
        for host in "abc":
            cluster.backup("b" + host, host, str(ROOM * SIZE))
        cluster.start()
        return cluster

    def assertSettledWell(self, cluster, figures):
        self.assertCopies(cluster, "docs", 2)
        self.assertWithinSize(cluster)
        made = sum(one["copied_files"] for one in figures)
        self.assertLessEqual(2 * FILES, made)
        self.assertLessEqual(made, 2 * FILES + 1)
        self.assertLessEqual(sum(one["wire_bytes"] for one in figures), (2 * FILES + 1) * SIZE * 1.1 + 20000)
        check = cluster.run("s", "status", "--check")
        self.assertRc(0, check)

    def rounds(self, cluster, orders):
        """settle(), looking at the sizes after each pass."""
        figures = []
        for turn in range(8):
            passes = []
            for host in orders[turn % len(orders)]:
                result = cluster.client(host)
                self.assertRc(0, result)
                self.assertWithinSize(cluster)
                passes.append(result.json)
            figures += passes
            if all(one["settled"] for one in passes):
                return figures
        self.fail("not settled after 8 rounds of %s: %s" % (orders, cluster.copies_on_disk("docs")))

    def check_order(self, *orders):
        cluster = self.seed()
        self.assertSettledWell(cluster, self.rounds(cluster, orders))

    def test_passes_in_the_order_a_b_c(self):
        self.check_order("abc")

    def test_passes_in_the_order_a_c_b(self):
        self.check_order("acb")

    def test_passes_in_the_order_b_a_c(self):
        self.check_order("bac")

    def test_passes_in_the_order_b_c_a(self):
        self.check_order("bca")

    def test_passes_in_the_order_c_a_b(self):
        self.check_order("cab")

    def test_passes_in_the_order_c_b_a(self):
        self.check_order("cba")

    def test_another_order_in_each_round(self):
        self.check_order(*map("".join, itertools.permutations("abc")))

    def test_one_client_that_runs_far_more_often_than_the_others(self):
        self.check_order("aaaba", "aaac", "abc")

    def run_together(self, cluster, *arguments):
        """One client of each host at the same time, watching the sizes; returns the figures."""
        clients = [cluster.spawn(host, "client", "--json", *arguments) for host in "abc"]
        deadline = time.monotonic() + 60 * PATIENCE
        while any(not client.ends_within(0.005) for client in clients) and time.monotonic() < deadline:
            self.assertWithinSize(cluster)
        results = [client.wait(5) for client in clients]
        for result in results:
            self.assertRc(0, result)
            self.assertEqual(([], 0), (result.json["unreachable"], result.json["failed_files"]), str(result))
        return [result.json for result in results]

    def test_clients_that_run_at_the_same_time(self):
        for _ in self.todays(range(2), 1):
            cluster = self.seed()
            figures = []
            for _ in range(6):
                now = self.run_together(cluster)
                figures += now
                if all(one["settled"] for one in now):
                    break
            self.assertTrue(all(one["settled"] for one in now), now)
            self.assertSettledWell(cluster, figures)

    def test_clients_that_run_until_settled_at_the_same_time(self):
        cluster = self.seed()
        figures = self.run_together(cluster, "--until-settled")
        figures += self.rounds(cluster, ["cab"])
        self.assertSettledWell(cluster, figures)


class LastPieceTest(Case):
    """When there is less room than needed, all of it is used, nothing goes over it, and the passes come to rest."""

    def test_nineteen_places_for_twenty_copies(self):
        cluster = self.cluster("s", "a", "b", "c")
        cluster.source("docs", "s", {"file %d" % number: SIZE for number in range(FILES)})
        for host, room in zip("abc", (7, 7, 5)):
            cluster.backup("b" + host, host, str(room * SIZE + SIZE // 2))
        cluster.start()
        figures = []
        for _ in range(4):
            figures.append([cluster.client(host).json for host in "abc"])
            self.assertWithinSize(cluster)
        self.assertEqual(19, sum(len(backups) for backups in cluster.copies_on_disk("docs").values()))
        self.assertTrue(all(cluster.copies_on_disk("docs").values()), "some file has no copy at all")
        self.assertEqual(0, sum(one["copied_files"] + one["dropped_files"] for one in figures[-1]), "churn")
        self.assertFalse(any(one["settled"] for one in figures[-1]))
        docs = cluster.status()["sources"]["docs"]
        self.assertEqual((1, SIZE), (docs["underserved_files"], docs["underserved_bytes"]))


if __name__ == "__main__":
    unittest.main()
