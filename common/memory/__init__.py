"""The memory plan: bytes from a model's shape and a job alone. Pure."""
