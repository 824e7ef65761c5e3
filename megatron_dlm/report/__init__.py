"""One HTML page that compares training runs, made of the files in their folders."""
