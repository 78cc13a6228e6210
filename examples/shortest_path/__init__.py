"""Shortest paths across terrain that is only seen: a network from images to cell costs, trained through Dijkstra."""
