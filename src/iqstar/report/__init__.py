"""What ``iqstar eval`` reports: figures with intervals, as JSON, on the terminal, as a page."""
