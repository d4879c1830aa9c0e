"""The process that serves one device, and trainers that it keeps. No torch, at any depth; SQL only through Store."""
