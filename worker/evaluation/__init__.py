"""Base against tuned: measured, with intervals, as a report. No SQLAlchemy, no Celery."""
