"""Finished jobs side by side, and the best of a sweep: loractl compare.

Others use answer, winner.
"""
