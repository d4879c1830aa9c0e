"""The stored adapters, and where each comes from: loractl adapters.

Others use answer.
"""
