"""One module a command: parse, ask, print. No query, no shape of JSON."""
