"""Plans a run on paper: layouts that training accepts, memory of a rank, time of a phase."""
