"""Several jobs in one trainer process: who is in it, what they may take, what one has left. Nothing of a training."""
