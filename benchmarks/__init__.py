"""What is measured about this project, with the results as files."""
