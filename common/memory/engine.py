"""Which training step a plan and a measured peak are of."""

LEAN = 2
"""The first one whose steps are lean unless a job asks for exact ones."""

ENGINE = LEAN
"""The version of the worker's training step, as far as its memory goes. 1 was transformers' Trainer. Raise it when
steps take other memory: what attempts of an older one took teaches nothing, and jobs of both are not alike."""
