"""The process that serves one device: it wakes, claims, supervises. No torch, at any depth; SQL only through Store."""
