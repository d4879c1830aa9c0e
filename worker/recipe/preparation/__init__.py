"""Prepares a job's data, in the trainer's process or in a separate one. No model, and no card."""
