"""From rows to token ids and labels. No SQL, no Celery."""
