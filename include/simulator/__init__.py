"""A local server that speaks the Files and Batches API, keeps its own bill and can misbehave.

Start it with ``python -m include.simulator --port 8765 --state DIR`` or, from a test, with
`include.simulator.process.Simulator.start`. The public API is under ``/v1``, the books and the
fault script under ``/_sim`` (see `include.simulator.admin`).
"""
