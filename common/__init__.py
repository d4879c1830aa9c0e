"""What the client and the worker agree on: spec, status, tables, store, queue, artifacts, memory plan, placement."""
