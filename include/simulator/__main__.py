"""`python -m include.simulator`: start a simulator and serve until it is stopped."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import sys
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from include.simulator.admin import wrong_rules
from include.simulator.dialects import DIALECTS, OPENAI
from include.simulator.fault_book import FaultBook
from include.simulator.faults import DEMO
from include.simulator.server import build, serve
from include.simulator.settings import Limits, Settings, Timing
from include.simulator.store import Store

STATUSES = ("validating", "in_progress", "finalizing", "cancelling")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and serve; 2 when a fault script is wrong."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    faulthandler.enable()
    settings = _settings(options)
    store = Store(settings.state)
    faults = FaultBook(store)
    try:
        _add_faults(faults, options)
    except ValidationError as error:
        print(f"{options.faults}: {wrong_rules(error)}", file=sys.stderr)  # noqa: T201
        return 2
    serve(
        build(settings, store, faults),
        options.host,
        options.port,
        until_stdin_closes=options.until_stdin_closes,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m include.simulator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free port")
    parser.add_argument("--state", type=Path, required=True, help="folder that keeps everything")
    usual = Timing()
    for status in STATUSES:
        flag = f"--seconds-{status.replace('_', '-')}"
        parser.add_argument(flag, type=float, default=getattr(usual, status), metavar="S")
    parser.add_argument("--speed", type=float, default=1.0, help="divides all these seconds")
    parser.add_argument("--instant", action="store_true", help="no status takes any time")
    parser.add_argument("--faults", type=Path, help="JSON file with a list of rules")
    parser.add_argument("--demo-faults", action="store_true", help="some errors, one expiry")
    limits = Limits()
    parser.add_argument("--requests-per-batch", type=int, default=limits.requests_per_batch)
    parser.add_argument("--bytes-per-batch", type=int, default=limits.bytes_per_batch)
    parser.add_argument("--embedding-inputs", type=int, default=limits.embedding_inputs)
    parser.add_argument(
        "--cache-from-tokens", type=int, default=1024, help="prompts this long use the cache"
    )
    parser.add_argument(
        "--keep-order", action="store_true", help="results in the order of the requests"
    )
    parser.add_argument("--key", help="the only API key that is taken")
    parser.add_argument(
        "--profile", choices=DIALECTS, default=OPENAI.name, help="as which provider"
    )
    parser.add_argument(
        "--deployments", type=_deployments, default={}, help="name=model,name=model: no other name"
    )
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="stop with the process that started it"
    )
    parser.add_argument("--workers", type=int, default=1, help="threads that answer batches")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    pace = 0.0 if options.instant else 1 / options.speed
    seconds = {status: getattr(options, f"seconds_{status}") * pace for status in STATUSES}
    return Settings(
        state=options.state,
        timing=Timing(**seconds),
        limits=Limits(
            requests_per_batch=options.requests_per_batch,
            bytes_per_batch=options.bytes_per_batch,
            embedding_inputs=options.embedding_inputs,
        ),
        workers=options.workers,
        cache_from_tokens=options.cache_from_tokens,
        keep_order=options.keep_order,
        key=options.key,
        dialect=DIALECTS[options.profile],
        deployments=options.deployments,
    )


def _deployments(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split(","))


def _add_faults(faults: FaultBook, options: argparse.Namespace) -> None:
    """Add the rules of the command line; named, so that a restart does not add them twice."""
    rules = list(DEMO) if options.demo_faults else []
    if options.faults is not None:
        rules += orjson.loads(options.faults.read_bytes())
    known = {rule["id"] for rule in faults.show()}
    named = [_named(number, rule) for number, rule in enumerate(rules, start=1)]
    faults.add([rule for rule in named if not isinstance(rule, dict) or rule["id"] not in known])


def _named(number: int, rule: Any) -> Any:
    return {"id": f"start-{number}", **rule} if isinstance(rule, dict) else rule


if __name__ == "__main__":
    sys.exit(main())
