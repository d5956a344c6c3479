"""GPU operators over the rows of the neurons that fire: Triton kernels, and a torch reference of each."""
