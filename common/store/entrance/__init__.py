"""How a box or a person gets its login: by an invitation of the owner's. No SQL but this stands here."""
