"""What a finished job measured, base against tuned: loractl report.

Others use answer.
"""
