"""Rows of J and a method in, the merged gradient out."""
