"""What a person touches: the commands that submit, list and explain jobs. No training stack, so it starts fast."""
