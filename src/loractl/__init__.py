"""Queue LoRA and QLoRA fine-tunes on a lab's GPU boxes."""

__version__ = "0.5.0"
