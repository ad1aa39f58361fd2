"""The loop, the step, the loss and the optimizer."""
