"""The process that serves one device: it wakes, claims and supervises. No torch."""
