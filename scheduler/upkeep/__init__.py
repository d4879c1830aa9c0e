"""What keeps an installation healthy: garbage, backup."""
