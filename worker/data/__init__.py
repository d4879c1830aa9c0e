"""A job's data as a model takes it: from rows to token ids and labels. No SQLAlchemy, no Celery."""
