"""What supervisor and trainer both know: messages, marker, versions, limits of trust. No torch, no SQL."""
