"""What is claimed of rotary positions, measured."""
