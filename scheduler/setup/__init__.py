"""A lab made on its server box, and joined from others: what loractl lab and loractl join do. It prints nothing."""
