"""The outbox: messages to people, written with the event, and how they are delivered. Queries alone."""
