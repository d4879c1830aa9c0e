"""Settings of a job file, tried in a group of jobs: loractl sweep.

Others use nothing of it.
"""
