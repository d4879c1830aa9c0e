"""The lab as pages in a browser, and as numbers for Prometheus: loractl web. Every route only reads.

Others use nothing of it.
"""
