"""Distillation: the dense teacher teaches a student, whose format and size stay."""
