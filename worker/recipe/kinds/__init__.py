"""What a kind of training does with a model, one module a kind: its head, its evaluation, its files, its trace."""
