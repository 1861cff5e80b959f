"""Write `tickets.csv.gz`: 2,000 invented support tickets from the texts in `ticket_texts.yaml`.

Run `python -m include.sample_data.make_tickets` from the project's root. The seed is fixed, so the
content is always the same; change a text and run it again.
"""

from __future__ import annotations

import csv
import gzip
import io
import random
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
TICKETS = FOLDER / "tickets.csv.gz"
SEED = 20261101
FIRST_DAY = datetime(2026, 11, 1, tzinfo=UTC)  # a Sunday
FIRST_NUMBER = 100_001

# Tickets per day: quiet weekends, busy Mondays.
VOLUME = (62, 197, 181, 176, 172, 158, 66, 58, 193, 184, 175, 167, 152, 59)

LANGUAGES = {"en": 80, "de": 7, "fr": 5, "es": 5, "ja": 3}
CATEGORIES = {
    "bug": 31,
    "billing": 22,
    "how_to": 18,
    "account": 15,
    "feature_request": 9,
    "other": 5,
}
CHANNELS = {"email": 46, "web": 27, "chat": 21, "phone": 6}
TIERS = {"free": 45, "pro": 40, "enterprise": 15}
# Share of tickets by hour (UTC): offices in Europe first, then in America.
HOURS = (1, 1, 1, 1, 2, 3, 6, 12, 18, 20, 18, 15, 13, 16, 18, 17, 14, 11, 8, 6, 5, 4, 3, 2)


@dataclass(frozen=True)
class Ticket:
    """One row of the file; the field names are its header."""

    ticket_id: str
    created_at: str
    channel: str
    customer_tier: str
    subject: str
    body: str


def make_tickets() -> Iterator[Ticket]:
    """All tickets, oldest first, numbered from `FIRST_NUMBER`."""
    dice = random.Random(SEED)  # noqa: S311 - repeatable, not secret
    texts = yaml.safe_load((FOLDER / "ticket_texts.yaml").read_text(encoding="utf-8"))
    for number, moment in enumerate(_moments(dice), FIRST_NUMBER):
        yield _ticket(dice, texts, number, moment)


def as_csv(rows: Iterable[Any], kind: type[Any] = Ticket) -> bytes:
    """Rows of the dataclass `kind` as CSV: header, UTF-8, lines end with a single line feed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(kind))
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue().encode()


def write_packed(path: Path, content: bytes) -> None:
    """Write a gzip-compressed file, without a name or a time in its header."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write(content)


def write_tickets(path: Path) -> None:
    """Write the file of the tickets."""
    write_packed(path, as_csv(make_tickets()))


def _moments(dice: random.Random) -> Iterator[datetime]:
    for day, volume in enumerate(VOLUME):
        start = FIRST_DAY + timedelta(days=day)
        hours = dice.choices(range(24), HOURS, k=volume)
        offsets = sorted(hour * 3600 + dice.randrange(3600) for hour in hours)
        yield from (start + timedelta(seconds=offset) for offset in offsets)


def _ticket(dice: random.Random, texts: dict[str, Any], number: int, moment: datetime) -> Ticket:
    language = _pick(dice, LANGUAGES)
    subject, body = dice.choice(texts[language][_pick(dice, CATEGORIES)])
    values = _values(dice, texts["slots"], number, moment)
    channel = _pick(dice, CHANNELS)
    return Ticket(
        ticket_id=f"T-{number}",
        created_at=moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        channel=channel,
        customer_tier=_pick(dice, TIERS),
        subject=subject.format(**values),
        body=_letter(dice, texts, language, channel, body).format(**values),
    )


def _letter(
    dice: random.Random, texts: dict[str, Any], language: str, channel: str, body: str
) -> str:
    """Chats are short; letters get a greeting, some details and an end."""
    details = dice.sample(texts["details"][language], dice.choice((0, 0, 1, 1, 2)))
    if channel == "chat":
        return body
    text = "\n\n".join([body, *details]) if dice.random() < 0.5 else " ".join([body, *details])
    opener: str = dice.choice(texts["openers"][language])
    closer: str = dice.choice(texts["closers"][language])
    return f"{opener}{text}{closer}"


def _values(
    dice: random.Random, slots: dict[str, list[str]], number: int, moment: datetime
) -> dict[str, Any]:
    amount = dice.randrange(1900, 94000)
    recently = moment - timedelta(days=dice.randrange(1, 21))
    soon = moment + timedelta(days=dice.randrange(1, 15))
    style = dice.choice(("%Y-%m-%d", "%d.%m.%Y", "%d/%m/%Y"))
    return {
        **{name: dice.choice(options) for name, options in slots.items()},
        "amount": f"{amount / 100:.2f}",
        "amount_low": f"{amount / 125:.2f}",
        "invoice": f"INV-2026-{dice.randrange(1000, 9999)}",
        "date": recently.strftime(style),
        "soon": soon.strftime(style),
        "minute": f"{dice.randrange(60):02d}",
        "n": dice.randrange(2, 96),
        "digit": dice.randrange(10),
        "hex": f"{dice.getrandbits(48):012x}",
        "hex2": f"{dice.getrandbits(48):012x}",
        "earlier": number - dice.randrange(300, 9000),
    }


def _pick(dice: random.Random, weights: dict[str, int]) -> str:
    return dice.choices(list(weights), list(weights.values()))[0]


if __name__ == "__main__":
    write_tickets(TICKETS)
