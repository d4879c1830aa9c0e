"""The engine: what trains an adapter, micro-batch by micro-batch. No order, no message, no SQL, no Celery."""
