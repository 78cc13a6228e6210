"""The problems of declarative nodes."""
