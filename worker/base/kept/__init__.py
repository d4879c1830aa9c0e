"""A base that stays in its process between trainings: put back as it was loaded, and proof that nothing else stayed."""
