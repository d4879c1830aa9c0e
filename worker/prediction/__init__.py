"""The rows of a file, answered or labelled by a stored adapter. No queue, no HTTP."""
