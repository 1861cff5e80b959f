"""How a run chooses its rows: the mode that the ledger keeps with it."""

from __future__ import annotations

NORMAL = "normal"  #: rows that are loaded or have failed for good are left out
REDRIVE = "redrive"  #: only rows that are loaded are left out: the failed ones go again
FORCE = "force"  #: nothing is left out
MODES = (NORMAL, REDRIVE, FORCE)
OWN_FILE = "file"  #: no rows, but a request file of its own (`standalone`); nothing closes it
