"""The artifact store as an attempt reaches it: each call in a process that can be left. No torch, no SQL, no queue."""
