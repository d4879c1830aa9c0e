"""Tries settings of a job file in a group of jobs: loractl sweep.

Others use nothing of it.
"""
