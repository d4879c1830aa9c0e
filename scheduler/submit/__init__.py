"""Checks, plans and queues jobs: loractl submit, and what others queue.

Others use admission, ancestor, data, draft, intake, lengths, need, preflight.
"""
