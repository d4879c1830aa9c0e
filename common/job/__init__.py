"""A job as a person asks for it and as it fares: its file, spec, method, status and reasons. No database, no device."""
