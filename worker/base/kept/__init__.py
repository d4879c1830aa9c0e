"""What is known about a base from earlier."""
