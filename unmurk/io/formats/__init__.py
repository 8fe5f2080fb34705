"""One reader a family of file formats."""
