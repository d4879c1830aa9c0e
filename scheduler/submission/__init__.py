"""A job on its way into the queue: its data, its need, a sweep's members. It prints nothing: commands do."""
