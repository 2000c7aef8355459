"""A recipe laid over a model, its plan, and its run block by block.

In: a recipe with steps, a dense model. Out: a compressed checkpoint and its report; an interrupted run resumes. Open
`job.py` first, then `run.py`.
"""
