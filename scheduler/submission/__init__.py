"""What happens to a job before it is queued: its need, its points in a sweep."""
