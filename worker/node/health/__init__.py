"""What keeps a card fit for jobs: its self-test, what attempts leave behind there, supervisors that hang."""
