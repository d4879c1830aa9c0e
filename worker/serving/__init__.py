"""Stored adapters on a base in memory: answers, scores, merged models."""
