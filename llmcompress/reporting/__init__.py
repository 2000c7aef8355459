"""Results for people: reports, tables, Markdown, plots, one HTML page.

In: numbers of a run or of scores. Out: records on disk and what people read. Open `report.py` first.
"""
