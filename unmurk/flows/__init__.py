"""The posterior flow q(x | y)."""
