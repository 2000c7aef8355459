"""The dense teacher taught into the compressed student: losses, and how to compute them in little memory."""
