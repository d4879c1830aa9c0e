"""A lab: set up on its server box, joined from others, and examined: loractl lab, join and doctor.

Others use nothing of it.
"""
