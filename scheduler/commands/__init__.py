"""The client's commands, one a module: each parses, asks and prints. No query; the answer shapes its own JSON."""
