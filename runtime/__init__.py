"""The engine: reads only the neurons that a token needs."""
