"""One attempt from claim to finish, as its supervisor sees it. No torch."""
