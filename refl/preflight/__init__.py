"""Checks that run before training: the doctor and the memory count."""
