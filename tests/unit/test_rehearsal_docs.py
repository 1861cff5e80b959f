"""The faults that `docs/rehearsal.md` names are faults of the simulator."""

from __future__ import annotations

import json
import re
from pathlib import Path

from include.simulator.faults import RULES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rehearsal.md").read_text(encoding="utf-8")
RULE = re.compile(r'\{"fault": [^}]+\}')


def test_every_fault_of_the_page_is_accepted() -> None:
    """Whoever copies a line of the table gets no error."""
    rules = [json.loads(rule) for rule in RULE.findall(PAGE)]

    assert len(rules) > 5
    assert len(RULES.validate_python(rules)) == len(rules)
