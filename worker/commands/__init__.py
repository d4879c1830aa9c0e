"""The worker's commands, one per module: each parses, asks and prints. The rooms below do the work."""
