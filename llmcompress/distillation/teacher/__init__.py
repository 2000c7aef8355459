"""The teacher of a student: a model that reads along, or its predictions kept on disk."""
