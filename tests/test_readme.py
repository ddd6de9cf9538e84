"""README.md and cbackup.conf.example are true where a test can tell: commands can be said, configurations are right, what is quoted
exists, links lead somewhere."""

import argparse
import ast
import contextlib
import errno
import io
import os
import re
import shlex
import unittest

import cbackup
from tests.harness import CLIENT_KEYS, TOP

HOUR, DAY = 3600, 86400

FILLED_IN = {"KIND": "systemd", "SHELL": "bash", "COMMAND": "status", "NAME": "pi", "SOURCE": "photos", "PATH": "2026/11",
             "FILE": "page.html", "TIME": "3d", "PATTERN": "*.jpg", "HOST": "mini", "TOKEN": "x" * 60, "ADDR:PORT": "127.0.0.1:5080",
             "DIR": "/tmp", "[:PORT]": ":5005"}
"""What a reader writes for words in capitals."""

THEIRS = {"--deps", "--real"}
"""Options of build_zipapp.sh and of tests that README names."""


def read(name):
    with open(os.path.join(TOP, name), encoding="utf-8") as file:
        return file.read()


def messages_of(text):
    """The strings in a module, docstrings apart, with a NUL for each place where something is put in."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Expr, ast.Constant))]
    described = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [re.sub(r"%[-#0 +]*[\d*]*(\.[\d*]+)?[sdrfgxo]", "\0", node.value) for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described]


class ReadmeTest(unittest.TestCase):

    maxDiff = 4000

    @classmethod
    def setUpClass(cls):
        cls.text = read("README.md")
        cls.blocks = re.findall(r"^```(\w*)\n(.*?)^```", cls.text, re.M | re.S)
        cls.prose = re.sub(r"^```.*?^```", "", cls.text, flags=re.M | re.S)
        cls.spans = [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", cls.prose)]
        cls.parser = cbackup.build_parser()
        cls.commands = next(action for action in cls.parser._actions if isinstance(action, argparse._SubParsersAction)).choices
        system = [os.strerror(number) for number in (errno.EPERM, errno.ENOENT, errno.ECONNREFUSED)]
        cls.messages = "\n".join(messages_of(read("cbackup.py")) + system)

    def rows_of(self, heading):
        """The cells of the tables below a heading, row by row."""
        section = re.search(r"^#+ %s\n(.*?)(?=^#|\Z)" % re.escape(heading), self.prose, re.M | re.S).group(1)
        found = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in section.splitlines() if line.startswith("|")]
        self.assertTrue(found, "no table below %s" % heading)
        return [row for row in found if set(row[0]) - set("-: ")]

    # -- commands

    def assertParses(self, words, line):
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
                args = self.parser.parse_args(words)
        except (SystemExit, cbackup.CBackupError) as error:
            if error.args != (0,):      # --version, --help
                self.fail("%s: %s %s" % (line, error, complaint.getvalue()))
            return
        self.assertTrue(args.command, line)

    @staticmethod
    def commands_in(line):
        """The words behind each `cbackup.pyz` in a line for a shell, up to the end of that command."""
        for part in re.split(r"\bcbackup\.py(?:z\b|\b(?=\s))", line)[1:]:
            lexer = shlex.shlex(part.replace("$", "x").replace("(", " ").replace("`", " "), posix=True, punctuation_chars=True)
            lexer.whitespace_split, words = True, []
            with contextlib.suppress(ValueError):       # a quote that ends behind the command
                for word in lexer:
                    if re.match(r"[;&|<>)]|2\Z", word) or word == "...":
                        break
                    words.append(word)
            yield words

    def test_every_command_in_a_block_can_be_said(self):
        count = 0
        for _, block in self.blocks:
            for line in block.splitlines():
                for words in self.commands_in(line):
                    if words and words[0] != "imac:":       # scp
                        self.assertParses(words, line)
                        count += 1
        self.assertGreater(count, 25)

    def test_every_command_in_the_text_can_be_said(self):
        count = 0
        for span in self.spans:
            if re.match(r"(sudo )?(python3 )?cbackup\.pyz? \w", span):
                for words in self.commands_in(span):
                    self.assertParses([FILLED_IN.get(word, word) for word in words], span)
                    count += 1
        self.assertGreater(count, 8)

    def test_every_line_of_the_table_of_commands_can_be_said_with_and_without_what_is_in_brackets(self):
        named = set()
        for cell, _ in self.rows_of("Commands"):
            for span in re.findall(r"`([^`]+)`", cell):
                if span.split()[0] not in self.commands:
                    continue
                named.add(span.split()[0])
                for line in (re.sub(r"\s*\[[^]]*\]", "", span), re.sub(r"[][]|\.\.\.", " ", span.replace("[:PORT]", ""))):
                    self.assertParses([FILLED_IN.get(word, word) for word in line.split()], span)
        hidden = {name for name in self.commands if name.startswith("_")}
        self.assertEqual(set(self.commands) - hidden, named)

    def test_every_option_that_is_named_exists(self):
        ours = {option for parser in [self.parser] + list(self.commands.values()) for action in parser._actions
                for option in action.option_strings}
        named = {option for span in self.spans for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)
                 if not re.search(r"python3 -m|rsync|^git ", span)}
        self.assertEqual(set(), named - ours - THEIRS)

    # -- configurations

    def test_every_configuration_is_right(self):
        whole = [block for _, block in self.blocks if re.search(r"^\[cluster\]$", block, re.M)]
        self.assertTrue(whole)
        for text in whole + [read("cbackup.conf.example"), cbackup.CONFIG_TEMPLATE]:
            config = cbackup.parse_config(text)
            self.assertTrue(config.name)

    def test_the_example_file_is_also_right_with_everything_that_it_has_commented_out(self):
        text = re.sub(r"^#(?=[a-z_]\w* +=|rpi2)", "", read("cbackup.conf.example"), flags=re.M)
        self.assertIn("\nbwlimit ", text)
        config = cbackup.parse_config(text)
        plain = cbackup.parse_config(read("cbackup.conf.example"))
        for key in ("port", "scan", "scan_min", "scrub", "warn_after", "alert_after", "lost_after"):
            self.assertEqual(getattr(plain, key), getattr(config, key), "the default of %s is another" % key)

    def test_the_defaults_are_those_of_the_program(self):
        rows = [row for row in self.rows_of("`[cluster]`") if row[0].startswith("`")]
        whole = "[cluster]\n%s\n[hosts]\na = 1.1.1.1\n[sources]\ns = a:/s\n[backups]\nb = b.local:/b size=1G\n"
        with_none = cbackup.parse_config(whole % "")
        for key, default, _ in rows:
            key, value = key.strip("`"), default.strip("`")
            lines = "" if value == "no limit" else "%s = %s" % (key, value)
            self.assertEqual(getattr(cbackup.parse_config(whole % lines), key), getattr(with_none, key), key)
        self.assertEqual(set(cbackup.CLUSTER_KEYS), {row[0].strip("`") for row in rows})

    def test_the_limits_and_defaults_in_the_text_are_those_of_the_program(self):
        config = cbackup.parse_config("[cluster]\n[hosts]\n[sources]\n[backups]\n")
        text = " ".join(self.prose.split())
        for sentence, value in (
                ("`replicas = %d` means two hosts besides the file's own", config.replicas),
                ("stays %d days (`keep`)", config.keep / DAY),
                ("the others wait %d days, `lost_after`", config.lost_after / DAY),
                ("something has been wrong for %s day (`alert_after`)", config.alert_after / DAY),
                ("and then once %s day while it lasts", cbackup.ALERT_AGAIN / DAY),
                ("It has %s minute.", cbackup.ALERT_SECONDS / 60),
                ("tries it again after %sn hour", cbackup.ALERT_RETRY / HOUR),
                ("one TCP port, %d unless configured otherwise", config.port),
                ("cannot listen on port %d: ...", config.port),
                ("by default on `127.0.0.1:%d`", cbackup.WEB_PORT),
                ("`web --listen 0.0.0.0:%d` shows it", cbackup.WEB_PORT),
                ("a token that is good once and for %sn hour", cbackup.INVITATION_SECONDS / HOUR),
                ("a token that works once and for %s hour", cbackup.INVITATION_SECONDS / HOUR),
                ("or older than %sn hour`", cbackup.INVITATION_SECONDS / HOUR),
                ("%s wrong tries end it for the address", cbackup.INVITATION_TRIES),
                ("%s wrong tokens close it for the address", cbackup.INVITATION_TRIES),
                ("has more than %d seconds", cbackup.STRANGER_TIME),
                ("more than half of its files (of at least %d)", cbackup.HELD_SHARE_OF),
                ("more than half of at least %d of either", cbackup.HELD_LINES),
                ("it is more than %d minutes away from the servers'", cbackup.CLOCK_SLACK / 60),
                ("at most %d KiB for each file", cbackup.XATTRS_LIMIT / 1024)):
            with self.subTest(sentence):
                forms = [str(int(value))] if "%d" in sentence else {1: ["a", "one"], 5: ["five"]}[value]
                self.assertEqual(value, int(value))
                self.assertTrue([form for form in forms if sentence.replace("%d", "%s") % form in text])

    def test_the_units_mean_what_is_said(self):
        means = {row[0]: row[1] for row in self.rows_of("Configuration") if len(row) == 3}
        sizes, durations = means["sizes and rates"], means["durations"]
        self.assertEqual([100, 512 << 20, 3 << 39], [cbackup.parse_size(word) for word in re.findall(r"`([^`]+)`", sizes)])
        self.assertEqual([90, 15 * 60, 6 * HOUR, 30 * DAY, 14 * DAY],
                         [cbackup.parse_duration(word) for word in re.findall(r"`([^`]+)`", durations)])

    def test_the_client_starts_as_often_as_is_said(self):
        self.assertIn("the client every quarter of an hour", self.text)
        units = "".join(cbackup.CLIENT_UNITS.values())
        for text in ("OnCalendar=*:0/15\n", "<integer>%d</integer>" % (15 * 60)):
            self.assertIn(text, units)

    def test_the_keys_of_sources_and_backups_are_those_of_the_program(self):
        for heading, known in (("`[sources]`", cbackup.SOURCE_KEYS), ("`[backups]`", cbackup.BACKUP_KEYS)):
            named = {span.partition("=")[0] for row in self.rows_of(heading) if row[0].startswith("`") and len(row) == 2
                     for span in re.findall(r"`([^`]+)`", row[0]) if re.match(r"[a-z_]+(=|\Z)", span)}
            self.assertEqual(set(), set(known) - named, heading)

    # -- what it quotes

    def assertSaid(self, quoted):
        """Each part of a message that is the same in all cases is in one of the program's; of each part, some words in a row may
        be what is put in there."""
        for part in re.split(r"\S*/\S+|cluster\.pem|\.\.\.|\b[A-Z]{4,}\b|'x'|\bX\b|[(){}]", quoted):
            words = part.strip(" :").split()
            if len(part.strip(" :")) > 3:
                runs = [(first, last) for first in range(len(words)) for last in range(first, len(words) + 1)
                        if last - first <= min(len(words) - 1, max(1, len(words) - 3))]
                forms = [" ".join(words[:first] + ["\0"] * (last > first) + words[last:]) for first, last in runs]
                self.assertTrue([form for form in forms if form in self.messages], "%r, of %r" % (part, quoted))

    def test_the_messages_for_which_there_is_help_are_said(self):
        count = 0
        for cell, _ in self.rows_of("Troubleshooting"):
            for quoted in re.findall(r"`([^`]+)`", cell):
                with self.subTest(quoted):
                    self.assertSaid(quoted)
                count += 1
        self.assertGreater(count, 30)

    def test_what_commands_print_when_they_are_ready_is_printed(self):
        for quoted in ("cbackup server", "cbackup web"):
            span, = {span for span in self.spans if span.startswith(quoted)}
            self.assertSaid(re.sub(r"http://|ADDR:PORT|NAME", "...", span))

    def test_the_words_of_the_shown_status_are_those_of_status(self):
        block, = [block for _, block in self.blocks if "NOT SAFE YET" in block]
        shown = re.sub(r"\([^)]*:/[^)]*\)|[\w./]*\.NEF|^\w+", "\n", block, flags=re.M)
        shown = re.sub(r"[\d.,]+ ([KMGT]?B\b|(s|min) ago)|\d", "\n", shown)
        found = re.findall(r"[A-Za-z]{2,}(?: [A-Za-z]{2,})*", shown)
        self.assertGreater(len(found), 12)
        self.assertEqual([], [words for words in found if words not in self.messages])

    def test_the_figures_of_a_pass_are_those_that_it_prints(self):
        named = {key for row in self.rows_of("`client --json`") for key in re.findall(r"`([^`]+)`", row[0])}
        self.assertEqual(CLIENT_KEYS, named)
        self.assertEqual(CLIENT_KEYS, set(cbackup.Figures().as_json()))

    def test_the_exit_codes_are_the_programs(self):
        rows = [row[0] for row in self.rows_of("Commands") if row[0].isdigit()]
        self.assertEqual([cbackup.EXIT_DONE, cbackup.EXIT_INCOMPLETE, cbackup.EXIT_USAGE, cbackup.EXIT_INTERRUPTED],
                         list(map(int, rows)))

    # -- links

    def test_links_lead_somewhere(self):
        headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
                    for line in re.findall(r"^#+ (.*)$", self.prose, re.M)}
        for target in re.findall(r"\]\(([^)\s]+)\)", self.prose):
            if target.startswith("#"):
                self.assertIn(target[1:], headings)
            elif "://" not in target:
                self.assertTrue(os.path.exists(os.path.join(TOP, target)), target)


if __name__ == "__main__":
    unittest.main()
