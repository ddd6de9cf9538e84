"""The program, from its compiled form: what `python3 -m cbackup` does, at a fifth of the cost. What $CBACKUP_TEST_BEFORE
says is done to the module first."""

import os
import sys

import cbackup

exec(os.environ.pop("CBACKUP_TEST_BEFORE", ""), {"cbackup": cbackup})
sys.exit(cbackup.main())
