"""Replays of job traces on a fleet, under our placement rule and others. No database, no queue."""
