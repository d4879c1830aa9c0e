"""The trainer's process: from a Start message to an adapter. No SQLAlchemy, no Celery."""
