"""What runs on a GPU box: devices, the node, the supervisor, the trainer, the server. Imports nothing of scheduler."""
