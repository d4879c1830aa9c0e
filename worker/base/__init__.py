"""The base model and its adapter: found, checked, loaded, held to their memory. No SQLAlchemy, no Celery."""
