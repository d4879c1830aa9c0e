"""Messages to people, from the outbox to a receiver. No torch, no SQL; a receiver's answer is never kept or shown."""
