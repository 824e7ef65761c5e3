"""Models: architecture, attention layout and backends, student and teacher."""
