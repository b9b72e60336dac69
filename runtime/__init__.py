"""The cellar: what a program needs and a lesson does not. Nothing here imports the seven files of the
lesson."""
