"""What the configuration, which any member can change, may do to a machine: `paths` in its home says where."""

import os
import unittest

from tests.harness import Case, wait_for, write_file


class PathsTest(Case):
    """Sources on s, a backup on a; the configuration is changed on b."""

    def setUp(self):
        self.c = c = self.cluster("s", "a", "b", replicas=1)
        c.source("docs", "s", {"f": b"1"})
        c.backup("ba", "a", "10M")
        c.write_config()

    def allow(self, host, *directories):
        write_file(os.path.join(self.c.home(host), "paths"), "".join("%s\n" % each for each in directories))

    def test_a_backup_outside_is_not_written_to(self):
        self.allow("a", "# mine", self.directory())
        self.c.start("s")
        result = self.c.client("a")
        self.assertRc(1, result)
        self.assertOneError(result, "paths", self.c.backups["ba"].path)
        self.assertEqual([], os.listdir(self.c.backups["ba"].path) if os.path.isdir(self.c.backups["ba"].path) else [])
        self.allow("a", os.path.dirname(self.c.backups["ba"].path))
        self.assertRc(0, self.c.client("a"))

    def test_a_symlink_does_not_lead_out(self):
        inside = self.directory()
        os.symlink(os.path.dirname(self.c.backups["ba"].path), os.path.join(inside, "link"))
        self.c.backups["ba"] = self.c.backups["ba"]._replace(path=os.path.join(
            inside, "link", os.path.basename(self.c.backups["ba"].path)))
        self.allow("a", inside)
        self.c.write_config()
        self.c.start("s")
        self.assertRc(1, self.c.client("a"))

    def test_a_source_outside_is_held_and_not_served(self):
        self.allow("s", self.directory())
        self.c.start("s", "a")
        result = self.c.client("a")
        self.assertRc(1, result)
        self.assertIn("paths", result.stderr)
        self.assertEqual({"f": []}, self.c.copies_on_disk("docs"))
        status = self.c.run("a", "status")
        self.assertIn("HELD", status.stdout)
        self.assertIn("paths", status.stdout)

    def test_a_changed_line_about_this_host_is_said_once_by_each(self):
        self.c.start("s", "a")
        self.c.settle()
        self.c.run("a", "status")
        text = self.c.config().replace("size=10M", "size=11M")
        self.assertIn("size=11M", text)
        write_file(os.path.join(self.c.home("b"), "cbackup.conf"), text)
        self.assertRc(0, self.c.run("b", "client"))             # it has no backup; the configuration goes around
        said = self.c.run("a", "client")
        self.assertIn("backup ba is now", said.stderr)
        self.assertIn("size=11M", said.stderr)
        self.assertNotIn("is now", self.c.run("a", "client").stderr)
        self.assertIn("is now", self.c.run("a", "status").stdout)
        self.assertNotIn("is now", self.c.run("a", "status").stdout)
        server = self.c.servers["a"]
        wait_for(lambda: "backup ba is now" in server.stderr, 20, "the server says nothing of it")
        self.assertEqual(1, server.stderr.count("backup ba is now"))


if __name__ == "__main__":
    unittest.main()
