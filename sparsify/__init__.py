"""Ways to make a model sparsely activated."""
