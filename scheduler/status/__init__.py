"""Where jobs stand, all of them or one, a sweep's members and a log: loractl status, show and logs.

Others use follow, job, overview, standing.
"""
