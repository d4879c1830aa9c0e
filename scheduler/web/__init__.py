"""The lab as pages in a browser, and as numbers for Prometheus: loractl web. Every route is read-only.

Others use nothing of it.
"""
