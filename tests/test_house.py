"""The module reads from top to bottom: a section uses only what stands above it, and its lines can be read."""

import ast
import os
import re
import unittest

from tests.harness import TOP

def sections(text):
    """[(first line, title)] of the banners, in order."""
    return [(number, line.strip("# =")) for number, line in enumerate(text.splitlines(), 1) if line.startswith("# ==== ")]


def bound_in(node):
    """The names that something at the top of the module binds inside itself: they are its own, whatever else is called so."""
    stored = {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    arguments = {name.arg for name in ast.walk(node) if isinstance(name, ast.arg)}
    return (stored | arguments) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else arguments


class HouseTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        with open(os.path.join(TOP, "cbackup.py"), encoding="utf-8") as file:
            cls.text = file.read()
        cls.tree = ast.parse(cls.text)
        cls.banners = sections(cls.text)

    def section_of(self, line):
        return max((number, title) for number, title in self.banners + [(0, "0. head")] if number <= line)

    def defined(self):
        """{name at the top of the module: line}"""
        found = {}
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name] = node.lineno
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            found.setdefault(name.id, node.lineno)
        return found

    def test_a_section_uses_only_what_stands_above_it(self):
        defined, wrong = self.defined(), set()
        for node in self.tree.body:
            here = self.section_of(node.lineno)
            own = bound_in(node)
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and name.id in defined and name.id not in own:
                    there = self.section_of(defined[name.id])
                    if there > here:
                        wrong.add("%s uses %s of %s" % (here[1], name.id, there[1]))
        self.assertEqual(sorted(wrong), [])

    def test_the_sections_are_numbered_in_their_order(self):
        numbers = [int(re.match(r"(\d+)\.", title).group(1)) for _, title in self.banners]
        self.assertEqual(numbers, sorted(set(numbers)))


if __name__ == "__main__":
    unittest.main()
