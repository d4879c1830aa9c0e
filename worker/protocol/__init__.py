"""What both sides of the pipe between supervisor and trainer know. No torch, no SQL."""
