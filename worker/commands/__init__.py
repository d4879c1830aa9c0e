"""The worker's commands, one a module: each parses, asks and prints. The work is done in the rooms below."""
