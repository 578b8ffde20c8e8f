"""What all ops share: the constants of a step, and the way from a tensor to an address."""
