"""Write `reviews.csv.gz`: invented product reviews from the texts in `review_texts.yaml`.

Run `python -m include.sample_data.make_reviews` from the project's root. The seed is fixed, so the
content is always the same; change a text and run it again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from include.sample_data.make_tickets import as_csv, write_packed

FOLDER = Path(__file__).parent
REVIEWS = FOLDER / "reviews.csv.gz"
SEED = 20261102
FIRST_DAY = datetime(2026, 11, 1, tzinfo=UTC)
FIRST_NUMBER = 5_001
DAYS = 14
PER_DAY = range(30, 51)
MOODS = {"good": 48, "plain": 24, "bad": 22, "abusive": 6}


@dataclass(frozen=True)
class Review:
    """One row of the file; the field names are its header."""

    review_id: str
    written_at: str
    product: str
    title: str
    body: str


def make_reviews() -> Iterator[Review]:
    """All reviews, oldest first, numbered from `FIRST_NUMBER`."""
    dice = random.Random(SEED)  # noqa: S311 - repeatable, not secret
    texts = yaml.safe_load((FOLDER / "review_texts.yaml").read_text(encoding="utf-8"))
    for number, moment in enumerate(_moments(dice), FIRST_NUMBER):
        yield _review(dice, texts, number, moment)


def write_reviews(path: Path) -> None:
    """Write the gzip-compressed file, without a name or a time in its header."""
    write_packed(path, as_csv(make_reviews(), Review))


def _moments(dice: random.Random) -> Iterator[datetime]:
    for day in range(DAYS):
        seconds = sorted(dice.randrange(86_400) for _ in range(dice.choice(PER_DAY)))
        yield from (FIRST_DAY + timedelta(days=day, seconds=one) for one in seconds)


def _review(dice: random.Random, texts: dict[str, Any], number: int, moment: datetime) -> Review:
    (mood,) = dice.choices(list(MOODS), list(MOODS.values()))
    title, body = dice.choice(texts[mood])
    values = {name: dice.choice(options) for name, options in texts["slots"].items()}
    values["product"] = dice.choice(texts["products"])
    return Review(
        review_id=f"R-{number}",
        written_at=moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        product=values["product"],
        title=title.format(**values),
        body=_sentence(body.format(**values)),
    )


def _sentence(text: str) -> str:
    """A slot may stand at the beginning."""
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    write_reviews(REVIEWS)
