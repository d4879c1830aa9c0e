"""The worker's commands: parse, ask, print."""
