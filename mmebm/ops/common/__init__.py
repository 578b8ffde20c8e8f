"""What all ops share: the way from a tensor to an address."""
