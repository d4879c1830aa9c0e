"""Why one job waits, card by card: loractl why.

Others use answer.
"""
