"""Answers drawn as pages for a browser, and as numbers for Prometheus. Nothing is changed: every route only reads."""
