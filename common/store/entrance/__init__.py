"""How a box or a person gets its login: by the owner's invitation. It has no other SQL."""
