"""Tells people about a run through Airflow's notifiers: each alert once for each of them.

A notifier's fields may use `{{ alert.subject }}`, `{{ alert.text }}`, `{{ alert.html }}` and every
other field of `include.alerts.Alert`. A notifier that was given no subject or text gets ours.
No trouble with telling ever fails a task: it is logged, and the alert is told by the next one.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow.sdk import conf
from airflow.sdk.module_loading import import_string  # type: ignore[attr-defined]

from include.errors import ConfigurationError
from llm_batch import connections, metrics

if TYPE_CHECKING:
    from airflow.sdk import BaseNotifier, Context

    from include.alert_record import AlertRecord
    from include.alerts import Alert

LOG = "log"  #: the channel that everybody has
PATIENCE = 60.0  # seconds for one notifier; a mail server that hangs must not hold a run up
# What notifiers call their message; filled when the one who made the notifier left it empty.
USUAL_FIELDS = {
    "subject": "{{ alert.subject }}",
    "html_content": "{{ alert.html }}",
    "text": "{{ alert.text }}",
    "message": "{{ alert.text }}",
}

log = logging.getLogger(__name__)


def tell(alerts: Iterable[Alert], context: Context, notifiers: Sequence[BaseNotifier] = ()) -> None:
    """Tell `notifiers`, those of `[llm_batch] notifiers` and the log about `alerts`, once each.

    Never raises: a run that cannot tell anybody goes on.
    """
    from include.alert_record import AlertRecord

    try:
        raised = list(alerts)
        if not raised:
            return
        record = AlertRecord(connections.ledger().engine)
        everybody = [*notifiers, *_configured()]
        for one in raised:
            alert = replace(one, link=str(getattr(context["ti"], "log_url", "")))
            _log(alert, record)
            for number, notifier in enumerate(everybody):
                _notify(notifier, f"{number} {type(notifier).__name__}", alert, context, record)
    except Exception as error:  # noqa: BLE001  # whatever it is, the run is worth more
        log.warning(
            "Nobody could be told about this run (%s: %s). The run goes on.",
            type(error).__name__,
            error,
        )


def _configured() -> list[BaseNotifier]:
    """Return the notifiers of `[llm_batch] notifiers`; none when the setting cannot be used."""
    text = conf.get("llm_batch", "notifiers", fallback="") or "{}"
    try:
        classes: Mapping[str, Mapping[str, Any]] = json.loads(text)
        return [import_string(path)(**arguments) for path, arguments in classes.items()]
    except Exception as error:  # noqa: BLE001  # a class of somebody else may raise anything
        raise ConfigurationError(
            f"[llm_batch] notifiers cannot be used ({type(error).__name__}: {error}). Expected "
            'JSON of this form: {"package.module.NotifierClass": {"argument": "value"}}.'
        ) from None


def _log(alert: Alert, record: AlertRecord) -> None:
    if not record.claim(alert, LOG):
        return
    log.warning("ALERT %s. %s", alert.kind, alert.text.replace("\n", " | "))
    metrics.alert(alert)
    record.delivered(alert, LOG)


def _notify(
    notifier: BaseNotifier, channel: str, alert: Alert, context: Context, record: AlertRecord
) -> None:
    if not record.claim(alert, channel):
        return
    sending = _Sending(notifier, {**context, "alert": alert})
    sending.start()
    sending.join(PATIENCE)
    if sending.is_alive():
        log.warning(
            "%s did not end telling about %s within %s s; it may have, so it is not asked again.",
            channel, alert.subject, PATIENCE,
        )  # fmt: skip
    elif sending.error is None:
        record.delivered(alert, channel)
        log.info("%s was told: %s.", channel, alert.subject)
    else:
        record.failed(alert, channel, type(sending.error).__name__)
        log.warning(
            "%s could not tell about %s (%s: %s). The run goes on; the next task that looks tries "
            "again. Check the notifier's connection.",
            channel, alert.subject, type(sending.error).__name__, sending.error,
        )  # fmt: skip


class _Sending(threading.Thread):
    """One call of one notifier, on a copy: rendering changes it for good."""

    def __init__(self, notifier: BaseNotifier, context: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._notifier = _filled(copy.copy(notifier))
        self._context = context
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._notifier(self._context)
        except Exception as error:  # noqa: BLE001  # a class of somebody else may raise anything
            self.error = error


def _filled(notifier: BaseNotifier) -> BaseNotifier:
    for name, template in USUAL_FIELDS.items():
        if name in notifier.template_fields and not getattr(notifier, name, None):
            setattr(notifier, name, template)
    return notifier
