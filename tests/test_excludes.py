"""What a source's line leaves out: `exclude` with the rules of gitignore, `exclude_caches`."""

import os
import random
import shutil
import subprocess
import unittest

import cbackup
from tests.harness import Case, make_tree, write_file

SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"


def left_out(patterns, path, directory=False):
    """Whether these patterns leave out a path, by itself or with a directory above it."""
    test = cbackup.compile_excludes(patterns)
    parts = path.split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts))]
    return any(test(name.encode(), True) for name in above) or test(path.encode(), directory)


class RulesTest(unittest.TestCase):
    """One example for each rule."""

    def check(self, patterns, out, kept):
        for paths, expected in ((out, True), (kept, False)):
            for path in paths:
                with self.subTest(patterns=patterns, path=path):
                    self.assertEqual(expected, left_out(patterns, path.rstrip("/"), path.endswith("/")))

    def test_a_pattern_without_a_slash_matches_a_name_anywhere(self):
        self.check(["cache"], ["cache", "a/cache", "a/cache/x"], ["caches", "a/my cache"])

    def test_a_leading_slash_anchors_at_the_root(self):
        self.check(["/cache"], ["cache", "cache/x"], ["a/cache", "a/cache/x"])

    def test_a_trailing_slash_means_directories_only(self):
        self.check(["build/"], ["build/", "a/build/", "a/build/x"], ["build", "a/build"])

    def test_a_slash_inside_anchors(self):
        self.check(["Library/Caches", "a/b/"], ["Library/Caches/x", "a/b/"], ["x/Library/Caches", "a/b", "c/a/b/"])

    def test_star_and_question_mark_stop_at_a_slash(self):
        self.check(["a/*.tmp", "b/?", "/p?q"], ["a/x.tmp", "b/c", "p-q"], ["a/b/x.tmp", "a.tmp", "b/cd", "p/q"])

    def test_two_stars_are_any_directories(self):
        self.check(["**/x/y", "a/**/b", "c/**"], ["x/y", "q/x/y", "a/b", "a/1/2/b", "c/d", "c/d/e"], ["x", "c", "a/1/bb"])

    def test_classes_and_escapes(self):
        self.check([r"[a-c]\*", "[!x]1", "[^x]2", "[[:digit:]]", "[]]"], ["b*", "y1", "y2", "7", "]"],
                   ["bb", "x1", "x2", "q"])

    def test_what_is_no_pattern_matches_nothing(self):
        self.check(["[a", "x\\", "/", "", "[[:wrong:]]"], [], ["[a", "a", "x", "x\\", "w"])

    def test_an_exclamation_mark_brings_back_unless_a_directory_above_is_left_out(self):
        self.check(["*.log", "!keep.log", "d", "!d/keep.log"], ["a.log", "d/keep.log"], ["keep.log", "e/keep.log"])

    def test_a_name_that_is_not_utf_8(self):
        self.assertTrue(cbackup.compile_excludes(["x?y"])(b"a/x\xffy", False))


@unittest.skipUnless(shutil.which("git"), "there is no git")
class AsGitTest(Case):
    """The same as `git check-ignore`, for some hundred made-up sets of patterns."""

    WORDS = ["a", "b", "ab", "ba", "*", "?", "**", "[ab]", "[!a]", "[^b]", "a*", "*b", "a?", "\\a", "\\*", "[a-b]b", "a*b", "***",
             "[]a]", "[a", "[[:alpha:]]", "[[:x:]]", "[b-a]", "*[ab]*", "[[:digit:]a]", "[\\]a]", "[a\\-b]", "[-a]"]
    TREE = {"a": 1, "b/a": 1, "b/b": 1, "ab/a": 1, "ab/b/a": 1, "ab/b/ab/b": 1, "ba/a/b": 1, "ba/ab/a/a": 1, "aa": 1,
            "bb/a*b": 1, "*": 1, "]": 1, "1/-": 1, "c/a/b/a": 1, "c/abb": 1, "c/b/ba/bb": 1}

    def pattern(self, luck):
        words = [luck.choice(self.WORDS) for _ in range(luck.choice((1, 1, 1, 2, 2, 3, 4)))]
        return luck.choice(("", "", "", "!")) + luck.choice(("", "", "/")) + "/".join(words) + luck.choice(("", "", "/"))

    def test_generated_patterns_and_paths(self):
        top, luck, sets = self.directory(), random.Random(5), {}
        for number in range(300):
            sets["s%d" % number] = [self.pattern(luck) for _ in range(luck.choice((1, 1, 2, 3)))]
        for name, patterns in sets.items():
            make_tree(os.path.join(top, name), dict(self.TREE, **{".gitignore": "\n".join(patterns).encode() + b"\n"}))
        env = dict(os.environ, GIT_CONFIG_GLOBAL="/dev/null", GIT_CONFIG_SYSTEM="/dev/null", HOME=top)
        subprocess.run(["git", "init", "-q", top], check=True, env=env)
        paths = []
        for name in sets:
            for above, folders, files in os.walk(os.path.join(top, name)):
                paths += [os.path.relpath(os.path.join(above, entry), top) for entry in folders + files]
        said = subprocess.run(["git", "check-ignore", "-z", "--stdin", "--no-index"], cwd=top, env=env, check=True,
                              input="\0".join(paths).encode(), stdout=subprocess.PIPE).stdout
        ignored, wrong = set(said.decode().split("\0")), []
        for path in paths:
            name, _, below = path.partition("/")
            if left_out(sets[name], below, os.path.isdir(os.path.join(top, path))) != (path in ignored):
                wrong.append((sets[name], below, path in ignored))
        self.assertGreater(len(ignored), 600)
        self.assertEqual([], wrong[:20])


class BackedUpTest(Case):
    """What is left out is in no backup; what was there before goes from there, unless it is most of
    everything."""

    @classmethod
    def setUpClass(cls):
        cls.c = c = cls.share_cluster("s", "a", replicas=1)
        cls.source = c.source("home", "s", {
            "cache/x": b"1", "data/cache/y": b"2", "build": b"3", "src/build/o": b"4", "thumbs/CACHEDIR.TAG": SIGNATURE.encode(),
            "thumbs/1/t": b"5", "thumbs/2": b"6", "wrong/CACHEDIR.TAG": b"Signature: none", "wrong/x": b"7"},
            exclude=["/cache", "build/"])
        cls.many = c.source("many", "s", {("keep/%d" if number < 5 else "cache/%d") % number: b"x" for number in range(25)})
        c.backup("b1", "a", "1M")
        c.start()
        c.settle()

    def kept(self, source):
        return {name for name, backups in self.c.copies_on_disk(source).items() if backups}

    def change_line(self, source, **options):
        self.c.sources[source].options.update(options)
        return self.c.client("a"), self.c.client("a")

    def test_anchored_and_directories_only(self):
        self.assertEqual({"data/cache/y", "build"}, self.kept("home") & {"cache/x", "data/cache/y", "build", "src/build/o"})

    def test_exclude_caches_keeps_the_directory_and_its_tag(self):
        self.assertIn("thumbs/1/t", self.kept("home"))
        text = self.c.config().replace("exclude=build/", "exclude=build/ exclude_caches")
        for host in self.c.hosts:
            write_file(os.path.join(self.c.home(host), "cbackup.conf"), text)
        self.c.client("a")
        try:
            self.assertEqual({"thumbs/CACHEDIR.TAG", "wrong/CACHEDIR.TAG", "wrong/x"},
                             {name for name in self.kept("home") if name.startswith(("thumbs", "wrong"))})
        finally:
            self.c._written = None

    def test_a_line_that_leaves_out_most_is_held_and_says_what_to_do(self):
        first, second = self.change_line("many", exclude="cache")
        for result in (first, second):
            self.assertRc(1, result)
            self.assertIn("20 are left out now by `exclude` on its line, 0 are gone", result.stderr)
            self.assertIn("accept many", result.stderr)
        self.assertEqual(25, len(self.kept("many")))
        self.assertRc(0, self.c.run("s", "accept", "many"))
        self.assertRc(0, self.c.client("a"))
        self.assertEqual(5, len(self.kept("many")))
        first, _ = self.change_line("many", exclude="*")
        self.assertIn("`exclude` on its line leaves out everything", first.stderr)
        self.change_line("many", exclude="cache")
        self.assertRc(0, self.c.client("a"))


class FileTest(Case):
    """Whether a single file is left out, as it is asked for by name."""

    def test_by_itself_with_a_directory_above_or_in_a_cache(self):
        top = self.directory()
        make_tree(top, {"c/CACHEDIR.TAG": SIGNATURE.encode(), "c/x": b"1", "d/x": b"1"})
        spec = cbackup.Source("s", "h", top, 1, exclude=("/e", "*.tmp"), exclude_caches=True)
        test = cbackup.LeftOut(spec)
        out = [b"e", b"e/f", b"a/b.tmp", b"c/x", b".cbackup-before-20260101T000000/x", b".cbackup-restore/files-b1/x"]
        given = out + [b"c/CACHEDIR.TAG", b"d/x", b"d/e"]
        self.assertEqual(given[len(out):], list(test.those_in(given)))


if __name__ == "__main__":
    unittest.main()
