"""Carries out what the scheduler decided."""
