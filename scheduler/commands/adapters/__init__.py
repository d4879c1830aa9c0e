"""loractl adapters: one module a subcommand."""
