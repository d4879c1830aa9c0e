"""The artifact store as an attempt reaches it: each call in a process that can be abandoned. No torch, no SQL, no
queue."""
