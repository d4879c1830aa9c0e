"""What a job will need from a card, before it runs: loractl plan.

Others use nothing of it.
"""
