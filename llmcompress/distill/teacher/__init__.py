"""What a student learns from: its teacher reading along, or what it predicted, kept on disk."""
