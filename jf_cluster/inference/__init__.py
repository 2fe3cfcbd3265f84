"""Using a trained model: in the terminal, from files to files, and as a server."""
