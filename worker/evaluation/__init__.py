"""Base against tuned: measured, with intervals, as a report. No SQL, no Celery."""
