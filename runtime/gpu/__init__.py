"""Engines on a GPU, alone or together with the CPU; torch on a CPU can stand in for the device."""
