"""What needs a GPU box: devices, the node, the supervisor and the trainer."""
