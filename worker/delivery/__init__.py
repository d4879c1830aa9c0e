"""Messages to people, from the outbox to a receiver. No torch, no SQL; no answer of a receiver is kept or shown."""
