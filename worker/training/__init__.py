"""The recipe, in its own process: from a Start message to an adapter. No SQLAlchemy, no Celery."""
