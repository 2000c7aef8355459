"""Narrower decoder blocks: neurons and heads that go, and the smaller checkpoint that any engine loads."""
