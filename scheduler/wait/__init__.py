"""Why a job waits, when it starts and what would help, by asking the placement rule. No query, no clock.

Others use all of it.
"""
