"""Stored adapters on a base in memory: answers, merged models. It trains nothing and claims no job."""
