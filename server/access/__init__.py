"""Who asks, with which key, and how much that key may use and has used."""
