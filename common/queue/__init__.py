"""Messages: the embedded Valkey, the Celery app, hints. No decision is made here."""
