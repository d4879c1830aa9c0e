"""The version of the training step that a plan or a measured peak belongs to."""

LEAN = 2
"""The first version whose steps are lean, unless a job asks for exact steps."""

ENGINE = LEAN
"""The version of the worker's training step, as far as its memory goes. 1 was transformers' Trainer. Raise it when
the memory of steps changes: attempts of an older version teach nothing, and jobs of both are not alike. 0 are attempts
of before revision 0041 that shared a trainer."""
