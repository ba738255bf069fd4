"""Puts this folder, with the small models that the tests of all formats share, where they find it."""
