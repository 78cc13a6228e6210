"""What every solver of conic programs sees, how its answer is judged, and what is tried where it says little."""
