"""The devices of this box, and who holds their memory. No torch, at any depth."""
