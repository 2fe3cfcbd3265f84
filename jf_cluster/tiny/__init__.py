"""The embedded run: generated arithmetic word problems and the small model shipped with the project."""
