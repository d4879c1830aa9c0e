"""Finds and removes what no one needs any more: loractl gc.

Others use nothing of it.
"""
