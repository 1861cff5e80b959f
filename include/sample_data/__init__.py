"""Input for the demo: see README.md."""
