"""The recipe, in a process of its own: from a Start to an adapter. No SQL, no Celery."""
