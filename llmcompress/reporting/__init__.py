"""Results for people: tables, Markdown, plots, one HTML page."""
