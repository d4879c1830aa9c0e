"""One attempt from claim to finish, as its supervisor sees it. No torch, not even indirectly; SQL only through
Store."""
