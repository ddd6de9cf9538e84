"""The program, from its compiled form: what `python3 -m cbackup` does, at a fifth of the cost."""

import sys

import cbackup

sys.exit(cbackup.main())
