"""Stored adapters on a base in memory: answers, labels, scores, merged models. It trains nothing and claims no job."""
