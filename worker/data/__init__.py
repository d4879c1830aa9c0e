"""A job's data as a model takes them: from rows to token ids and labels. No SQLAlchemy, no Celery."""
