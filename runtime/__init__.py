"""The cellar: what a program needs and a lesson does not."""
