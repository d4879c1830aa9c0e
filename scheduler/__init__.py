"""The client: it submits, lists and explains jobs. It imports no training stack and nothing of the worker."""
