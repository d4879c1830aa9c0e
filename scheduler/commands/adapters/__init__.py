"""loractl adapters, one subcommand a module: each parses, asks and prints. No query."""
