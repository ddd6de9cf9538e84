"""The module reads from top to bottom: a section uses only what stands above it, and its lines can be read."""

import ast
import bisect
import functools
import os
import re
import unittest

from tests.harness import TOP

LINES, METHODS = 520, 35        # of one class
COLUMNS, LONGER = 100, 23       # of a line; some are of other languages: styles of the page, service files


def sections(text):
    """[(first line, title)] of the banners, in order."""
    return [(number, line.strip("# =")) for number, line in enumerate(text.splitlines(), 1) if line.startswith("# ==== ")]


@functools.lru_cache(None)      # it is asked for again and again
def walk(node):
    return list(ast.walk(node))


def bound_in(node):
    """The names that something at the top of the module binds inside itself: they are its own, whatever else is called so."""
    stored = {name.id for name in walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    arguments = {name.arg for name in walk(node) if isinstance(name, ast.arg)}
    return (stored | arguments) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else arguments


class HouseTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        with open(os.path.join(TOP, "cbackup.py"), encoding="utf-8") as file:
            cls.text = file.read()
        cls.tree = ast.parse(cls.text)
        cls.banners = [(0, "0. head")] + sections(cls.text)

    def section_of(self, line):
        return self.banners[bisect.bisect(self.banners, (line + 1,)) - 1]

    def defined(self):
        """{name at the top of the module: line}"""
        found = {}
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name] = node.lineno
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for name in walk(target):
                        if isinstance(name, ast.Name):
                            found.setdefault(name.id, node.lineno)
        return found

    def test_a_section_uses_only_what_stands_above_it(self):
        defined, wrong = self.defined(), set()
        for node in self.tree.body:
            here = self.section_of(node.lineno)
            own = bound_in(node)
            for name in walk(node):
                if isinstance(name, ast.Name) and name.id in defined and name.id not in own:
                    there = self.section_of(defined[name.id])
                    if there > here:
                        wrong.add("%s uses %s of %s" % (here[1], name.id, there[1]))
        self.assertEqual(sorted(wrong), [])

    def rooms(self):
        """{class: [itself, the class that it is built on, ...]} of the module's own."""
        classes = {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}

        def chain(node):
            bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
            return [node] + (chain(classes[bases[0]]) if bases else [])
        return {name: chain(node) for name, node in classes.items()}

    @staticmethod
    @functools.lru_cache(None)
    def names_of(node):
        """What an instance of a class has by it: methods, constants, and what it enters into itself."""
        found = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        found |= {name.id for part in node.body if isinstance(part, (ast.Assign, ast.AnnAssign))
                  for name in walk(part) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
        return found | {part.attr for part in walk(node) if isinstance(part, ast.Attribute)
                        and isinstance(part.ctx, ast.Store) and isinstance(part.value, ast.Name) and part.value.id == "self"}

    def test_a_room_knows_nothing_of_those_that_are_built_on_it(self):
        rooms, wrong, built_on = self.rooms(), set(), {}
        for chain in rooms.values():
            for below in chain[1:]:
                built_on.setdefault(below.name, set()).update(self.names_of(chain[0]))
        for name, chain in rooms.items():
            own = set().union(*map(self.names_of, chain))
            wrong |= {"%s uses %s" % (name, part.attr) for part in walk(chain[0]) if isinstance(part, ast.Attribute)
                      and isinstance(part.value, ast.Name) and part.value.id == "self"
                      and part.attr in built_on.get(name, set()) - own}
        self.assertEqual(sorted(wrong), [])

    def test_no_room_is_a_hall(self):
        large = {}
        for name, (node, *_) in self.rooms().items():
            methods = sum(isinstance(part, ast.FunctionDef) for part in node.body)
            if node.end_lineno - node.lineno + 1 > LINES or methods > METHODS:
                large[name] = (node.end_lineno - node.lineno + 1, methods)
        self.assertEqual(large, {})

    def test_lines_can_be_read(self):
        self.assertLessEqual(sum(len(line) > COLUMNS for line in self.text.splitlines()), LONGER)

    def test_placement_writes_nothing(self):
        node = self.rooms()["Placement"][0]
        words = [part.value for part in walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        self.assertEqual([], [word for word in words if re.match(r"\s*(INSERT|UPDATE|DELETE|REPLACE)\b", word)])
        self.assertNotIn("write", {part.attr for part in walk(node) if isinstance(part, ast.Attribute)})

    def test_the_sections_are_numbered_in_their_order(self):
        numbers = [int(re.match(r"(\d+)\.", title).group(1)) for _, title in self.banners[1:]]
        self.assertEqual(numbers, sorted(set(numbers)))


if __name__ == "__main__":
    unittest.main()
