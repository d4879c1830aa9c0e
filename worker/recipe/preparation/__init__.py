"""A job's data, made ready in the trainer's process or in one beside it. Nothing of a model, and no card."""
