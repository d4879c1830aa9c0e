"""What the client and the worker share: jobs, data, memory plan, placement, store, queue. Imports neither of them."""
