"""A job as a person submits it and as it runs: its file, spec, method, status and reasons. No database, no device."""
