"""What a model is trained for: loss and metrics. They know nothing of nodes."""
