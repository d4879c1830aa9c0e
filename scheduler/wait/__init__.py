"""Why a job waits, when it starts and what would help, according to the placement rule. No query, no clock.

Others use all of it.
"""
