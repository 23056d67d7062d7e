"""The planner: what a training run will need, and which settings fit, without a GPU and without memory."""
