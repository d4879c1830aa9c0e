"""What a job can learn to do, one module a kind: what it means for the job file, for placement and for the plan."""
