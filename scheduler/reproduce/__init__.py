"""A finished job, run again and held against the first time: loractl reproduce.

Others use nothing of it.
"""
