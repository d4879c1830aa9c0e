"""The devices of this box, who holds their memory, and what is installed here. No torch."""
