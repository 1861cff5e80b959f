"""What Airflow shows about a job."""

from __future__ import annotations

from pathlib import Path

from include.job_documentation import LONGEST, documentation
from include.job_spec import JOBS_ROOT, load_job, with_overrides

JOB = load_job("ticket_triage", JOBS_ROOT)


def test_it_says_what_where_and_for_how_much(tmp_path: Path) -> None:
    """Description, source, target, digests, and the price of this model in batches."""
    text = documentation(JOB, tmp_path)

    for part in (
        JOB.description,
        "`source_db`, key `ticket_id`",
        "`ticket_labels` and `ticket_labels_failures` on `results_db`",
        "$0.125 for a million tokens in, $1.000 out (batch, as of 2026-11-20); about $0.1",
        "for 1,000 rows",
        "prompt `prompt.md` digest `",
        f"spec digest `{JOB.digest[:12]}`",
    ):
        assert part in text


def test_an_unknown_price_is_unknown(tmp_path: Path) -> None:
    """A model without a price shows no figure, and what to do."""
    text = documentation(with_overrides(JOB, model="own-model"), tmp_path)

    assert "price: unknown for `own-model`; add it to a price file" in text


def test_the_price_is_that_of_the_model_that_is_paid(tmp_path: Path) -> None:
    """A deployment has the price, and its day, of the model behind it."""
    request = JOB.request.model_copy(update={"model": "our-own", "priced_as": "gpt-5-nano"})

    text = documentation(JOB.model_copy(update={"request": request}), tmp_path)

    assert "$0.200 out (batch, as of 2026-11-20)" in text


def test_another_prompt_has_another_digest(tmp_path: Path) -> None:
    """Who compares two days sees that the prompt was changed."""
    request = JOB.request.model_copy(update={"prompt": "Other. {{ subject }}"})
    other = JOB.model_copy(update={"request": request})

    assert (
        documentation(JOB, tmp_path).splitlines()[-1]
        != (documentation(other, tmp_path).splitlines()[-1])
    )


def test_the_readme_of_the_folder_is_shown(tmp_path: Path) -> None:
    """README.md follows, as much of it as a page can bear."""
    folder = tmp_path / JOB.name
    folder.mkdir()
    (folder / "README.md").write_text("Ask *Ana* about it. " + "x" * LONGEST)

    text = documentation(JOB, tmp_path)

    assert "\n\nAsk *Ana* about it." in text
    assert len(text) < LONGEST + 2_000
