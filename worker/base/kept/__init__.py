"""A base that stays in its process between trainings: restored to its loaded state, with proof that nothing else
stayed."""
