"""Replays traces of jobs on a fleet, under our placement rule and others: loractl sim. No database.

Others use nothing of it.
"""
