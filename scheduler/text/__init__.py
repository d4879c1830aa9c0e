"""Answers as text for a terminal: functions from a value and a width to a string."""
