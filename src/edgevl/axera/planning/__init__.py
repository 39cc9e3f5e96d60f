"""What a board holds and how long it takes, computed from shapes and published times."""
