"""The client: it submits, lists and explains jobs. It imports neither the training stack nor the worker."""
