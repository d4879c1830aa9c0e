"""The outbox: what is told to people, written with the event, and how it goes on its way. Queries alone."""
