"""The state of all jobs or of one, a sweep's members and a log: loractl status and logs.

Others use follow, job, overview, standing.
"""
