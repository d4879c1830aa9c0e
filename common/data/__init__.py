"""A data set before it is tokenised: rows, formats, labels, findings. No tokenizer, no database."""
