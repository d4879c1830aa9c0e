"""A data set before any tokenizer: rows, labels, findings. No tokenizer, no database."""
