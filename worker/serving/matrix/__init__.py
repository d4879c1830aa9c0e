"""Several adapters scored on several tasks, on one loaded base. It serves no requests."""
