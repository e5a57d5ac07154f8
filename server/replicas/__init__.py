"""Several engines behind one address: which gets a request, and who takes over where one dies."""
