"""One script per claim of speed; see README.md beside this file. Not shipped."""
