"""The engine: members that train on one base, micro-batch by micro-batch. No order, no message, no SQL, no Celery."""
