"""One attempt from claim to finish, as its supervisor sees it. No torch, at any depth; SQL only through Store."""
