"""What a step costs: operations, bytes, FLOPs, and how near it comes to what the machine can do."""
