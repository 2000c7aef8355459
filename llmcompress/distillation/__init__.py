"""A dense teacher that teaches a student, whose format and size stay.

In: a student, a teacher, a recipe. Out: the student with better values, and its learning curve. Open `run.py` first,
then `phases.py` and `train.py`.
"""
